"""A model that answers questions about single videos, with the evidence for its answers."""

import concurrent.futures
import contextlib
import functools
import itertools
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError, UserError, check_kind, check_text
from adacm2_jax.inference.answerer import Answerer, Reading
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.reply import Choice, Moment, Reply
from adacm2_jax.inference.session import Session, SessionModel, open_memory, resume
from adacm2_jax.inference.study import Study, Watch
from adacm2_jax.progress import Progress, patience
from adacm2_jax.video.sampling import ONE_A_SECOND, Sampling
from adacm2_jax.video.stream import Row, VideoFile, lock_step, open_video

#: What is asked where no question is.
CAPTION = "what does the video describe?"


class VideoModel:
    """Answers questions about videos; made by ``adacm2_jax.load``.

    Args:
      make_answerer: makes the compiled functions for videos of at most so many frames; it is called
        when the first video has been opened.
      processor: the model's tokenizers.
      ask_as: a question → what the networks read.
      size: side of the frames, pixels.
      chunk: frames that pass through the networks together.
      resize: how frames are made square.
      on_truncated: of a file that is cut short: ``error`` or ``use``.
      sessions: called for what all sessions share when the first one begins.

    Attributes:
      sessions: gives what all sessions of this model share; its parameters are read then.
    """

    def __init__(
        self,
        make_answerer: Callable[[int], Answerer],
        processor: Processor,
        *,
        ask_as: Callable[[str], str],
        size: int,
        chunk: int,
        resize: str,
        on_truncated: str,
        sessions: Callable[[], SessionModel],
    ):
        self._make, self._processor, self._ask_as = make_answerer, processor, ask_as
        self._size, self._chunk = size, chunk
        self._resize, self._on_truncated = resize, on_truncated
        self._answerers: dict[int, Answerer] = {}
        self.sessions = functools.cache(patience("loading the model")(sessions))

    def ask(
        self,
        video: str | os.PathLike,
        questions: str | Sequence[str],
        *,
        sampling: Sampling | None = None,
        start: float | None = None,
        end: float | None = None,
        moments: int = 5,
    ) -> Any:
        """Answers questions about a video, all in one pass over it.

        Args:
          video: path of the file.
          questions: one, or several.
          sampling: which frames are read; by default one a second, however long the video is.
          start, end: the part that counts, seconds.
          moments: how many of the remembered frames an answer names.

        Returns:
          A :class:`Reply` for a single question, else a list of them, in order; with several
          policies those of the first policy come first.

        Raises:
          UserError: for a question that is too long, or an argument of another type.
          DataError: if the video cannot be read to its end.
        """
        several = [questions] if isinstance(questions, str) else _texts(questions, "questions")
        if check_kind(moments, numbers.Integral, "moments", "a whole number from 0 on") < 0:
            raise UserError(f"moments is {moments}; give a whole number from 0 on")
        with self._reading(video, several, sampling, start, end) as (answerer, reading, row):
            replies = [
                reply
                for name in reading.states
                for reply in self._replies(answerer, reading, name, row, several, moments)
            ]
        return replies[0] if isinstance(questions, str) and len(replies) == 1 else replies

    def study(
        self,
        video: str | os.PathLike,
        questions: Sequence[str],
        *,
        sampling: Sampling | None = None,
        start: float | None = None,
        end: float | None = None,
        moments: int = 5,
    ) -> Study:
        """Answers as :meth:`ask` does, and keeps what the answers rest on and what they cost.

        Raises:
          UserError, DataError: as :meth:`ask`.
        """
        several = _texts(questions, "questions")
        watch = Watch()
        with self._reading(video, several, sampling, start, end, watch) as parts:
            answerer, reading, row = parts
            replies = {
                name: tuple(self._replies(answerer, reading, name, row, several, moments))
                for name in reading.states
            }
            return watch.study(answerer, reading, row, replies)

    def check(
        self,
        video: str | os.PathLike,
        sampling: Sampling | None = None,
        start: float | None = None,
        end: float | None = None,
        questions: Sequence[str] = (),
    ) -> int:
        """Opens a video, without decoding it, and returns how many frames would be read.

        Nothing is computed, and no parameter is read.

        Raises:
          UserError: for a question that is too long.
          DataError: if the video is none, or its end is seen to be missing.
        """
        if questions:
            self._prompts(questions)
        return self._open(video, sampling, start, end).total

    def caption(self, video: str | os.PathLike, prompt: str = CAPTION, **options: Any) -> Any:
        """Describes a video: :meth:`ask` with a question that asks for it."""
        return self.ask(video, prompt, **options)

    def choose(
        self,
        video: str | os.PathLike,
        labels: Sequence[str],
        question: str = CAPTION,
        *,
        sampling: Sampling | None = None,
        start: float | None = None,
        end: float | None = None,
    ) -> list[Choice]:
        """Ranks labels by how likely each is as the whole answer, the most likely first.

        Args:
          video, sampling, start, end: as for :meth:`ask`.
          labels: at least two different ones.
          question: that they answer.

        Raises:
          UserError: for fewer labels, one that is empty or too long, or an argument of another
            type.
          DataError: if the video cannot be read to its end.
        """
        if isinstance(labels, str):
            raise UserError(f"labels are one text, {labels!r}: give a list of them")
        labels = _texts(labels, "labels")
        if not all(map(str.strip, labels)):
            raise UserError(f"labels are {labels!r}: one is empty; give each a text")
        if len(set(labels)) < 2 or len(set(labels)) < len(labels):
            raise UserError(f"labels are {labels!r}: give at least two, all different")
        for label in labels:
            check_text(label, "a label")
        self._processor.candidates([""] * len(labels), labels)  # before a video is read
        with self._reading(video, [question], sampling, start, end) as (answerer, reading, _):
            name = next(iter(reading.states))
            (found,) = answerer.log_likelihoods(reading, name, [labels])
        scores = found.log_probs.astype(np.float64)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        order = np.argsort(-scores, kind="stable")
        return [Choice(labels[i], float(scores[i]), float(shares[i])) for i in order]

    def session(
        self,
        questions: str | Sequence[str] = (),
        *,
        seconds_per_frame: float = 1.0,
        open_tokens: int = 0,
    ) -> Session:
        """A stream that may be asked at any moment, in constant memory.

        Args:
          questions: that are known beforehand: each has a memory of its own.
          seconds_per_frame: between two frames.
          open_tokens: how many tokens a layer keeps for questions that nobody has asked yet; by
            default those of two frames.

        Raises:
          UserError: for a question that is too long, or a value that cannot be used.
        """
        several = [questions] if isinstance(questions, str) else _texts(questions, "questions")
        for question in several:
            if not check_text(question, "a question").strip():
                raise UserError("one of the known questions is empty; leave it out")
        if len(set(several)) < len(several):
            raise UserError(f"questions are {several!r}: give each once")
        check_kind(seconds_per_frame, numbers.Real, "seconds_per_frame", "seconds above 0")
        if not 0 < seconds_per_frame < math.inf:
            raise UserError(f"seconds_per_frame is {seconds_per_frame}; give seconds above 0")
        check_kind(open_tokens, numbers.Integral, "open_tokens", "a whole number")
        if open_tokens < 0:
            raise UserError(f"open_tokens is {open_tokens}; give a whole number from 1 on")
        shared = self.sessions()
        tokens = open_tokens or 2 * shared.config.vision.tokens_per_frame
        return Session(shared, several, float(seconds_per_frame), open_memory(int(tokens)))

    def resume(self, path: str | os.PathLike) -> Session:
        """Goes on with a session that ``Session.save`` wrote, in this or another process.

        Raises:
          UserError: for a file that is none or damaged, and for one of another model.
        """
        return resume(self.sessions(), path)

    @contextlib.contextmanager
    def _reading(
        self,
        video: str | os.PathLike,
        questions: Sequence[str],
        sampling: Sampling | None,
        start: float | None,
        end: float | None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[Answerer, Reading, Row]]:
        """The memories after the whole video; ``watch`` measures on the way."""
        if not questions:
            raise UserError("questions are empty; ask at least one")
        prompts = self._prompts(questions)
        row = self._open(video, sampling, start, end)
        with patience("loading the model"):
            answerer = self._answerer(row.total)
        reading = answerer.start(prompts, np.array([row.total]), np.zeros(1, np.uint32))
        if watch:
            watch.begin(answerer, reading, row.total, (1, self._chunk, self._size, self._size, 3))

        def read(frames: np.ndarray, valid: np.ndarray) -> int:
            answerer.read(reading, frames, valid)
            count = int(valid.sum())
            if watch:
                watch.chunk(reading, count)
            return count

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            chunks = lock_step([row], pool, 1, self._chunk, self._size)
            done = 0
            with patience("compiling, then reading the first frames"):
                for frames, valid in itertools.islice(chunks, 1):
                    done = read(frames, valid)
            with Progress("read", row.total, initial=done, unit="frames") as progress:
                for frames, valid in chunks:
                    progress.update(read(frames, valid))
        if row.error:
            raise DataError(row.error)
        if watch:
            watch.end(reading)
        yield answerer, reading, row

    def _prompts(self, questions: Sequence[str]) -> list[str]:
        """What the networks read of questions, none of which is too long."""
        for question in questions:
            check_kind(question, str, "a question", "a text")
        prompts = [self._ask_as(check_text(question, "a question")) for question in questions]
        self._processor.questions(prompts)
        return prompts

    def _open(
        self,
        video: str | os.PathLike,
        sampling: Sampling | None,
        start: float | None,
        end: float | None,
    ) -> Row:
        path = "the path of a video file, a text or a pathlib.Path"
        check_kind(video, (str, os.PathLike), "video", path)
        name = check_text(check_kind(os.fspath(video), str, "video", path), "a path")
        if not name:
            raise UserError(f"video is ''; give {path}")
        for time, what in ((start, "start"), (end, "end")):
            if time is not None:
                check_kind(time, numbers.Real, what, "seconds as a number, or None")
        if sampling is not None:
            check_kind(sampling, Sampling, "sampling", "an adacm2_jax.Sampling, or None")
        return open_video(
            VideoFile(name, start, end),
            size=self._size,
            chunk=self._chunk,
            sampling=sampling or ONE_A_SECOND,
            resize=self._resize,
            on_truncated=self._on_truncated,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
        )

    def _answerer(self, frames: int) -> Answerer:
        """One for all videos; where a policy holds all frames, one for every doubling of them."""
        answerer = self._answerers.get(0)
        if answerer is None:
            answerer = self._make(frames)
            whole = any(m.config.memory.policy == "full" for m in answerer.models.values())
            if not whole:
                self._answerers[0] = answerer
                return answerer
            room = max(self._chunk, 1 << (frames - 1).bit_length())
            if room not in self._answerers:
                self._answerers[room] = self._make(room)
            return self._answerers[room]
        return answerer

    def _replies(
        self,
        answerer: Answerer,
        reading: Reading,
        name: str,
        row: Row,
        questions: Sequence[str],
        moments: int,
    ) -> Iterator[Reply]:
        tokens = answerer.tokens_per_frame
        remembered = answerer.remembered(reading, name)
        with patience("compiling, then answering"):
            found = answerer.answer(reading, name)
        for question, answers, kept in zip(questions, found, remembered, strict=True):
            total = kept.frames_seen * tokens
            yield Reply(
                video=str(row.example.video),
                question=question,
                answer=answers[0].text,
                score=answers[0].score,
                n_best=tuple(answers),
                policy=name,
                frames=kept.frames_seen,
                kept_tokens=kept.kept_tokens,
                total_tokens=total,
                moments=tuple(
                    Moment(float(row.times[each.frame]), each.tokens, each.score)
                    for each in kept.frames[: moments if kept.kept_tokens < total else 0]
                ),
            )


def _texts(values: Any, name: str) -> list[str]:
    """A list of texts from whatever holds several."""
    accepted = "a list of texts"
    check_kind(values, Iterable, name, accepted)  # type: ignore[type-abstract]
    if isinstance(values, (bytes, Mapping)):
        raise UserError(f"{name} are {values!r:.60}; give {accepted}")
    return [check_kind(text, str, f"one of {name}", "a text") for text in values]
