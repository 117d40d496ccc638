"""Clips of a feature cache, read from its shards straight into the batch that they are for.

A batch takes memory that was a batch before and that nobody holds any more, not even a device that
is being given it. So what a process needs are the batches that are on their way at once, and its
pages are there already: fresh ones cost more than reading into them.

Frames may be kept a second time on a disk of this machine, or in its memory, where the cache itself
is on slow storage: see :class:`Shard`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError
from data.feature_cache.shards import (
    Index,
    damaged,
    frame_bytes,
    frame_sum,
    kept_shape,
    numpy_dtype,
    read_index,
    shard_path,
)
from data.jsonl import Example

#: Threads that read the clips of a batch, over all batches of a process.
_MOST_THREADS = 8
#: What devices can take without another copy.
_ALIGNED = 64
#: Of a disk, what is left to others.
_LEFT_FREE = 0.05


class Buffers:
    """Memory for batches, used again when the last array in it is gone.

    Args:
      most: free pieces that are kept.
    """

    def __init__(self, most: int = 4):
        self._most, self._free, self._lock = most, [], threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            # One of another size was for batches that are no more.
            self._free = [piece for piece in self._free if len(piece) == size]
            piece = self._free.pop() if self._free else None
        if piece is None:
            piece = np.empty(size + _ALIGNED, np.uint8)
            start = -piece.ctypes.data % _ALIGNED
            piece = piece[start : start + size]
        return np.asarray(_Lease(self, piece)).view(dtype).reshape(shape)

    def give_back(self, piece: np.ndarray) -> None:
        with self._lock:
            if len(self._free) < self._most:
                self._free.append(piece)


class _Lease:
    """Numpy keeps it as long as there is an array in its memory."""

    def __init__(self, owner: Buffers, piece: np.ndarray):
        self._owner, self._piece = owner, piece
        self.__array_interface__ = piece.__array_interface__

    def __del__(self) -> None:
        self._owner.give_back(self._piece)


class Shard:
    """An open shard.

    With ``local``, a second file of the same layout has the frames that were read before, and holes
    in place of others. A frame's sum tells whether it is there: a hole is zeros. So nothing else is
    kept, any number of processes may fill the file, and one that is killed leaves no harm.

    Args:
      path: of the shard.
      index: of the shard.
      frame: bytes of a frame.
      local: a directory, or None.

    Raises:
      DataError: if nothing can be kept in that directory.
    """

    def __init__(self, path: pathlib.Path, index: Index, frame: int, local: pathlib.Path | None):
        self._path, self._index, self._frame, self._place = path, index, frame, local
        self._file = self._local = -1  # what __del__ finds if one cannot be opened
        self._file = os.open(path, os.O_RDONLY)
        if local is not None:
            try:
                local.mkdir(parents=True, exist_ok=True)
                self._local = os.open(local / path.name, os.O_RDWR | os.O_CREAT, 0o644)
                os.ftruncate(self._local, frame * len(index.sums))
            except OSError as error:
                raise DataError(
                    f"data.features_local: {local / path.name}: {error.strerror}; remove what is "
                    "in its way, or name another directory"
                ) from None

    def read(self, number: int, out: np.ndarray) -> None:
        """Reads a frame.

        Args:
          number: of the frame.
          out: uint8[frame bytes].

        Raises:
          DataError: if it is damaged.
        """
        place, expected = number * self._frame, int(self._index.sums[number])
        if self._local >= 0:
            # What cannot be read there is read where it comes from.
            with contextlib.suppress(OSError):
                if self._take(self._local, place, out) == expected:
                    return
        try:
            found = self._take(self._file, place, out)
        except OSError as error:
            raise damaged(self._path, error.strerror or "it cannot be read") from None
        if found != expected:
            raise damaged(self._path, f"frame {number} is not what was written")
        if self._local >= 0:
            self._keep(place, out)

    def _take(self, file: int, place: int, out: np.ndarray) -> int:
        """Reads what is there; returns its sum."""
        done = 0
        while done < len(out) and (got := os.preadv(file, [out[done:]], place + done)):
            done += got
        out[done:] = 0
        return frame_sum(out)

    def _keep(self, place: int, frame: np.ndarray) -> None:
        disk = os.fstatvfs(self._local)
        try:
            if disk.f_bavail > disk.f_blocks * _LEFT_FREE:
                os.pwrite(self._local, frame, place)
                return
            why = "the disk is nearly full"
        except OSError as error:
            why = error.strerror
        logging.warning("data.features_local %s: %s; no more is kept there", self._place, why)
        self._keep = lambda place, frame: None  # type: ignore[method-assign]

    def __del__(self) -> None:
        for file in (self._file, self._local):
            if file >= 0:
                with contextlib.suppress(OSError):
                    os.close(file)


@dataclasses.dataclass(frozen=True)
class StoredClip:
    """A clip that is still on disk.

    Attributes:
      clips: that it is one of.
      shard: its shard.
      numbers: of its frames there.
      shape, dtype: [T, P, V], or of int8 [T, P, V + 4], see shards.py.
    """

    clips: FeatureClips
    shard: int
    numbers: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, out: np.ndarray) -> None:
        """Reads it into an array of its shape and dtype; padding becomes zeros.

        Raises:
          DataError: if a frame is damaged.
        """
        shard = self.clips.shard(self.shard)
        for number, frame in zip(self.numbers, out, strict=False):
            shard.read(int(number), frame.reshape(-1).view(np.uint8))
        out[len(self.numbers) :] = 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return read_clips([self])[0].astype(dtype or self.dtype, copy=False)


class FeatureClips:
    """What ``LoadClip`` gives for every example, with a :class:`StoredClip` in place of pixels.

    Args:
      directory: of a complete cache.
      manifest: its own.
      source: of the examples.
      places: int64[examples], the place in the cache of each one's clip.
      local: a directory for frames that were read, see :class:`Shard`; or None.

    Raises:
      DataError: if a shard is damaged, or belongs to another cache.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        manifest: dict[str, Any],
        source: Sequence[Example],
        places: np.ndarray,
        local: str | os.PathLike | None = None,
    ):
        self._directory, self._manifest = pathlib.Path(directory), manifest
        self._source, self._places = source, places
        self._local = pathlib.Path(local) / manifest["key"] if local else None
        self._indices = [
            read_index(shard_path(directory, manifest, shard), manifest, shard)
            for shard in range(manifest["shards"])
        ]
        shape, dtype = manifest["shape"], manifest["dtype"]
        self._shape, self._dtype = kept_shape(shape, dtype), numpy_dtype(dtype)
        self._open()

    def _open(self) -> None:
        self._lock, self._shards, self.buffers = threading.Lock(), {}, Buffers()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, bounds = int(self._places[index]), self._manifest["bounds"]
        shard = int(np.searchsorted(bounds, place, side="right")) - 1
        numbers = self._indices[shard].clip(place - bounds[shard])
        example = self._source[index]
        return {
            "index": np.uint32(index),
            "frames": StoredClip(self, shard, numbers, self._shape, self._dtype),
            "valid": np.arange(self._shape[0]) < len(numbers),
            "question": example.question,
            "answer": example.answer or "",
        }

    def shard(self, number: int) -> Shard:
        """A shard, opened once a process."""
        with self._lock:
            if number not in self._shards:
                self._shards[number] = Shard(
                    shard_path(self._directory, self._manifest, number),
                    self._indices[number],
                    frame_bytes(self._manifest["shape"], self._manifest["dtype"]),
                    self._local,
                )
            return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_shards", "buffers")  # another process opens the files itself
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._open()

    def __repr__(self) -> str:
        return f"FeatureClips({self._directory})"


_threads: concurrent.futures.ThreadPoolExecutor | None = None


def read_clips(clips: Sequence[StoredClip]) -> np.ndarray:
    """Clips side by side, [B, …]; read by threads, as many at a time as there are cores.

    Raises:
      DataError: if one is damaged.
    """
    global _threads
    first = clips[0]
    out = first.clips.buffers.empty((len(clips), *first.shape), first.dtype)
    if len(clips) == 1:
        first.read(out[0])
        return out
    if _threads is None:
        count = min(_MOST_THREADS, os.cpu_count() or 1)
        _threads = concurrent.futures.ThreadPoolExecutor(count, "features")
    for _ in _threads.map(StoredClip.read, clips, out):
        pass
    return out
