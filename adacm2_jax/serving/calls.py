"""What one request does: from its media to the answer. Each runs in a thread of its own."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from adacm2_jax.errors import UserError, check_text, printable
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.serving.decoders import Decoders, Media
from adacm2_jax.serving.engine import Engine
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.operations import Act, Ask, CancelledError, Operation, Push, Said, Wish
from adacm2_jax.serving.table import Entry

#: Characters of a question; tokens are counted later, and that takes time.
_LONGEST = 1 << 14


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
        known = self.engine.encode([question])
        entry: Entry | None = None
        try:
            for each in media:
                # A decoder first, then room on the device: whoever has room never waits for one.
                with self.decoders.decode(each, gone=lambda: call.gone) as (_, chunks):
                    if entry is None:
                        entry = self._open_single(call, question, known, seconds_per_frame)
                    push = self._queued(call, entry)
                    _hand_over(push, chunks)
                    push.done.result()
            assert entry is not None
            return call.wait(self.engine.submit(entry, Ask(wish, on_text)))
        finally:
            if entry is not None:
                with contextlib.suppress(UserError):  # a server that stops forgets it, too
                    self.engine.submit(entry, Act(lambda table, entry: table.close(entry)))

    def open(
        self, call: Call, questions: Sequence[str], seconds_per_frame: float, tokens: int
    ) -> dict[str, Any]:
        """A new session, as callers see it; see ``Table.open``.

        Raises:
          UserError: for a question that is too long, or too large a memory.
        """
        known = self.engine.encode([check_question(each) for each in questions])
        return self.on_table(
            call,
            lambda table, _: table.open(
                questions, seconds_per_frame, tokens, known=known
            ).describe(),
        )

    def push(self, call: Call, session: str, media: Media) -> int:
        """Frames for a session; how many it has seen then.

        What is sent to the session later waits for them, from now on. A decoder is taken when all
        that came before is done: whoever has one never waits for who has none.

        Raises:
          UserError: for what cannot be read; the frames before are known.
        """
        push = self._queued(call, session)
        try:
            push.wait_for_turn()
            if not push.done.done():
                with self.decoders.decode(media, gone=lambda: call.gone) as (_, chunks):
                    _hand_over(push, chunks)
                    return push.done.result()
        except BaseException as error:
            push.end(error)
            if not push.done.done():
                raise
        return push.done.result()

    def ask(self, call: Call, session: str, wish: Wish, on_text: Callable[[str], None]) -> Said:
        """Asks a session."""
        if wish.question is not None:
            asked = self.engine.encode([check_question(wish.question)])
            wish = dataclasses.replace(wish, asked=asked)
        return call.wait(self.engine.submit(session, Ask(wish, on_text)))

    def on_session(self, call: Call, session: str, act: Callable[[Any, Any], Any]) -> Any:
        """A function of the table and a session's entry, when its turn comes."""
        return call.wait(self.engine.submit(session, Act(act)))

    def on_table(self, call: Call, act: Callable[[Any, Any], Any]) -> Any:
        """A function of the table."""
        return call.wait(self.engine.submit(None, Act(act)))

    def _open_single(
        self, call: Call, question: str, known: Question | None, seconds_per_frame: float
    ) -> Entry:
        made = Act(
            lambda table, _: table.open([question], seconds_per_frame, single=True, known=known)
        )
        return call.wait(self.engine.submit(None, made))

    def _queued(self, call: Call, target: str | Entry) -> Push:
        push = Push(self.engine.wake)
        call.follow(push)
        self.engine.submit(target, push)
        return push


def _hand_over(push: Push, chunks: Any) -> None:
    """All frames, or the error that ended them."""
    try:
        for frames in chunks:
            push.put(frames)
    except CancelledError:
        pass  # of which the engine tells, too
    except BaseException as error:
        push.end(error)
    else:
        push.end()


def check_question(question: str | None) -> str:
    """A question that is a text.

    Raises:
      UserError: if it is empty, far too long, or no text at all.
    """
    if not (question or "").strip():
        raise UserError("the question is empty; ask one")
    assert question is not None
    if len(question) > _LONGEST:
        raise UserError(
            f"the question has {len(question):,} characters ({printable(question[:20])!r}…); "
            f"the limit is {_LONGEST:,}: ask a shorter one"
        )
    return check_text(question, "the question")
