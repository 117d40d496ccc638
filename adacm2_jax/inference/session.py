"""Sessions: a stream of frames that may be asked at any moment, in constant memory.

The values and the compiled steps are in ``session_steps.py``. A :class:`Session` holds one such
value, and a ``SessionModel`` (``session_model.py``) what all sessions of a model share.
"""

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from adacm2_jax.config import MemoryConfig, from_dict, to_dict
from adacm2_jax.errors import DataError, UserError, check_kind, check_text
from adacm2_jax.inference import evidence, session_file, session_steps, steps
from adacm2_jax.inference.answerer import Answer
from adacm2_jax.inference.generate import Generated
from adacm2_jax.inference.reply import Moment, Reply
from adacm2_jax.inference.session_model import SessionModel, open_memory
from adacm2_jax.inference.session_steps import SessionState
from adacm2_jax.memory.policies import bound_of, newest_instead
from adacm2_jax.models.adacm2 import Question, StreamState
from adacm2_jax.video.sampling import Sampling
from adacm2_jax.video.stream import VideoFile, lock_step, open_video

__all__ = ["Look", "Session", "SessionModel", "open_memory", "push_together", "resume"]


@dataclasses.dataclass(frozen=True)
class Look:
    """What a session has to say to a question; the stream may go on meanwhile.

    Attributes:
      question: as it was asked.
      asked: the same as a row of tokens.
      queries: [1, N, E], after the newest frame.
      policy: of the memory that was read; ``open`` for a late question.
      frames: that had been seen.
      state: that holds the memory.
      row: which of its rows.
    """

    question: str
    asked: Question
    queries: jax.Array
    policy: str
    frames: int
    state: StreamState
    row: int


