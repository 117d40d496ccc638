"""The processes that decode for a server; see ``decoder_process.py``."""

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.serving.limits import BusyError, Limits

#: Jobs after which a process gives way to a fresh one: what a library leaks has an end.
_JOBS = 200
#: Seconds after which one looks again whether anybody waits.
_LOOK = 0.5


@dataclasses.dataclass(frozen=True)
class Media:
    """What is to be decoded.

    Attributes:
      kind: ``video``, one file; or ``pictures``, a frame each.
      paths: of the files.
      name: as the caller knows it, for messages.
      fps: frames a second, of a video.
      start, end: seconds, of a video.
    """

    kind: str
    paths: tuple[str, ...]
    name: str
    fps: float = 1.0
    start: float | None = None
    end: float | None = None


class Decoders:
    """A few processes, each of which decodes one file at a time.

    Args:
      limits: how many, and what each may have.
      size: side of the frames, pixels.
      chunk: frames that come together.
      resize: how they are made square.
      on_truncated: of a file that is cut short: ``error`` or ``use``.
    """

    def __init__(self, limits: Limits, size: int, chunk: int, resize: str, on_truncated: str):
        self._limits = limits
        self._size = size
        self._job = {
            "size": size,
            "chunk": chunk,
            "resize": resize,
            "on_truncated": on_truncated,
            "pixels": limits.pixels,
            "frames": limits.frames,
        }
        self._free = threading.BoundedSemaphore(limits.decoders)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._closed = False

    @contextlib.contextmanager
    def decode(
        self, media: Media, patience: float = 600.0, gone: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, Any]]:
        """How many frames there are, and an iterator over chunks of them, uint8[n, size, size, 3].

        Waits for a process that is free; what has been begun may be left at any time.

        Args:
          media: what to decode.
          patience: seconds to wait for a process.
          gone: whether nobody waits any more.

        Raises:
          BusyError: if none became free.
          DataError: for what cannot be decoded within the limits; also from the iterator.
        """
        deadline = time.monotonic() + patience
        while not self._free.acquire(timeout=min(patience, _LOOK)):
            if gone() or time.monotonic() >= deadline:
                raise BusyError("all decoders are busy; try again later")
        process = None
        try:
            process = self._take()
            job = self._job | {name: getattr(media, name) for name in _FIELDS}
            job["paths"] = list(media.paths)
            chunks = process.serve(job, media.name, self._limits.decoder_seconds)
            total = next(chunks)
            yield total, self._shaped(chunks)
        finally:
            if process is not None:
                self._give_back(process)
            self._free.release()

    def close(self) -> None:
        """Ends all processes, also those that are decoding."""
        with self._lock:
            self._closed = True
            processes = list(self._all)
        for process in processes:
            process.end()

    def _shaped(self, chunks: Iterator[Any]) -> Iterator[np.ndarray]:
        size = self._size
        for content in chunks:
            yield np.frombuffer(content, np.uint8).reshape(-1, size, size, 3)

    def _take(self) -> "_Process":
        with self._lock:
            if self._closed:
                raise BusyError("the server is stopping")
            if self._idle:
                return self._idle.pop()
        process = _Process(self._limits.decoder_bytes)
        with self._lock:
            self._all.add(process)
        return process

    def _give_back(self, process: "_Process") -> None:
        with self._lock:
            if process.usable and process.jobs < _JOBS and not self._closed:
                self._idle.append(process)
                return
            self._all.discard(process)
        process.end()


_FIELDS = ("kind", "name", "fps", "start", "end")


class _Process:
    """One decoder.

    Attributes:
      jobs: it has had.
      usable: it waits for another.
    """

    def __init__(self, memory: int):
        self.jobs, self.usable = 0, True
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.decoder_process", str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the server's
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout.fileno()
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._out, selectors.EVENT_READ)
        self._buffer = bytearray()

    def serve(self, job: dict[str, Any], name: str, seconds: float) -> Iterator[Any]:
        """The number of frames, then the bytes of chunk after chunk.

        Raises:
          DataError: as the process says, or if it ends or takes too long.
        """
        self.jobs += 1
        self.usable = False  # until the job has come to its end
        self._left, self._seconds, self._name = seconds, seconds, name
        header, _ = self._exchange(json.dumps(job).encode())
        yield header["total"]
        while True:
            header, content = self._exchange(b"")
            if "end" in header:
                self.usable = True
                return
            yield content

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self.usable = False
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._ready.close()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    def _exchange(self, line: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            self._in.write(line + b"\n")
            self._in.flush()
            header = json.loads(self._read_until_newline())
            content = self._read(header["bytes"])
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{self._name}: the process that decoded it has ended, most likely for want of "
                "memory: give a smaller video, or one in H.264"
            ) from None
        if "error" in header:
            self.usable = True
            raise DataError(header["error"])
        return header, content

    def _read_until_newline(self) -> bytes:
        while (place := self._buffer.find(b"\n")) < 0:
            self._fill()
        line = bytes(self._buffer[:place])
        del self._buffer[: place + 1]
        return line

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        content = bytes(self._buffer[:count])
        del self._buffer[:count]
        return content

    def _fill(self) -> None:
        began = time.monotonic()
        if not self._ready.select(max(self._left, 0)):
            self.end()
            raise DataError(
                f"{self._name}: decoding takes more than {self._seconds:g} s: give a shorter "
                "part of it, or convert it to H.264"
            )
        got = os.read(self._out, 1 << 20)
        self._left -= time.monotonic() - began
        if not got:
            raise EOFError
        self._buffer += got
