"""What callers want of a session, and what they get: made in any thread, done in the engine's."""

import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from adacm2_jax.errors import UserError
from adacm2_jax.inference.reply import Reply
from adacm2_jax.models.adacm2 import Question

#: Chunks of one session that are decoded ahead.
_AHEAD = 2


class CancelledError(UserError):
    """Whoever asked has gone."""


class Operation:
    """Something that a session is to do.

    Attributes:
      done: its result.
      cancelled: nobody waits for it any more.
      holds: its session stays on the device while this comes next.
    """

    holds = True

    def __init__(self) -> None:
        self.done: concurrent.futures.Future = concurrent.futures.Future()
        self.cancelled = False

    def finish(self, result: Any) -> None:
        """It is done."""
        if not self.done.done():
            self.done.set_result(result)

    def fail(self, error: BaseException) -> None:
        """It cannot be done."""
        if not self.done.done():
            self.done.set_exception(error)


class Act(Operation):
    """A function of the table and the session's entry."""

    def __init__(self, act: Callable[[Any, Any], Any]):
        super().__init__()
        self.act = act


class Push(Operation):
    """Frames that come chunk by chunk; its result is how many the session has seen.

    It takes its place in the order of its session before its frames are there. The thread that
    brings them calls :meth:`wait_for_turn`, then :meth:`put` for each chunk and :meth:`end` once;
    it waits there while the engine is behind. Until the first chunk the session may go to disk.
    """

    def __init__(self, wake: Callable[[], None]):
        super().__init__()
        self.chunks: queue.Queue = queue.Queue(_AHEAD)
        self.holds = False
        self._wake = wake
        self._turn = threading.Event()

    def come(self) -> None:
        """All that came before it is done; the engine's thread calls this."""
        self._turn.set()

    def wait_for_turn(self) -> None:
        """Returns when all that came before it is done, or it has failed.

        Raises:
          CancelledError: if nobody waits for it any more.
        """
        while not self._turn.wait(0.5) and not self.done.done():
            if self.cancelled:
                raise CancelledError("the request has been given up")

    def fail(self, error: BaseException) -> None:
        """It cannot be done."""
        super().fail(error)
        self._turn.set()

    def put(self, frames: np.ndarray) -> None:
        """Hands over uint8[n, size, size, 3].

        Raises:
          CancelledError: if nobody wants them.
        """
        self._put(frames)

    def end(self, error: BaseException | None = None) -> None:
        """No more frames come, perhaps because of an error."""
        try:
            self._put(error)
        except CancelledError:
            pass

    def _put(self, item: Any) -> None:
        self.holds = True
        while not self.done.done() and not self.cancelled:
            try:
                self.chunks.put(item, timeout=0.5)
            except queue.Full:
                continue
            self._wake()
            return
        raise CancelledError("the request has been given up")


@dataclasses.dataclass(frozen=True)
class Wish:
    """How an answer is to be written.

    Attributes:
      question: None for the first that is known.
      asked: the question from ``SessionModel.encode``: a long one takes time, the engine's.
      temperature, top_p, seed: of sampling; temperature 0 takes the most probable token.
      max_tokens: of the answer, its end included.
      stop: texts before which it ends.
      moments: how many of the remembered frames it names.
    """

    question: str | None = None
    asked: Question | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    moments: int = 5


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer as it was written.

    Attributes:
      reply: with its evidence.
      finish: ``stop``, or ``length`` where ``max_tokens`` ended it.
      prompt_tokens, completion_tokens: of the language model, visual tokens included.
    """

    reply: Reply
    finish: str
    prompt_tokens: int
    completion_tokens: int


class Ask(Operation):
    """A question; its result is a :class:`Said`. ``on_text`` is called with each new piece."""

    def __init__(self, wish: Wish, on_text: Callable[[str], None] = lambda _: None):
        super().__init__()
        self.wish, self.on_text = wish, on_text
        self.began = time.monotonic()
        self.first: float | None = None
