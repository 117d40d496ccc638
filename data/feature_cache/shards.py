"""Shards of a feature cache: runs of clips in array_record files, one record a clip.

A record is the number n of frames (uint32), then, for int8 alone, the scales float32[n, P], then
the features [n, P, V]; everything little-endian, padding left out. int8 has one scale a token: the
largest absolute value in it is 127.

Shard s of S holds clips ``s·N/S`` to ``(s+1)·N/S``, then one more record: the shard's own figures
as JSON, with the key of the manifest that it belongs to. A shard gets its name when it is complete,
so one that is there is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path

DTYPES = ("bfloat16", "float32", "int8")
_COUNT = np.dtype("<u4")
_SCALE = np.dtype("<f4")


def record_bytes(shape: Sequence[int], dtype: str) -> int:
    """The size of a record of a clip without padding, bytes."""
    frames, tokens, width = shape
    scales = tokens * _SCALE.itemsize if dtype == "int8" else 0
    return _COUNT.itemsize + frames * (tokens * width * numpy_dtype(dtype).itemsize + scales)


def pack(features: np.ndarray, dtype: str) -> bytes:
    """A record.

    Args:
      features: [n, P, V], of the frames that are there.
      dtype: of :data:`DTYPES`.
    """
    count = np.array(len(features), _COUNT).tobytes()
    if dtype != "int8":
        return count + np.ascontiguousarray(features, numpy_dtype(dtype)).tobytes()
    wide = features.astype(np.float32)
    scales = np.abs(wide).max(-1).astype(_SCALE) / 127
    rounded = np.rint(wide / np.where(scales > 0, scales, 1)[..., None])
    return count + scales.tobytes() + rounded.astype(np.int8).tobytes()


def unpack(record: bytes, shape: Sequence[int], dtype: str, result: str) -> np.ndarray:
    """The features [n, P, V] of a record, n at most T, in dtype ``result``."""
    _, tokens, width = shape
    count = int(np.frombuffer(record, _COUNT, 1)[0])
    start, size = _COUNT.itemsize, (count, tokens, width)
    scales = None
    if dtype == "int8":
        scales = np.frombuffer(record, _SCALE, count * tokens, start).reshape(count, tokens, 1)
        start += scales.nbytes
    features = np.frombuffer(record, numpy_dtype(dtype), math.prod(size), start).reshape(size)
    if scales is not None:
        features = features * scales  # float32
    return features.astype(numpy_dtype(result), copy=False)


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
    """The clips of a shard."""
    bounds = shard_bounds(manifest)
    return range(bounds[shard], bounds[shard + 1])


def shard_bounds(manifest: dict[str, Any]) -> list[int]:
    """The first clip of every shard, and the number of clips."""
    clips, shards = manifest["source"]["clips"], manifest["shards"]
    return [shard * clips // shards for shard in range(shards + 1)]


def shard_path(directory: str | os.PathLike, manifest: dict[str, Any], shard: int) -> pathlib.Path:
    """Where a shard is, once it is complete."""
    name = f"features-{shard:05d}-of-{manifest['shards']:05d}.array_record"
    return pathlib.Path(directory) / name


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
    size = clips * record_bytes(manifest["shape"], manifest["dtype"])
    existing = pathlib.Path(directory)
    while not existing.exists():
        existing = existing.parent
    disk = os.statvfs(existing)
    if size > disk.f_bavail * disk.f_frsize:
        raise DataError(
            f"{directory}: no room for {size / 1e9:.1f} GB of features; choose a larger disk, or "
            "a smaller dtype"
        )


def write_shard(
    directory: str | os.PathLike,
    manifest: dict[str, Any],
    shard: int,
    features: Iterable[np.ndarray],
) -> None:
    """Writes a shard beside, then gives it its name.

    Args:
      directory: of the cache.
      manifest: of the cache.
      shard: which.
      features: [n, P, V] of each of its clips, as they were computed; without a frame for a video
        that cannot be read.

    Raises:
      DataError: if the disk is full or may not be written to.
    """
    path, dtype = shard_path(directory, manifest, shard), manifest["dtype"]
    beside = beside_path(path)
    figures: dict[str, Any] = {"key": manifest["key"], "frames": 0, "unreadable": 0}
    error, count = Error(), 0
    try:
        with _Writer(path, beside) as writer:
            for clip in features:
                record = pack(clip, dtype)
                writer.write(record)
                if clip.dtype != numpy_dtype(dtype):  # else it is kept as it is
                    error.add(unpack(record, manifest["shape"], dtype, clip.dtype.name), clip)
                figures["frames"] += len(clip)
                figures["unreadable"] += not len(clip)
                count += 1
            writer.write(json.dumps(figures | {"error": error.figures}).encode())
        if count != len(shard_clips(manifest, shard)):
            raise ValueError(f"shard {shard} was given {count} clips")
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class _Writer:
    """An array_record file; what the disk says against it becomes a ``DataError``."""

    def __init__(self, path: pathlib.Path, beside: pathlib.Path):
        self._path, self._beside = path, beside

    def __enter__(self) -> _Writer:
        options = "group_size:1,uncompressed"  # features hardly get smaller
        self._writer = self._checked(ArrayRecordWriter, os.fspath(self._beside), options)
        return self

    def write(self, record: bytes) -> None:
        self._checked(self._writer.write, record)

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self._checked(self._writer.close)
        else:
            with contextlib.suppress(RuntimeError):  # there is an error already
                self._writer.close()

    def _checked(self, do: Callable, *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except RuntimeError as error:
            raise DataError(
                f"{self._path} cannot be written ({str(error).split(';')[0]}): make room; the same "
                "command goes on with the shards that are missing"
            ) from None


def shard_figures(path: pathlib.Path, manifest: dict[str, Any], shard: int) -> dict[str, Any]:
    """The last record of a shard: ``frames``, ``unreadable``, ``error``.

    Raises:
      DataError: if it is damaged, or belongs to another cache.
    """
    try:
        records = ArrayRecordDataSource([os.fspath(path)])
        count = len(records) - 1
        figures = json.loads(records[count])
    except (RuntimeError, ValueError, IndexError) as error:
        raise damaged(path, error) from None
    if figures["key"] != manifest["key"] or count != len(shard_clips(manifest, shard)):
        raise DataError(f"{path} belongs to another cache; remove it and prepare it anew")
    return figures


def damaged(path: object, error: Exception) -> DataError:
    """What to tell people of a file that cannot be read."""
    reason = str(error).strip().split(";")[0] or type(error).__name__
    return DataError(f"{path} is damaged ({reason}); remove it and run adacm2 prepare again")


def numpy_dtype(dtype: str) -> np.dtype:
    """Of a name; numpy does not know bfloat16 by itself."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
