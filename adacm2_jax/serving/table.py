"""The sessions of a server: which are on the device, within a budget of bytes, and which on disk.

A session that nobody uses goes to disk when another needs its room, and comes back when it is used
again, the same bit for bit. So the budget is hard, and a server that is killed still has what was
saved. All of this is called by one thread, the engine's.
"""

import collections
import dataclasses
import logging
import math
import pathlib
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

# Now: a server that has no free descriptor left could not import it to save its sessions.
import safetensors.flax  # noqa: F401

from adacm2_jax.config import MemoryConfig, from_dict
from adacm2_jax.errors import UserError, causes, reason
from adacm2_jax.files import check_writable, remove_abandoned
from adacm2_jax.inference import session_file
from adacm2_jax.inference.session import Session, SessionModel, open_memory, resume
from adacm2_jax.inference.session_steps import SessionModels
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.serving import sizes
from adacm2_jax.serving.limits import BusyError, Limits, MissingError, StorageError

_ID = re.compile(r"s-[A-Za-z0-9_-]{16}")
_SUFFIX = ".session"
#: Seconds after which a session that could not be saved is tried again.
_AGAIN = 30.0
_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Entry:
    """One session of the table.

    Attributes:
      id: by which callers name it; "" for that of a single request, which is never saved.
      size: bytes of its state.
      questions, seconds_per_frame: of the session.
      open_tokens: of its open memory.
      session: while it is on the device, else None.
      seen, kept, bound: frames; tokens; see ``Session``.
      saved: frames that the file on disk knows, −1 without a file.
      used: time.monotonic() of the last use.
      changed: that of the first change that is not saved, or None.
      again: that before which it is not saved again, because it could not be.
      closed: it is forgotten; what still waits for it is in vain.
      shape: ``Session.shape``; None of a file that has not been read.
      operations: that wait for it, in order; the engine's.
    """

    id: str
    size: int
    questions: tuple[str, ...]
    seconds_per_frame: float
    open_tokens: int = 0
    session: Session | None = None
    seen: int = 0
    kept: int = 0
    bound: int = 0
    saved: int = -1
    used: float = 0.0
    changed: float | None = None
    again: float = 0.0
    closed: bool = False
    shape: tuple | None = None
    operations: collections.deque = dataclasses.field(default_factory=collections.deque)

    @property
    def in_use(self) -> bool:
        """Whether somebody needs it on the device now."""
        return bool(self.operations) and self.operations[0].holds

    def describe(self) -> dict[str, Any]:
        """As callers see it."""
        if self.session is not None:
            self.kept, self.bound = self.session.kept, self.session.bound
        return {
            "id": self.id,
            "object": "session",
            "questions": list(self.questions),
            "seconds_per_frame": self.seconds_per_frame,
            "open_tokens": self.open_tokens,
            "seen": self.seen,
            "saved": max(self.saved, 0),
            "kept": self.kept,
            "bound": self.bound,
            "bytes": self.size,
            "on_device": self.session is not None,
        }


