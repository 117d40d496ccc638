"""Shards of a feature cache: the frames of some videos, each once, and which of them a clip has.

A shard is the frames, back to back, ``[P, V]`` each; for int8 ``[P, V + 4]``: a token's last four
bytes are its scale, a float32, with which its largest absolute value is 127. Then comes the index::

    uint64[N]         the sum of each frame's bytes, see frame_sum
    uint32[clips]     where each clip's frames end in the next list
    uint32[…]         numbers of the frames of each clip in turn
    JSON              the shard's figures, with its number and the key of its manifest
    48 bytes          SHA-256 of all that; the length of the JSON, uint64; a mark

All numbers are little-endian. So a clip is read straight to where it is wanted, and what is read is
compared with its sum. A shard gets its name when it is complete, so one that is there is whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path

DTYPES = ("bfloat16", "float32", "int8")
#: Bytes of a token's scale, behind its numbers.
SCALE = 4
_MARK = b"adacm2f2"
_TRAILER = struct.Struct("<32sQ8s")


def kept_shape(shape: Sequence[int], dtype: str) -> tuple[int, ...]:
    """The shape in which features [..., P, V] are kept."""
    return (*shape[:-1], shape[-1] + (SCALE if dtype == "int8" else 0))


def frame_bytes(shape: Sequence[int], dtype: str) -> int:
    """The size of a frame, bytes; ``shape`` is T, P, V."""
    return math.prod(kept_shape(shape[1:], dtype)) * numpy_dtype(dtype).itemsize


def pack(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features [..., P, V] as they are kept, see :func:`kept_shape`."""
    if dtype != "int8":
        return np.ascontiguousarray(features, numpy_dtype(dtype))
    wide = features.astype(np.float32)
    scales = np.abs(wide).max(-1, keepdims=True).astype("<f4") / np.float32(127)
    rounded = np.rint(wide / np.where(scales > 0, scales, 1)).astype(np.int8)
    return np.concatenate([rounded, scales.astype("<f4").view(np.int8)], -1)


def unpack(kept: np.ndarray, result: str) -> np.ndarray:
    """Features [..., P, V] in dtype ``result`` of what is kept; a training step does the same."""
    if kept.dtype == np.int8:
        scales = np.ascontiguousarray(kept[..., -SCALE:]).view("<f4")
        kept = kept[..., :-SCALE] * scales  # float32
    return kept.astype(numpy_dtype(result), copy=False)


def frame_sum(frame: np.ndarray) -> int:
    """What tells a damaged frame: its bytes as 64-bit words, filled up with zeros, added up.

    It is as fast as memory. A changed word never passes, noise in place of a frame once in 2^64.

    Args:
      frame: uint8[n], contiguous.
    """
    whole = len(frame) // 8 * 8
    total = int(np.add.reduce(frame[:whole].view(np.uint64), dtype=np.uint64))
    return (total + int.from_bytes(frame[whole:].tobytes(), "little")) % 2**64


class Error:
    """How far features are from what was computed, over many clips."""

    def __init__(self) -> None:
        self._figures = {"squares": 0.0, "of": 0.0, "largest": 0.0}

    def add(self, kept: np.ndarray, computed: np.ndarray) -> None:
        """Counts in a clip [n, P, V]."""
        if kept.size:
            exact = computed.astype(np.float32)
            error = np.abs(kept.astype(np.float32) - exact)
            share = error.max(-1) / np.maximum(np.abs(exact).max(-1), np.finfo(np.float32).tiny)
            squares = np.square(error, dtype=np.float64).sum(), np.square(exact, dtype=np.float64)
            self.merge(
                {"squares": squares[0], "of": squares[1].sum(), "largest": float(share.max())}
            )

    def merge(self, other: dict[str, float]) -> None:
        """Counts in the figures of others."""
        mine = self._figures
        for name in ("squares", "of"):
            mine[name] += float(other[name])
        mine["largest"] = max(mine["largest"], float(other["largest"]))

    @property
    def figures(self) -> dict[str, float]:
        """What :meth:`merge` takes."""
        return dict(self._figures)

    def report(self) -> dict[str, float]:
        """``rms``: the error's root mean square over that of the features. ``largest``: the largest
        error of an element, in parts of the largest absolute value in its token."""
        of = self._figures["of"]
        rms = math.sqrt(self._figures["squares"] / of) if of else 0.0
        return {"rms": rms, "largest": self._figures["largest"]}