class Session:
    """A stream of frames, asked about at any moment; made by ``VideoModel.session``.

    What it knows is ``state``, a value of constant size; everything else is fixed when it begins.

    Attributes:
      questions: that are known: each has a memory of its own.
      seconds_per_frame: between two frames.
      state: all that is known of the frames so far.
      model: what it shares with others.
      rival: another session that reads the same frames, or None; see :meth:`begin_rival`.
    """

    def __init__(
        self,
        model: SessionModel,
        questions: Sequence[str],
        seconds_per_frame: float,
        memory: MemoryConfig,
        state: SessionState | None = None,
        known: Question | None = None,
    ):
        self.questions, self.seconds_per_frame = tuple(questions), seconds_per_frame
        self.model, self._memory = model, memory
        self.rival: Session | None = None
        self._models = model.models(memory)
        self._known = known  # unless somebody has encoded them before
        if known is None and self.questions:
            self._known = model.encode(self.questions)
        self._generic = model.encode([""])
        if state is None:
            state = model.placed(session_steps.begin(self._models, 1, len(self.questions)))
        self.state = state

    # --- What it knows -------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Frames pushed so far."""
        return int(self.state.seen[0])

    @property
    def size(self) -> int:
        """Bytes of the state; they never change."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))

    @property
    def kept(self) -> int:
        """Visual tokens that are kept, in the layer that holds most: of all known questions and of
        the open memory. The newest frame, held back whole, is not counted."""
        memories = [state.memory for state in (self.state.known, self.state.open) if state]
        return sum(int(memory.tokens_kept.sum()) for memory in memories)

    @property
    def bound(self) -> int:
        """What ``kept`` never exceeds."""
        each = bound_of(self.model.config) if self.questions else 0
        return each * len(self.questions) + bound_of(self._models.open.config)

    @property
    def shape(self) -> tuple:
        """What sessions that are pushed together have in common."""
        width = 0 if self._known is None else self._known.qformer_ids.shape[1]
        return len(self.questions), width, self._models

    # --- Frames in -----------------------------------------------------------------------------

    def push(
        self,
        frames: np.ndarray | str | os.PathLike,
        *,
        start: float | None = None,
        end: float | None = None,
    ) -> int:
        """Reads frames, or a video file to its end, one frame every ``seconds_per_frame``.

        In which pieces frames come does not matter: the same tokens are kept.

        Args:
          frames: uint8[T, height, width, 3], RGB, or one frame without T; or the path of a file.
          start, end: of a file, the part that counts, seconds.

        Returns:
          Frames seen so far.

        Raises:
          UserError: for an array of another kind.
          DataError: if the video cannot be read to its end; the frames before are known then.
        """
        if isinstance(frames, (str, os.PathLike)):
            self._push_file(os.fspath(frames), start, end)
        else:
            if start is not None or end is not None:
                raise UserError("start and end are parts of a file; cut an array before it comes")
            self._push_array(frames)
        return self.seen

    def _push_array(self, frames: Any) -> None:
        from adacm2_jax.video.resize import RESIZES

        frames = np.asarray(frames)
        frames = frames[None] if frames.ndim == 3 else frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise UserError(
                f"frames are {frames.dtype}{list(frames.shape)}; give uint8[T, height, width, 3], "
                "RGB"
            )
        if not all(frames.shape[1:3]):
            raise UserError(f"frames are {list(frames.shape)}, without a pixel; give pictures")
        shrink, size = RESIZES[self.model.resize], self.model.config.vision.image_size
        for first in range(0, len(frames), self.model.chunk):
            part = frames[first : first + self.model.chunk]
            push_together([self], [np.stack([shrink(picture, size) for picture in part])])

    def _push_file(self, path: str, start: float | None, end: float | None) -> None:
        size, chunk = self.model.config.vision.image_size, self.model.chunk
        row = open_video(
            VideoFile(check_text(path, "a path"), start, end),
            size=size,
            chunk=chunk,
            sampling=Sampling("fps", fps=1 / self.seconds_per_frame),
            resize=self.model.resize,
            on_truncated=self.model.on_truncated,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
        )
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            for frames, valid in lock_step([row], pool, 1, chunk, size):
                push_together([self], [frames[0][valid[0]]])
        if row.error:
            raise DataError(row.error)

    # --- Questions -----------------------------------------------------------------------------

    def ask(self, question: str | None = None, *, moments: int = 5) -> Any:
        """Answers now, and leaves the stream as it is.

        A question that was given at the beginning is answered from its own memory, any other from
        the open one.

        Args:
          question: by default all that are known.
          moments: how many of the remembered frames an answer names.

        Returns:
          A :class:`Reply`; without a question a list of them, of all that are known.

        Raises:
          UserError: for a question that is too long, or if there has been no frame.
        """
        if question is None:
            return [self._reply(look, moments) for look in self._look_known(self.questions)]
        return self._reply(self.look(question), moments)

    def look(self, question: str, asked: Question | None = None) -> Look:
        """What an answer is to be written from.

        Args:
          question: known or not.
          asked: the same from ``SessionModel.encode``, where somebody has it.

        Raises:
          UserError: as :meth:`ask`.
        """
        check_text(check_kind(question, str, "question", "a text"), "a question")
        if question in self.questions:
            return self._look_known([question])[0]
        asked = self.model.encode([question]) if asked is None else asked
        frames = self._seen_some()
        queries = session_steps.ask_late(self._models, self.model.params, self.state, asked)
        return Look(question, asked, queries, "open", frames, self.state.open, 0)

    def _look_known(self, questions: Sequence[str]) -> list[Look]:
        """All that are known read the newest frame together."""
        frames = self._seen_some()
        state, known = self.state.known, self._known
        if state is None or known is None:
            return []
        queries = session_steps.ask_known(self._models, self.model.params, self.state, known)
        policy, looks = self.model.config.memory.policy, []
        for number, question in enumerate(self.questions):
            if question in questions:
                row = slice(number, number + 1)
                asked = jax.tree.map(lambda leaf, row=row: leaf[row], known)
                looks.append(Look(question, asked, queries[row], policy, frames, state, number))
        return looks

    def _seen_some(self) -> int:
        if not (seen := self.seen):
            raise UserError("the session has seen no frame yet; push some before you ask")
        return seen

    def write(self, look: Look, **changes: Any) -> Generated:
        """What the language model writes from a look.

        Args:
          look: of this session.
          changes: other fields of ``GenerationConfig`` than the model's.
        """
        model = self.model
        changes |= {"eos_ids": (model.processor.eos_id,), "pad_id": model.processor.pad_id}
        options = dataclasses.replace(model.generation, **changes)
        return steps.answer(
            steps.any_policy(model.config),
            model.params,
            look.queries,
            look.asked,
            options,
            jax.random.key(0),
            np.zeros(1, np.int32),
        )

    def _reply(self, look: Look, moments: int) -> Reply:
        found = self.write(look)
        scored = zip(np.asarray(found.ids)[0], np.asarray(found.scores)[0], strict=True)
        decode = self.model.processor.decode
        return self.reply(look, [Answer(decode(ids), float(s)) for ids, s in scored], moments)

    def reply(self, look: Look, answers: Sequence[Answer], moments: int = 5) -> Reply:
        """Answers with their evidence.

        Args:
          look: that they were written from.
          answers: best first.
          moments: how many of the remembered frames are named.
        """
        (kept,) = evidence.remembered(look.state, np.array([look.row]))
        return Reply(
            video="",
            question=look.question,
            answer=answers[0].text,
            score=answers[0].score,
            n_best=tuple(answers),
            policy=look.policy,
            frames=look.frames,
            kept_tokens=kept.kept_tokens,
            total_tokens=look.frames * self.model.config.vision.tokens_per_frame,
            moments=tuple(
                Moment(each.frame * self.seconds_per_frame, each.tokens, each.score)
                for each in kept.frames[:moments]
            ),
        )

    def begin_rival(self) -> "Session":
        """What this session is compared with: as many tokens, but always the newest.

        It reads every frame that is pushed from now on, which the ViT reads once; forks and files
        know nothing of it.
        """
        config, tokens = self.model.config, self.model.config.vision.tokens_per_frame
        known = newest_instead(config.memory, tokens) or config.memory
        model = dataclasses.replace(self.model, config=dataclasses.replace(config, memory=known))
        opened = newest_instead(self._memory, tokens) or self._memory
        self.rival = Session(model, self.questions, self.seconds_per_frame, opened)
        return self.rival

    # --- Copies --------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """Another session with the same past and a future of its own."""
        state = jax.tree.map(lambda leaf: leaf.copy(), self.state)
        made = self.model, self.questions, self.seconds_per_frame, self._memory
        return Session(*made, state, self._known)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the session to one file (safetensors), which gets its name when it is complete.

        Raises:
          UserError: if it cannot be written.
        """
        about = {
            "model": self.model.fingerprint(),
            "questions": self.questions,
            "seconds_per_frame": self.seconds_per_frame,
            "seen": self.seen,
            "kept": self.kept,
            "known": to_dict(self.model.config.memory),
            "open": to_dict(self._memory),
        }
        session_file.write(path, about, self.state)


