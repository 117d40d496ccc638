"""What the page shows, as values: a stream that is asked about while it is read.

Nothing here knows of the page. One :class:`Desk` has the model and lets one stream at a time
compute; each visitor has a :class:`Live` of constant size, on the device and on the host.
"""

import collections
import dataclasses
import os
import statistics
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from adacm2_jax.errors import UserError
from adacm2_jax.inference.model import VideoModel
from adacm2_jax.inference.panels import Picture, Shown, encode_picture
from adacm2_jax.inference.reply import Reply
from adacm2_jax.inference.session import Session
from adacm2_jax.inference.session_view import first_token, kept_frames, kept_patches
from adacm2_jax.inference.study import Line, keep_all
from adacm2_jax.video.sampling import Sampling

#: The longest question, characters. A browser is told, too, but what comes may be no browser's.
MOST_TEXT = 500
#: Frames of a session whose times count for the time of a frame.
_RECENT = 32


@dataclasses.dataclass(frozen=True)
class View:
    """What is known at one moment.

    Attributes:
      frames: read so far.
      seen, kept, bound: tokens of all frames; held by all memories of this stream, in the layer
        that holds most; and the most that these can ever hold.
      size: bytes of all that the stream is known by; it never changes.
      keep_all: bytes of a memory that keeps every token.
      frame_ms: milliseconds a frame, the median of the last ones; None before the first.
      first_token_ms: milliseconds from the last question to the first token of its answer; None
        where it was not measured yet.
      shown: the memory that the last answer came from, or will come from.
      reply: the last answer.
      beside: what a memory of as many tokens that are the newest answers.
    """

    frames: int
    seen: int
    kept: int
    bound: int
    size: int
    keep_all: Line
    frame_ms: float | None
    first_token_ms: float | None
    shown: Shown
    reply: Reply | None
    beside: Reply | None


class Desk:
    """One model for all visitors; their calls come one after the other.

    Args:
      model: that answers.
      seconds_per_frame: between two frames that are read of a video, or taken by a webcam.
    """

    def __init__(self, model: VideoModel, seconds_per_frame: float = 1.0):
        self.model, self.seconds_per_frame = model, seconds_per_frame
        self.lock = threading.Lock()

    def prepare(self) -> None:
        """Reads the parameters and compiles, so that no visitor waits for it."""
        for questions in ((), ("what is shown?",)):
            live = Live(self)
            live.begin(*questions)
            size = live.size
            live.push(np.zeros((1, size, size, 3), np.uint8))
            live.ask(questions[0] if questions else "what is it?")
            live.measure()


class Live:
    """A visitor's stream.

    Args:
      desk: of the page.

    Attributes:
      source: where its frames come from, ``video`` or ``webcam``; empty before it begins.
    """

    def __init__(self, desk: Desk):
        self._desk, self.source = desk, ""
        self._session: Session | None = None

    @property
    def known(self) -> tuple[str, ...]:
        """The questions that have a memory of their own."""
        return self._session.questions if self._session else ()

    @property
    def pictures(self) -> dict[int, Picture]:
        """Those that are held: of the frames that are still remembered, and of the newest."""
        return self._pictures

    @property
    def size(self) -> int:
        """Side of the frames that the model reads, pixels."""
        return self._opened.model.config.vision.image_size

    def begin(self, question: str = "", source: str = "video") -> None:
        """Forgets everything and starts a new stream.

        Args:
          question: that gets a memory of its own, which its attention chooses; empty for none.
          source: where its frames will come from.

        Raises:
          UserError: for a question that is too long.
        """
        _check_length(question)
        with self._desk.lock:
            session = self._desk.model.session(
                [question] if question.strip() else [],
                seconds_per_frame=self._desk.seconds_per_frame,
            )
            self._rival = session.begin_rival()
            self._session, self.source = session, source
            self._pictures: dict[int, Picture] = {}
            self._times: collections.deque[float] = collections.deque(maxlen=_RECENT)
            self._asked = question if question.strip() else ""
            self._reply: Reply | None = None
            self._beside: Reply | None = None
            self._first_token: float | None = None

    def push(self, frames: np.ndarray, of: Session | None = None) -> bool:
        """Reads frames.

        Args:
          frames: uint8[T, height, width, 3], RGB.
          of: the stream that they are of; by default the present one.

        Returns:
          Whether they were read; they are not if another stream has begun.
        """
        with self._desk.lock:
            session, first = self._opened, self._opened.seen
            if of is not None and of is not session:
                return False
            begun = time.perf_counter()
            session.push(frames)
            jax.block_until_ready((session.state, self._rival.state))
            self._times.append((time.perf_counter() - begun) / len(frames))
            kept = kept_frames(session)
            found = self._pictures | {
                first + number: encode_picture(frame)
                for number, frame in enumerate(frames)
                if first + number in kept
            }
            self._pictures = {t: picture for t, picture in found.items() if t in kept}
            return True

    def read(self, path: str | os.PathLike) -> Iterator[int]:
        """Reads a video file, chunk by chunk; between two chunks questions may be asked.

        Yields:
          The frames that the video will have, after every chunk.

        Raises:
          DataError: if the video cannot be read to its end.
        """
        from adacm2_jax.video.frames import read_pictures

        session = self._opened
        sampling = Sampling("fps", fps=1 / session.seconds_per_frame)
        times, pictures = read_pictures(path, sampling)
        chunk: list[np.ndarray] = []
        for number, picture in enumerate(pictures, 1):
            if chunk and chunk[0].shape != picture.shape:
                self.push(np.stack(chunk), session)
                chunk = []
            chunk.append(picture)
            if len(chunk) == session.model.chunk or number == len(times):
                if not self.push(np.stack(chunk), session):
                    return  # another stream was started meanwhile
                chunk = []
                yield len(times)

    def ask(self, question: str) -> Reply:
        """Answers now, beside the newest tokens; a question known before from its own memory.

        Raises:
          UserError: for a question that is empty or too long, or if there has been no frame.
        """
        if not question.strip():
            raise UserError("the question is empty; write one")
        _check_length(question)
        with self._desk.lock:
            self._reply = self._opened.ask(question)
            self._beside = self._rival.ask(question)
            self._asked, self._first_token = question, None
            return self._reply

    def measure(self) -> None:
        """Measures the time to the first token of the last answer."""
        with self._desk.lock:
            if self._reply:
                self._first_token = 1e3 * first_token(self._opened, self._asked)

    def view(self) -> View:
        """What is known now."""
        with self._desk.lock:
            session, config = self._opened, self._opened.model.config
            side = config.vision.image_size // config.vision.patch_size
            each = self._desk.seconds_per_frame
            return View(
                frames=session.seen,
                seen=session.seen * config.vision.tokens_per_frame,
                kept=session.kept,
                bound=session.bound,
                size=session.size,
                keep_all=keep_all(config),
                frame_ms=1e3 * statistics.median(self._times) if self._times else None,
                first_token_ms=self._first_token,
                shown=Shown(
                    kept=kept_patches(session, self._asked),
                    seen=session.seen,
                    time_of=lambda t: t * each,
                    grid=(side, side),
                    pictures=self._pictures,
                    newest=session.seen - 1,
                ),
                reply=self._reply,
                beside=self._beside,
            )

    @property
    def _opened(self) -> Session:
        if self._session is None:
            raise UserError("there is no stream yet; start a video or the webcam first")
        return self._session


def _check_length(question: str) -> None:
    if len(question) > MOST_TEXT:
        raise UserError(
            f"the question has {len(question):,} characters, the limit is {MOST_TEXT}; ask a "
            "shorter one"
        )
