"""The one thread of a server that computes: frames of many sessions in one pass, answers together.

What callers want waits in the queue of its session, in order; a question is answered from what its
session had seen when its turn came. A turn of the engine does three small things: it begins an
answer if a row is free, it reads a chunk of frames of up to ``rows`` sessions, and it writes one
token of every answer (``answers.py``). What goes wrong in a turn ends what it was done for, and
never the engine.
"""

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from adacm2_jax.errors import UserError
from adacm2_jax.inference.session import Session, SessionModel, push_together
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.progress import compiling
from adacm2_jax.serving.answers import Answers
from adacm2_jax.serving.limits import BusyError, Limits, MissingError
from adacm2_jax.serving.operations import (
    Act,
    Ask,
    CancelledError,
    Operation,
    Push,
    Wish,
)
from adacm2_jax.serving.table import Entry, Table

_log = logging.getLogger(__name__)


class Engine:
    """Computes for all sessions; every other thread only submits and waits.

    Args:
      model: what the sessions share.
      limits: rows and queues.
      make_table: called in the engine's thread.
      watch: told of what happens: (name, value); see ``metrics.py``.

    Attributes:
      table: of the sessions.
      ready: done when it may be used.
      failed: what ended it, or None.
      unsaved: names of the sessions that could not be saved when it ended.
      on_end: called in its thread when it has ended by itself, and saved what can be saved.
    """

    def __init__(
        self,
        model: SessionModel,
        limits: Limits,
        make_table: Callable[[], Table],
        watch: Callable[[str, float], None] = lambda name, value: None,
    ):
        self._model, self._limits, self._watch = model, limits, watch
        self._make_table = make_table
        self._changed = threading.Condition()
        self._loose: list[tuple[str | Entry | None, Operation]] = []  # not yet with its session
        self._waiting, self._counting = 0, threading.Lock()
        self._stop = self._woken = False
        self._answers = Answers(model, limits.rows, watch)
        self._compiled: set[Any] = set()
        self.table: Any = None
        self.failed: BaseException | None = None
        self.unsaved: list[str] = []
        self.on_end: Callable[[], None] = lambda: None
        self.ready: concurrent.futures.Future = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return self._answers.longest

    def encode(self, questions: Sequence[str]) -> Question | None:
        """Questions as the networks read them; None for none. For the thread of who asks.

        Raises:
          UserError: for one that is too long.
        """
        return self._model.encode(questions) if questions else None

    def start(self) -> None:
        """Compiles what every request needs and takes over the sessions on disk.

        Raises:
          UserError: if that cannot be.
        """
        self._thread.start()
        self.ready.result()

    def stop(self) -> None:
        """Gives up what waits, saves every session, and ends."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it still computes."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Operations that are not done."""
        return self._waiting

    def wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            self._woken = True  # it may be in the middle of a turn
            self._changed.notify()

    def submit(self, target: str | Entry | None, operation: Operation) -> Operation:
        """Queues an operation.

        Args:
          target: a session by its name or its entry; None for the whole table.
          operation: what is to be done.

        Raises:
          BusyError: if too many wait. What is for an entry belongs to a request that was let in.
        """
        with self._changed:
            if self._stop:
                raise BusyError("the server is stopping")
            if not isinstance(target, Entry) and self._waiting >= self._limits.waiting:
                raise BusyError(f"{self._waiting} requests wait, which is the limit; try later")
            with self._counting:
                self._waiting += 1
            operation.done.add_done_callback(self._one_less)
            self._loose.append((target, operation))
            self._changed.notify()
        return operation

    def _one_less(self, _: Any) -> None:
        with self._counting:  # whatever thread it is done in
            self._waiting -= 1

    # --- The thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self.table = self._make_table()
            self._warm_up()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            self._loop()
        except BaseException as error:
            self.failed = error
            _log.exception("the engine has ended")
        with self._changed:
            self._stop = True
        try:
            self._end()
        except BaseException as error:
            self.failed = self.failed or error
            _log.exception("the engine could not save its sessions")
        if self.failed is not None:
            self.on_end()

    def _loop(self) -> None:
        tidied = time.monotonic()
        while True:
            with self._changed:
                if self._stop:
                    return
                loose, self._loose, self._woken = self._loose, [], False
            self._sort(loose)
            try:
                busy = self._turn()
            except Exception as error:
                _log.exception("a turn of the engine failed")
                self._give_up(error)
                busy = True
            if (now := time.monotonic()) - tidied > 1:
                tidied = now
                try:
                    self.table.tidy(now)
                except Exception:
                    _log.exception("sessions could not be saved")
            with self._changed:
                if not (busy or self._loose or self._woken or self._stop):
                    self._changed.wait(0.5)

    def _end(self) -> None:
        gone = BusyError("the server is stopping")
        for entry in self.table:
            for operation in entry.operations:
                operation.fail(gone)
        for _, operation in self._loose:
            operation.fail(gone)
        self._answers.fail(gone)
        self.unsaved = self.table.save_all()

    def _give_up(self, error: Exception) -> None:
        """Ends what a turn may have been about, so that the next one is about something else."""
        for entry in self.table:
            if entry.operations:
                entry.operations.popleft().fail(error)
        self._answers.fail(error)
        self._answers.clear()

    def _sort(self, loose: list[tuple[str | Entry | None, Operation]]) -> None:
        """Operations go to their sessions; those of the whole table are done at once."""
        for target, operation in loose:
            try:
                if target is None:
                    self._act(operation, None)
                    continue
                entry = self.table.get(target) if isinstance(target, str) else target
                if entry.closed:
                    raise MissingError("the session was closed")
                entry.operations.append(operation)
            except Exception as error:
                operation.fail(error)

    def _turn(self) -> bool:
        """Does something, if there is something to do."""
        heads = [entry for entry in self.table if entry.operations]
        heads.sort(key=lambda entry: entry.used)
        busy = False
        for entry in heads:
            busy |= self._short(entry)
        busy |= self._push([entry for entry in heads if entry.operations])
        busy |= self._answers.write()
        return busy

    def _short(self, entry: Entry) -> bool:
        """Operations at the head of a session that need no turn of their own."""
        busy = False
        while entry.operations:
            head = entry.operations[0]
            if head.cancelled:
                head.fail(CancelledError("the request has been given up"))
            elif isinstance(head, Act):
                self._act(head, entry)
            elif isinstance(head, Ask):
                if self._answers.full or not self._begin(entry, head):
                    break
            else:
                break
            entry.operations.popleft()
            busy = True
            while entry.closed and entry.operations:
                entry.operations.popleft().fail(MissingError("the session was closed"))
        return busy

    def _act(self, operation: Any, entry: Any) -> None:
        try:
            result = operation.act(self.table, entry)
        except Exception as error:
            operation.fail(error)
        else:
            operation.finish(result)

    # --- Frames --------------------------------------------------------------------------------

    def _push(self, entries: list[Entry]) -> bool:
        """One chunk of as many sessions as go together, those that wait longest first."""
        together: list[tuple[Entry, Push, np.ndarray]] = []
        busy, kind = False, None
        for entry in entries:
            head = entry.operations[0]
            if not isinstance(head, Push):
                continue
            head.come()
            if head.chunks.empty():
                continue
            frames = head.chunks.queue[0]
            if frames is None or isinstance(frames, BaseException):
                entry.operations.popleft()
                if frames is None:
                    head.finish(entry.seen)
                else:
                    head.fail(frames)
                busy = True
                continue
            mine = (entry.shape, len(frames) == 1)
            if together and (mine != kind or len(together) == self._limits.rows):
                continue
            try:
                session = self.table.bring_back(entry)
            except BusyError:
                continue  # its turn comes when others are done
            except Exception as error:
                entry.operations.popleft()
                head.fail(error)
                continue
            mine = (session.shape, len(frames) == 1)
            if together and mine != kind:  # of a file that had not been looked at
                continue
            kind = mine
            together.append((entry, head, head.chunks.get()))
        if together:
            self._push_together(together)
        return busy or bool(together)

    def _push_together(self, together: list[tuple[Entry, Push, np.ndarray]]) -> None:
        began = time.monotonic()
        sessions = [self.table.bring_back(entry) for entry, _, _ in together]
        before = [session.state for session in sessions]
        frames = [frames for _, _, frames in together]
        try:
            with self._compiling(sessions[0], all(len(each) == 1 for each in frames)):
                push_together(sessions, frames, self._limits.rows)
                jax.block_until_ready([session.state for session in sessions])
        except Exception as error:
            _log.exception("frames could not be read")
            for (entry, operation, _), session, state in zip(
                together, sessions, before, strict=True
            ):
                entry.operations.popleft()
                operation.fail(error)
                session.state = state  # as if the chunk had not come
                if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                    self._lose(entry)
            return
        now = time.monotonic()
        for entry, _, chunk in together:
            entry.seen += len(chunk)
            entry.used = now
            if entry.changed is None and entry.id:
                entry.changed = now
        count = sum(map(len, frames))
        self._watch("frames", count)
        self._watch("frame_seconds", (now - began) / count)
        self._watch("rows", len(together))

    def _lose(self, entry: Entry) -> None:
        """The state of a session is gone: what is not on disk is forgotten."""
        self.table.lose(entry)
        while entry.closed and entry.operations:
            entry.operations.popleft().fail(MissingError("the session was lost; open another"))

    @contextlib.contextmanager
    def _compiling(self, session: Session, single: bool) -> Iterator[None]:
        """Says so where the frames of a session are the first of their form."""
        form = (session.shape, single)
        count, width, models = session.shape
        text = f"for {count} known question{'' if count == 1 else 's'}"
        text += f" of up to {width} tokens" if count else ""
        tokens = models.open.config.memory.capacity
        with compiling(f"{text}, {tokens} open tokens", form not in self._compiled):
            yield
        self._compiled.add(form)

    # --- Answers -------------------------------------------------------------------------------

    def _begin(self, entry: Entry, ask: Ask) -> bool:
        """Begins an answer in a free row; false if there is no room yet."""
        wish = ask.wish
        try:
            session = self.table.bring_back(entry)
            question, asked = wish.question, wish.asked
            if question is None:
                if not entry.questions:
                    raise UserError("the session knows no question; ask one")
                question = entry.questions[0]
            self._answers.begin(session, session.look(question, asked), ask)
        except BusyError:
            return False
        except Exception as error:
            ask.fail(error)
        return True

    def _warm_up(self) -> None:
        """Compiles and computes before the first request what all of them need."""
        self._model.fingerprint()
        entry = self.table.open(["what is seen?"], 1.0, single=True)
        size = self._model.config.vision.image_size
        try:
            for count in {1, self._model.chunk}:
                frames = np.zeros((count, size, size, 3), np.uint8)
                push_together([entry.session], [frames], self._limits.rows)
                self._compiled.add((entry.shape, count == 1))
            for question in (None, "what else?"):
                self._begin(entry, Ask(Wish(question, max_tokens=2)))
                self._answers.write()
        finally:
            self._answers.clear()
            self.table.close(entry)
            self.table.most = self.table.on_device