def resume(model: SessionModel, path: str | os.PathLike) -> Session:
    """A session that :meth:`Session.save` wrote, with the very same state.

    Args:
      model: with the parameters that it was saved with; which memories it has is in the file.
      path: of the file.

    Raises:
      UserError: for a file that is none or damaged, and for one of another model.
    """
    about, leaves = session_file.read(path)
    if about["model"] != model.fingerprint():
        raise UserError(
            f"the session {path} is of another model (fingerprint {about['model'][:12]}, not "
            f"{model.fingerprint()[:12]}); open the run or the checkpoint that it was saved with"
        )
    known, opened = (from_dict(about[name], MemoryConfig) for name in ("known", "open"))
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, memory=known))
    session = Session(model, about["questions"], about["seconds_per_frame"], opened)
    session.state = model.placed(session_file.with_leaves(session.state, leaves, path))
    return session


def push_together(sessions: Sequence[Session], frames: Sequence[np.ndarray], rows: int = 1) -> None:
    """One chunk of frames of each of several sessions, in one pass of the memories.

    The ViT reads each session's frames by themselves; the memories, whose steps are many and small,
    stand side by side as rows. There are always as many rows: one program serves any number of
    sessions, and what a session comes to know does not depend on those beside it.

    Args:
      sessions: of one model, with the same :attr:`Session.shape`.
      frames: of each uint8[n, size, size, 3], n from 1 to the model's ``chunk``.
      rows: at least as many as there are sessions.
    """
    first = sessions[0]
    model, models = first.model, first._models
    places = 1 if all(len(each) == 1 for each in frames) else model.chunk
    valid = np.zeros((rows, places), bool)
    features, states = [], [session.state for session in sessions]
    for row, pictures in enumerate(frames):
        padded = np.zeros((1, places, *pictures.shape[1:]), np.uint8)
        padded[0, : len(pictures)] = pictures
        valid[row, : len(pictures)] = True
        features.append(steps.encoder(model.config)(models.open, model.params, padded))
    known = [session._known for session in sessions]
    empty = rows - len(sessions)
    if rows == 1:
        for each in filter(None, (first, first.rival)):
            own = each._known, each._generic
            after = session_steps.push(
                each._models, model.params, each.state, features[0], valid, *own
            )
            each.state = model.placed(after)
        return
    # Rows that nobody needs are the first session's once more, without a frame.
    states += [states[0]] * empty
    features += [features[0]] * empty
    known += [known[0]] * empty
    after = session_steps.push_rows(
        models,
        model.params,
        tuple(states),
        tuple(features),
        valid,
        None if known[0] is None else tuple(known),
        first._generic,
    )
    for session, state in zip(sessions, after, strict=False):
        session.state = model.placed(state)
