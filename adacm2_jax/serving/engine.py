"""The one thread of a server that computes: frames of many sessions in one pass, answers together.

What callers want waits in the queue of its session, in order; a question is answered from what its
session had seen when its turn came. A turn of the engine does three small things: it begins an
answer if a row is free, it reads a chunk of frames of up to ``rows`` sessions, and it writes one
token of every answer.
"""

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adacm2_jax.errors import UserError
from adacm2_jax.inference import continuous, steps
from adacm2_jax.inference.answerer import Answer
from adacm2_jax.inference.reply import Reply
from adacm2_jax.inference.session import Look, Session, SessionModel, push_together
from adacm2_jax.serving.limits import BusyError, Limits, MissingError
from adacm2_jax.serving.operations import (
    Act,
    Ask,
    CancelledError,
    Operation,
    Push,
    Said,
    Wish,
)
from adacm2_jax.serving.table import Entry, Table

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Writing:
    """An answer in a row of the table."""

    ask: Ask
    session: Session
    look: Look
    reply: Reply
    prompt_tokens: int
    ids: list[int] = dataclasses.field(default_factory=list)
    said: str = ""


class Engine:
    """Computes for all sessions; every other thread only submits and waits.

    Args:
      model: what the sessions share.
      limits: rows and queues.
      make_table: called in the engine's thread.
      watch: told of what happens: (name, value); see ``metrics.py``.
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
        self._writer = steps.any_policy(model.config)
        self._options = dataclasses.replace(
            model.generation,
            num_beams=1,
            num_return=1,
            temperature=0.0,
            top_p=1.0,
            eos_ids=(model.processor.eos_id,),
            pad_id=model.processor.pad_id,
        )
        self._width = model.config.max_text_len
        self._changed = threading.Condition()
        self._loose: list[tuple[str | Entry | None, Operation]] = []  # not yet with its session
        self._waiting, self._counting = 0, threading.Lock()
        self._stop = self._woken = False
        self._writing: list[_Writing | None] = [None] * limits.rows
        self.table: Any = None
        self._rows: Any = None
        self.ready: concurrent.futures.Future = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return self._options.max_new_tokens

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
        except BaseException:
            _log.exception("the engine has ended")
            raise
        finally:
            with self._changed:
                self._stop = True
            self._end()

    def _loop(self) -> None:
        tidied = time.monotonic()
        while True:
            with self._changed:
                if self._stop:
                    return
                loose, self._loose, self._woken = self._loose, [], False
            self._sort(loose)
            busy = self._turn()
            if (now := time.monotonic()) - tidied > 1:
                tidied = now
                self._tidy(now)
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
        for writing in self._writing:
            if writing:
                writing.ask.fail(gone)
        try:
            self.table.save_all()
        except UserError as error:
            _log.warning("%s", error)

    def _tidy(self, now: float) -> None:
        try:
            self.table.tidy(now)
        except UserError as error:  # a full disk: what is on the device stays there
            _log.warning("%s", error)

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
        busy |= self._write()
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
                if None not in self._writing:
                    break
                if not self._begin(entry, head):
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
            if not isinstance(head, Push) or head.chunks.empty():
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
        frames = [frames for _, _, frames in together]
        try:
            push_together(sessions, frames, self._limits.rows)
            jax.block_until_ready(sessions[0].state)
        except Exception as error:
            _log.exception("frames could not be read")
            for entry, operation, _ in together:
                entry.operations.popleft()
                operation.fail(error)
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

    # --- Answers -------------------------------------------------------------------------------

    def _begin(self, entry: Entry, ask: Ask) -> bool:
        """Reads a prompt into a free row; false if there is no room yet."""
        wish = ask.wish
        try:
            session = self.table.bring_back(entry)
            question = wish.question
            if question is None:
                if not entry.questions:
                    raise UserError("the session knows no question; ask one")
                question = entry.questions[0]
            look = session.look(question)
            # What it rests on is told now: the stream goes on.
            reply = session.reply(look, [Answer("", 0.0)], wish.moments)
            row, written = continuous.begin(
                self._writer,
                self._model.params,
                look.queries,
                look.asked,
                wish.temperature,
                wish.top_p,
                jax.random.key(wish.seed),
                self._width,
                self._options,
            )
        except BusyError:
            return False
        except Exception as error:
            ask.fail(error)
            return True
        place = self._writing.index(None)
        self._rows = continuous.put(self._rows, place, row)
        prompt = self._model.config.qformer.num_queries + int(np.sum(look.asked.llm_mask))
        self._writing[place] = _Writing(ask, session, look, reply, prompt)
        self._take(place, int(written.token), bool(written.ended), float(written.score))
        return True

    def _write(self) -> bool:
        """One more token of every answer."""
        if not any(self._writing):
            return False
        try:
            self._rows, written = continuous.advance(
                self._writer, self._model.params, self._rows, self._options
            )
            token, ended, score = jax.device_get((written.token, written.ended, written.score))
        except Exception as error:
            _log.exception("answers could not be written")
            for place, writing in enumerate(self._writing):
                if writing:
                    writing.ask.fail(error)
                    self._writing[place] = None
            self._rows = self._empty_rows()
            return True
        for place, writing in enumerate(self._writing):
            if writing:
                self._take(place, int(token[place]), bool(ended[place]), float(score[place]))
        return True

    def _take(self, place: int, token: int, ended: bool, score: float) -> None:
        """A row has a new token."""
        writing = self._writing[place]
        assert writing is not None
        ask, wish = writing.ask, writing.ask.wish
        if ask.first is None:
            ask.first = time.monotonic()
            self._watch("first_token_seconds", ask.first - ask.began)
        if ask.cancelled:
            self._writing[place] = None
            ask.fail(CancelledError("the request has been given up"))
            return
        writing.ids.append(token)
        self._watch("tokens", 1)
        finish = ""
        if token == self._model.processor.eos_id:
            finish = "stop"
        elif ended or len(writing.ids) >= wish.max_tokens:
            finish = "length"
        text = self._model.processor.decode(np.array(writing.ids))
        cut = min((at for stop in wish.stop if (at := text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            text, finish = text[:cut].rstrip(), "stop"
        # Half a character, or what may yet be the beginning of a stop, is not said.
        held = "" if finish else text
        if finish or not (text.endswith("�") or any(_overlaps(held, stop) for stop in wish.stop)):
            if text.startswith(writing.said) and len(text) > len(writing.said):
                ask.on_text(text[len(writing.said) :])
                writing.said = text
        if finish:
            self._writing[place] = None
            answer = Answer(text, score)
            reply = dataclasses.replace(writing.reply, answer=text, score=score, n_best=(answer,))
            ask.finish(Said(reply, finish, writing.prompt_tokens, len(writing.ids)))

    def _warm_up(self) -> None:
        """Compiles and computes before the first request what all of them need."""
        self._model.fingerprint()
        self._rows = self._empty_rows()
        entry = self.table.open(["what is seen?"], 1.0, single=True)
        size = self._model.config.vision.image_size
        try:
            for count in {1, self._model.chunk}:
                frames = np.zeros((count, size, size, 3), np.uint8)
                push_together([entry.session], [frames], self._limits.rows)
            for question in (None, "what else?"):
                self._begin(entry, Ask(Wish(question, max_tokens=2)))
                self._write()
        finally:
            self._writing = [None] * self._limits.rows
            self.table.close(entry)
            self.table.most = self.table.on_device

    def _empty_rows(self) -> continuous.Row:
        return continuous.empty(self._writer, self._limits.rows, self._width, self._options)


def _overlaps(text: str, stop: str) -> bool:
    """Whether the end of a text may be the beginning of another."""
    return any(text.endswith(stop[:count]) for count in range(1, len(stop)))