def shard_clips(manifest: dict[str, Any], shard: int) -> range:
    """The clips of a shard, by their place in the cache."""
    return range(manifest["bounds"][shard], manifest["bounds"][shard + 1])


def shard_path(directory: str | os.PathLike, manifest: dict[str, Any], shard: int) -> pathlib.Path:
    """Where a shard is, once it is complete."""
    return pathlib.Path(directory) / f"features-{shard:05d}-of-{manifest['shards']:05d}.frames"


def missing_shards(directory: str | os.PathLike, manifest: dict[str, Any]) -> list[int]:
    """The shards that are still to be written."""
    shards = range(manifest["shards"])
    return [s for s in shards if not shard_path(directory, manifest, s).exists()]


def check_room(directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Whether the missing shards fit the disk, if no clip is shorter than the longest.

    Raises:
      DataError: if not.
    """
    clips = sum(len(shard_clips(manifest, s)) for s in missing_shards(directory, manifest))
    shape = manifest["shape"]
    size = clips * shape[0] * frame_bytes(shape, manifest["dtype"])
    existing = pathlib.Path(directory)
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    if size > disk.f_bavail * disk.f_frsize:
        raise DataError(
            f"{directory}: no room for {size / 1e9:.1f} GB of features; choose a larger disk, or "
            "a smaller dtype"
        )


@dataclasses.dataclass
class Windows:
    """Clips that are windows of one video, so that they share frames.

    Attributes:
      parts: the features [n, P, V] of the video's frames, in order; used up once.
      clips: asked after that: the numbers of the frames of each clip, in ``parts``.
    """

    parts: Iterator[np.ndarray]
    clips: Callable[[], list[np.ndarray]]


def write_shard(
    directory: str | os.PathLike,
    manifest: dict[str, Any],
    shard: int,
    features: Iterable[np.ndarray | Windows],
) -> None:
    """Writes a shard beside, then gives it its name.

    Args:
      directory: of the cache.
      manifest: of the cache.
      shard: which.
      features: [n, P, V] of each of its clips, as they were computed; without a frame for a video
        that cannot be read. Clips that share frames are given together.

    Raises:
      DataError: if the disk is full or may not be written to.
    """
    path = shard_path(directory, manifest, shard)
    beside = beside_path(path)
    try:
        with open(beside, "wb", buffering=0) as file:
            writer = _Writer(file, manifest["dtype"])
            for given in features:
                if isinstance(given, Windows):
                    first = writer.frames
                    for part in given.parts:
                        writer.add(part)
                    writer.clips += [first + numbers for numbers in given.clips()]
                else:
                    writer.clips.append(writer.add(given))
            if len(writer.clips) != len(shard_clips(manifest, shard)):
                raise ValueError(f"shard {shard} was given {len(writer.clips)} clips")
            writer.finish(manifest["key"], shard)
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}): make room; the same command goes on "
            "with the shards that are missing"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


class _Writer:
    """Writes a shard's frames and then its index."""

    def __init__(self, file: Any, dtype: str):
        self._file, self._dtype = file, dtype
        self._sums: list[int] = []
        self._error = Error()
        self.clips: list[np.ndarray] = []

    @property
    def frames(self) -> int:
        return len(self._sums)

    def add(self, features: np.ndarray) -> np.ndarray:
        """Writes frames [n, P, V]; returns their numbers."""
        kept = pack(features, self._dtype)
        for frame in kept:
            piece = frame.reshape(-1).view(np.uint8)
            self._sums.append(frame_sum(piece))
            self._write(piece)
        if features.dtype != numpy_dtype(self._dtype):  # else it is kept as it is
            self._error.add(unpack(kept, features.dtype.name), features)
        return np.arange(self.frames - len(features), self.frames)

    def finish(self, key: str, shard: int) -> None:
        """Writes the index."""
        figures = {
            "key": key,
            "shard": shard,
            "stored": self.frames,
            "clips": len(self.clips),
            "frames": sum(map(len, self.clips)),
            "unreadable": sum(not len(numbers) for numbers in self.clips),
            "error": self._error.figures,
        }
        numbers = np.concatenate([np.zeros(0, "<u4"), *self.clips])
        ends = np.cumsum([len(clip) for clip in self.clips])
        text = json.dumps(figures).encode()
        index = np.array(self._sums, "<u8").tobytes()
        index += ends.astype("<u4").tobytes() + numbers.astype("<u4").tobytes() + text
        trailer = _TRAILER.pack(hashlib.sha256(index).digest(), len(text), _MARK)
        self._write(np.frombuffer(index + trailer, np.uint8))

    def _write(self, piece: np.ndarray) -> None:
        left = memoryview(piece)
        while left:
            left = left[self._file.write(left) :]


@dataclasses.dataclass(frozen=True)
class Index:
    """What a shard has.

    Attributes:
      figures: ``frames`` of all clips, ``stored`` frames, ``unreadable`` clips, ``error`` …
      sums: uint64[N].
      ends: uint32[clips].
      numbers: uint32[…], of the clips' frames.
    """

    figures: dict[str, Any]
    sums: np.ndarray
    ends: np.ndarray
    numbers: np.ndarray

    def clip(self, place: int) -> np.ndarray:
        """Numbers of the frames of a clip."""
        return self.numbers[self.ends[place - 1] if place else 0 : self.ends[place]]


def read_index(path: pathlib.Path, manifest: dict[str, Any], shard: int) -> Index:
    """The index of a shard.

    Raises:
      DataError: if it is damaged, or belongs to another cache.
    """
    frame = frame_bytes(manifest["shape"], manifest["dtype"])
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _TRAILER.size:
                raise ValueError(f"it has {size} bytes")
            file.seek(max(0, size - _TRAILER.size))
            digest, length, mark = _TRAILER.unpack(file.read())
            if mark != _MARK:
                raise ValueError("it does not end as a shard does")
            file.seek(size - _TRAILER.size - length)
            figures = json.loads(file.read(length))
            counts = figures["stored"], figures["clips"], figures["frames"]
            start = size - _TRAILER.size - length - np.dot(counts, (8, 4, 4))
            file.seek(start)
            index = file.read(size - _TRAILER.size - start)
    except OSError as error:
        raise damaged(path, error.strerror or "it cannot be read") from None
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise damaged(path, str(error)) from None
    if hashlib.sha256(index).digest() != digest:
        raise damaged(path, "its index has changed")
    if figures.get("shard", shard) != shard:
        raise damaged(path, f"it is shard {figures['shard']} of the cache")
    if figures["key"] != manifest["key"] or counts[1] != len(shard_clips(manifest, shard)):
        raise DataError(f"{path} belongs to another cache; remove it and prepare it anew")
    if start != counts[0] * frame:
        raise damaged(path, f"it has {start} bytes of frames, not {counts[0] * frame}")
    ends = np.cumsum((0, 8 * counts[0], 4 * counts[1], 4 * counts[2]))
    parts = [index[a:b] for a, b in itertools.pairwise(ends)]
    types = ("<u8", "<u4", "<u4")
    sums, stops, numbers = (np.frombuffer(p, t) for p, t in zip(parts, types, strict=True))
    return Index(figures, sums, stops, numbers)


def damaged(path: object, reason: str) -> DataError:
    """What to tell people of a file that cannot be read."""
    return DataError(f"{path} is damaged ({reason}); remove it and run adacm2 prepare again")


def numpy_dtype(dtype: str) -> np.dtype:
    """Of a name; numpy does not know bfloat16 by itself."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
