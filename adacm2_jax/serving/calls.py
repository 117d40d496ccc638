"""What one request does: from its media to the answer. Each runs in a thread of its own."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from adacm2_jax.errors import UserError, check_text
from adacm2_jax.serving.decoders import Decoders, Media
from adacm2_jax.serving.engine import Engine
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.operations import Act, Ask, CancelledError, Operation, Push, Said, Wish
from adacm2_jax.serving.table import Entry


class Call:
    """A request that is being served; :meth:`leave` ends it when whoever sent it has gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gone = False
        self._current: Operation | None = None

    def leave(self) -> None:
        """Nobody waits any more: what is under way ends soon."""
        with self._lock:
            self._gone = True
            if self._current is not None:
                self._current.cancelled = True

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more."""
        return self._gone

    def wait(self, operation: Operation) -> Any:
        """Its result.

        Raises:
          CancelledError: if whoever asked has gone.
        """
        self.follow(operation)
        return operation.done.result()

    def follow(self, operation: Operation) -> None:
        """From now on this is what :meth:`leave` ends."""
        with self._lock:
            self._current = operation
            operation.cancelled |= self._gone


@dataclasses.dataclass(frozen=True)
class Service:
    """What requests are served with.

    Attributes:
      engine, decoders, limits: of the server.
    """

    engine: Engine
    decoders: Decoders
    limits: Limits

    def answer(
        self,
        call: Call,
        media: Sequence[Media],
        wish: Wish,
        seconds_per_frame: float,
        on_text: Callable[[str], None],
    ) -> Said:
        """Answers a question about media, by a session that lasts as long as the request.

        Raises:
          UserError: for what cannot be read or asked.
        """
        question = check_question(wish.question)
        entry: Entry | None = None
        try:
            for each in media:
                # A decoder first, then room on the device: whoever has room never waits for one.
                with self.decoders.decode(each, gone=lambda: call.gone) as (_, chunks):
                    if entry is None:
                        entry = self._open_single(call, question, seconds_per_frame)
                    self._push(call, entry, chunks)
            assert entry is not None
            return call.wait(self.engine.submit(entry, Ask(wish, on_text)))
        finally:
            if entry is not None:
                with contextlib.suppress(UserError):  # a server that stops forgets it, too
                    self.engine.submit(entry, Act(lambda table, entry: table.close(entry)))

    def push(self, call: Call, session: str, media: Media) -> int:
        """Frames for a session; how many it has seen then.

        Raises:
          UserError: for what cannot be read; the frames before are known.
        """
        self.on_session(call, session, lambda table, entry: None)  # before a decoder is taken
        with self.decoders.decode(media, gone=lambda: call.gone) as (_, chunks):
            return self._push(call, session, chunks)

    def ask(self, call: Call, session: str, wish: Wish, on_text: Callable[[str], None]) -> Said:
        """Asks a session."""
        if wish.question is not None:
            check_question(wish.question)
        return call.wait(self.engine.submit(session, Ask(wish, on_text)))

    def on_session(self, call: Call, session: str, act: Callable[[Any, Any], Any]) -> Any:
        """A function of the table and a session's entry, when its turn comes."""
        return call.wait(self.engine.submit(session, Act(act)))

    def on_table(self, call: Call, act: Callable[[Any, Any], Any]) -> Any:
        """A function of the table."""
        return call.wait(self.engine.submit(None, Act(act)))

    def _open_single(self, call: Call, question: str, seconds_per_frame: float) -> Entry:
        made = Act(lambda table, _: table.open([question], seconds_per_frame, single=True))
        return call.wait(self.engine.submit(None, made))

    def _push(self, call: Call, target: str | Entry, chunks: Any) -> int:
        push = Push(self.engine.wake)
        call.follow(push)
        self.engine.submit(target, push)
        try:
            for frames in chunks:
                push.put(frames)
        except CancelledError:
            pass  # of which the engine tells, too
        except BaseException as error:
            push.end(error)
        else:
            push.end()
        return push.done.result()


def check_question(question: str | None) -> str:
    """A question that is a text.

    Raises:
      UserError: if it is empty, or no text at all.
    """
    if not (question or "").strip():
        raise UserError("the question is empty; ask one")
    assert question is not None
    return check_text(question, "the question")
