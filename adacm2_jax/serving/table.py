"""The sessions of a server: which are on the device, within a budget of bytes, and which on disk.

A session that nobody uses goes to disk when another needs its room, and comes back when it is used
again, the same bit for bit. So the budget is hard, and a server that is killed still has what was
saved. All of this is called by one thread, the engine's.
"""

import collections
import dataclasses
import logging
import pathlib
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import jax

from adacm2_jax.errors import UserError
from adacm2_jax.files import check_writable, remove_abandoned
from adacm2_jax.inference import session_file, session_steps
from adacm2_jax.inference.session import Session, SessionModel, open_memory, resume
from adacm2_jax.serving.limits import BusyError, Limits, MissingError

_ID = re.compile(r"s-[A-Za-z0-9_-]{16}")
_SUFFIX = ".session"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Entry:
    """One session of the table.

    Attributes:
      id: by which callers name it; "" for that of a single request, which is never saved.
      size: bytes of its state.
      questions, seconds_per_frame: of the session.
      session: while it is on the device, else None.
      seen, kept, bound: frames; tokens; see ``Session``.
      saved: frames that the file on disk knows, −1 without a file.
      used: time.monotonic() of the last use.
      changed: that of the first change that is not saved, or None.
      closed: it is forgotten; what still waits for it is in vain.
      shape: ``Session.shape``; None of a file that has not been read.
      operations: that wait for it, in order; the engine's.
    """

    id: str
    size: int
    questions: tuple[str, ...]
    seconds_per_frame: float
    session: Session | None = None
    seen: int = 0
    kept: int = 0
    bound: int = 0
    saved: int = -1
    used: float = 0.0
    changed: float | None = None
    closed: bool = False
    shape: tuple | None = None
    operations: collections.deque = dataclasses.field(default_factory=collections.deque)

    def describe(self) -> dict[str, Any]:
        """As callers see it."""
        if self.session is not None:
            self.kept, self.bound = self.session.kept, self.session.bound
        return {
            "id": self.id,
            "object": "session",
            "questions": list(self.questions),
            "seconds_per_frame": self.seconds_per_frame,
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
    ) -> Entry:
        """A new session, on the device.

        Args:
          questions, seconds_per_frame: as for ``VideoModel.session``.
          tokens: of the open memory; by default those of two frames.
          single: it serves one request and is never saved.

        Raises:
          BusyError: if there is no room, and none can be made.
          UserError: for a question that is too long, or a budget that no session fits.
        """
        if not single and len(self._entries) >= self._limits.sessions:
            raise BusyError(
                f"{len(self._entries)} sessions are open, which is the limit; close one"
            )
        memory = open_memory(tokens or 2 * self._model.config.vision.tokens_per_frame)
        size = _size(self._model, memory, len(questions))
        self.make_room(size)
        session = Session(self._model, questions, seconds_per_frame, memory)
        return self._add(session, size, single)

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
        made = self._add(session.fork(), entry.size, single=False)
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
            entry.size = entry.session.size  # the file is a little larger
            entry.shape = entry.session.shape
            self._count(entry.size)
            self.resumed += 1
        return entry.session

    def save(self, entry: Entry) -> None:
        """Writes what a session knows, if that has changed."""
        if entry.session is None or not entry.id:
            return
        if entry.changed is None:
            return
        entry.session.save(self._path(entry))
        entry.saved, entry.changed = entry.seen, None

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
        """Forgets a session, also on disk."""
        entry.closed = True
        if entry.session is not None:
            entry.session = None
            self._count(-entry.size)
        self._single.discard(entry)
        if entry.id and entry.id in self._entries:
            del self._entries[entry.id]
            self._path(entry).unlink(missing_ok=True)

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
                if entry.session is not None and not entry.operations and entry is not keep
            ),
            key=lambda entry: entry.used,
        )
        for entry in idle:
            if self.on_device + size <= budget:
                break
            self.put_away(entry)
        if self.on_device + size > budget:
            raise BusyError(
                f"the server's budget of {budget:,} bytes is in use by {self.on_device:,} bytes of "
                "sessions that are being read or asked; try again later"
            )

    def tidy(self, now: float) -> None:
        """Saves what has changed long ago, and puts away what nobody has used for long."""
        for entry in self.named():
            if entry.changed is not None and now - entry.changed > self._limits.save_seconds:
                self.save(entry)
            idle = entry.session is not None and not entry.operations
            if idle and now - entry.used > self._limits.idle_seconds:
                self.put_away(entry)

    def save_all(self) -> None:
        """Writes every session that has changed."""
        for entry in self.named():
            self.save(entry)

    def _add(self, session: Session, size: int, single: bool) -> Entry:
        entry = Entry(
            id="" if single else f"s-{secrets.token_urlsafe(12)}",
            size=size,
            questions=session.questions,
            seconds_per_frame=session.seconds_per_frame,
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
            seen = int(about["seen"])
            entry = Entry(
                id=name,
                size=path.stat().st_size,  # until it is on the device
                questions=tuple(about["questions"]),
                seconds_per_frame=float(about["seconds_per_frame"]),
                seen=seen,
                kept=int(about["kept"]),
                saved=seen,
                used=time.monotonic(),
            )
        except (UserError, OSError, KeyError, TypeError, ValueError) as error:
            _log.warning("%s is left as it is: %s", path, error)
            return
        self._entries[name] = entry

    def _path(self, entry: Entry) -> pathlib.Path:
        assert _ID.fullmatch(entry.id)
        return self._directory / f"{entry.id}{_SUFFIX}"

    def _count(self, size: int) -> None:
        self.on_device += size
        self.most = max(self.most, self.on_device)


def _size(model: SessionModel, memory: Any, questions: int) -> int:
    """Bytes of a session's state; nothing is made."""
    models = model.models(memory)
    shapes = jax.eval_shape(lambda: session_steps.begin(models, 1, questions))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