class Table:
    """All sessions of one model.

    Args:
      model: what they share.
      limits: the budget and the counts.
      directory: where sessions are saved; those that are there are taken over.

    Attributes:
      on_device: bytes of the states that are on the device.
      most: the largest value that it has had.
      evicted, resumed: how often a session went to disk for want of room or use, and came back.
    """

    def __init__(self, model: SessionModel, limits: Limits, directory: pathlib.Path):
        self._model, self._limits, self._directory = model, limits, directory
        self._entries: dict[str, Entry] = {}
        self._single: set[Entry] = set()
        self.on_device = self.most = self.evicted = self.resumed = 0
        check_writable(directory, f"sessions go to {directory}")
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_abandoned(directory)
        for path in sorted(directory.glob(f"*{_SUFFIX}")):
            self._take_over(path)

    def __iter__(self):
        return iter([*self._entries.values(), *self._single])

    def __len__(self) -> int:
        return len(self._entries)

    def named(self) -> list[Entry]:
        """The sessions that callers know, oldest first."""
        return list(self._entries.values())

    def get(self, name: str) -> Entry:
        """The session of that name.

        Raises:
          MissingError: if there is none.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise MissingError("there is no such session; open one with POST /v1/sessions")
        return entry

    def open(
        self,
        questions: Sequence[str],
        seconds_per_frame: float,
        tokens: int = 0,
        single: bool = False,
        known: Question | None = None,
    ) -> Entry:
        """A new session, on the device.

        Args:
          questions, seconds_per_frame: as for ``VideoModel.session``.
          tokens: of the open memory, see ``sizes.rounded``; by default those of two frames.
          single: it serves one request and is never saved.
          known: the questions from ``SessionModel.encode``, where somebody has them.

        Raises:
          BusyError: if there is no room, and none can be made.
          UserError: for a question that is too long, or a budget that no session fits.
        """
        if not single and len(self._entries) >= self._limits.sessions:
            raise BusyError(
                f"{len(self._entries)} sessions are open, which is the limit; close one"
            )
        tokens = sizes.rounded(tokens, 2 * self._model.config.vision.tokens_per_frame)
        memory = open_memory(tokens)
        models = self._model.models(memory)
        self._check_pass(models, len(questions), tokens)
        size = sizes.state_bytes(models, len(questions))
        self.make_room(size)
        session = Session(self._model, questions, seconds_per_frame, memory, known=known)
        return self._add(session, size, tokens, single)

    def fork(self, entry: Entry) -> Entry:
        """Another session with the same past.

        Raises:
          BusyError: if there is no room.
        """
        if len(self._entries) >= self._limits.sessions:
            raise BusyError(
                f"{len(self._entries)} sessions are open, which is the limit; close one"
            )
        session = self.bring_back(entry)
        self.make_room(entry.size, keep=entry)
        made = self._add(session.fork(), entry.size, entry.open_tokens, single=False)
        made.seen = entry.seen
        return made

    def bring_back(self, entry: Entry) -> Session:
        """The session, on the device.

        Raises:
          BusyError: if there is no room.
          UserError: if its file is damaged.
        """
        entry.used = time.monotonic()
        if entry.session is None:
            self.make_room(entry.size)
            entry.session = resume(self._model, self._path(entry))
            entry.shape = entry.session.shape
            self._count(entry.size)
            self.resumed += 1
        return entry.session

    def save(self, entry: Entry) -> None:
        """Writes what a session knows, if that has changed.

        Raises:
          StorageError: if it cannot be written.
        """
        if entry.session is None or not entry.id:
            return
        if entry.changed is None:
            return
        try:
            entry.session.save(self._path(entry))
        except (UserError, OSError) as error:  # which name a path that is of no use to callers
            told = [each.strerror for each in causes(error) if isinstance(each, OSError)]
            raise StorageError(
                f"the session cannot be saved ({told[-1] if told else 'its place is taken'}): "
                "there must be room in the server's --state directory, and leave to write there"
            ) from None
        entry.saved, entry.changed, entry.again = entry.seen, None, 0.0

    def put_away(self, entry: Entry) -> None:
        """Saves a session and takes it off the device."""
        if entry.session is None:
            return
        self.save(entry)
        entry.kept, entry.bound = entry.session.kept, entry.session.bound
        entry.session = None
        self._count(-entry.size)
        self.evicted += 1

    def close(self, entry: Entry) -> None:
        """Forgets a session, also on disk.

        Raises:
          StorageError: if its file cannot be removed; the session is still there then.
        """
        if entry.id in self._entries:
            try:
                self._path(entry).unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(
                    f"the session's file cannot be removed ({error.strerror}), so the session is "
                    "kept; the server's --state directory must be put right"
                ) from None
        self._forget(entry)

    def lose(self, entry: Entry) -> None:
        """What a session knew on the device is lost: it goes back to its file, or is forgotten."""
        if entry.saved < 0 or not entry.id:
            self._forget(entry)
        elif entry.session is not None:
            entry.session, entry.changed = None, None
            entry.seen = entry.saved
            self._count(-entry.size)

    def _forget(self, entry: Entry) -> None:
        entry.closed = True
        if entry.session is not None:
            entry.session = None
            self._count(-entry.size)
        self._single.discard(entry)
        self._entries.pop(entry.id, None)

    def make_room(self, size: int, keep: Entry | None = None) -> None:
        """Takes sessions that nobody waits for off the device until so many bytes are free.

        Args:
          size: bytes.
          keep: a session that stays.

        Raises:
          UserError: if the whole budget is smaller.
          BusyError: if all others are in use.
        """
        budget = self._limits.session_bytes
        if size > budget:
            raise UserError(
                f"a session takes {size:,} bytes, and the server's budget is {budget:,}: ask for "
                "fewer questions or open_tokens, or start it with more --session-bytes"
            )
        idle = sorted(
            (
                entry
                for entry in self._entries.values()
                if entry.session is not None and not entry.in_use and entry is not keep
            ),
            key=lambda entry: entry.used,
        )
        stuck = 0
        for entry in idle:
            if self.on_device + size <= budget:
                break
            stuck += not self._carefully(self.put_away, entry)
        if self.on_device + size > budget:
            raise BusyError(
                f"the server's budget of {budget:,} bytes is in use by {self.on_device:,} bytes of "
                "sessions that are being read or asked; try again later"
                + (f" ({stuck} more cannot be saved, see the server's log)" if stuck else "")
            )

    def tidy(self, now: float) -> None:
        """Saves what has changed long ago, and puts away what nobody has used for long.

        One that cannot be saved stays where it is, and is tried again later.
        """
        for entry in self.named():
            if entry.changed is not None and now - entry.changed > self._limits.save_seconds:
                self._carefully(self.save, entry)
            idle = entry.session is not None and not entry.in_use
            if idle and now - entry.used > self._limits.idle_seconds:
                self._carefully(self.put_away, entry)

    def save_all(self) -> list[str]:
        """Writes every session that has changed; the names of those that could not be saved."""
        for entry in self.named():
            entry.again = 0.0
        return [entry.id for entry in self.named() if not self._carefully(self.save, entry)]

    def _carefully(self, act: Callable[[Entry], None], entry: Entry) -> bool:
        """Saves or puts away one session, whatever is wrong with it; whether that was done."""
        now = time.monotonic()
        if entry.changed is not None and now < entry.again:
            return False
        try:
            act(entry)
        except Exception as error:
            entry.again = time.monotonic() + _AGAIN
            _log.warning("session %s is not saved: %s", entry.id, reason(error, 300))
            return False
        return True

    def _check_pass(self, models: SessionModels, questions: int, tokens: int) -> None:
        """Refuses a session whose frames could not be read.

        Raises:
          UserError: if one pass needs more than the budget.
        """
        rows, budget = self._limits.rows, self._limits.session_bytes
        if (need := sizes.pass_bytes(models, questions, rows)) > budget:
            most = sizes.most_tokens(self._model, rows, budget)
            raise UserError(
                f"open_tokens is {tokens:,}: to read frames into {rows} such memories (--rows) "
                f"takes {need:,} bytes, and the server's budget is {budget:,}; ask for at most "
                f"{most:,}, or start it with more --session-bytes"
            )

    def _add(self, session: Session, size: int, tokens: int, single: bool) -> Entry:
        entry = Entry(
            id="" if single else f"s-{secrets.token_urlsafe(12)}",
            size=size,
            questions=session.questions,
            seconds_per_frame=session.seconds_per_frame,
            open_tokens=tokens,
            session=session,
            bound=session.bound,
            shape=session.shape,
            used=time.monotonic(),
            changed=None if single else time.monotonic(),
        )
        if single:
            self._single.add(entry)
        else:
            self._entries[entry.id] = entry
        self._count(size)
        return entry

    def _take_over(self, path: pathlib.Path) -> None:
        """A session that an earlier server saved."""
        name = path.name.removesuffix(_SUFFIX)
        if not _ID.fullmatch(name):
            return
        try:
            about = session_file.read_about(path)
            if about["model"] != self._model.fingerprint():
                raise UserError("it is of another model")
            entry = self._of_file(name, about)
        except Exception as error:  # whatever a file may hold, the server starts
            _log.warning("%s is left as it is: %s", path, reason(error, 300))
            return
        self._entries[name] = entry

    def _of_file(self, name: str, about: dict[str, Any]) -> Entry:
        """What a file says of its session. Raises whatever comes of a file that is damaged."""
        seen, kept = int(about["seen"]), int(about["kept"])
        seconds = float(about["seconds_per_frame"])
        questions = tuple(about["questions"])
        if seen < 0 or not 0 < seconds < math.inf:
            raise UserError("it says what cannot be")
        if not all(isinstance(question, str) for question in questions):
            raise UserError("its questions are no texts")
        known, opened = (from_dict(about[part], MemoryConfig) for part in ("known", "open"))
        config = dataclasses.replace(self._model.config, memory=known)
        models = dataclasses.replace(self._model, config=config).models(opened)
        self._check_pass(models, len(questions), opened.capacity)
        return Entry(
            id=name,
            size=sizes.state_bytes(models, len(questions)),
            questions=questions,
            seconds_per_frame=seconds,
            open_tokens=opened.capacity,
            seen=seen,
            kept=kept,
            bound=sizes.bound(models, len(questions)),
            saved=seen,
            used=time.monotonic(),
        )

    def _path(self, entry: Entry) -> pathlib.Path:
        assert _ID.fullmatch(entry.id)
        return self._directory / f"{entry.id}{_SUFFIX}"

    def _count(self, size: int) -> None:
        self.on_device += size
        self.most = max(self.most, self.on_device)
