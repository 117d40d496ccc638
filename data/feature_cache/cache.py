"""A cache of features: what a frozen ViT makes of a training set, computed once.

A cache is a directory::

    manifest.json                             what it was made from, and what is in it
    features-00003-of-00016.array_record      one shard, see shards.py

A *clip* is a video and the part of it that counts; examples that ask about the same clip share a
record. What is missing can be computed at any time, anywhere, by anybody (``adacm2 prepare``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path
from data.feature_cache.shards import (
    DTYPES,
    Error,
    damaged,
    missing_shards,
    record_bytes,
    shard_bounds,
    shard_figures,
    shard_path,
    unpack,
)
from data.jsonl import Example, JsonlSource
from data.pipeline import LoadClip

MANIFEST = "manifest.json"
#: Changes when the files of older versions cannot be read any more.
_FORMAT = 1
#: Bytes of a shard, about, unless their number is given.
_SHARD_BYTES = 1e9
_COMPARED = ("source", "load", "vision", "shape")


def clips_of(source: Sequence[Example]) -> tuple[list[int], np.ndarray]:
    """The distinct clips of a source.

    Returns:
      The example that each clip is first seen in, and the clip of every example, int64[examples].
      Videos that are given as bytes are taken to be different from each other.
    """
    if not isinstance(source, JsonlSource):
        return list(range(len(source))), np.arange(len(source))
    numbers: dict[tuple, int] = {}
    first, of = [], []
    for index, example in enumerate(source):
        clip = example.video, example.start, example.end
        if clip not in numbers:
            numbers[clip] = len(first)
            first.append(index)
        of.append(numbers[clip])
    return first, np.array(of)


def describe_source(source: Sequence[Example]) -> dict[str, Any]:
    """What a cache remembers of its source: the number of clips, and a hash of what they are.

    Of JSON lines the hash has each video's path beside the file, its size and time, and the part
    that counts; questions and answers may change, for features do not depend on them.
    """
    first, _ = clips_of(source)
    text = ""
    if isinstance(source, JsonlSource):
        beside = os.path.dirname(os.path.abspath(source.path))
        for index in first:
            example = source[index]
            video = os.path.abspath(str(example.video))
            stat = os.stat(video) if os.path.exists(video) else None
            file = (stat.st_size, stat.st_mtime_ns) if stat else ()
            text += f"{os.path.relpath(video, beside)} {file} {example.start} {example.end}\n"
    else:
        text = source.fingerprint()  # type: ignore[attr-defined]
    return {"clips": len(first), "files": hashlib.sha256(text.encode()).hexdigest()[:16]}


def make_manifest(
    source: Sequence[Example],
    load: LoadClip,
    vision: dict[str, Any],
    *,
    dtype: str,
    shards: int,
    shape: tuple[int, int, int],
    computed: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a cache that is to be made.

    Args:
      source: of the clips.
      load: how they are read; ``jitter`` cannot be cached.
      vision: what the features depend on in the ViT, as JSON values.
      dtype: of :data:`DTYPES`.
      shards: how many files; 0 for such of about 1 GB, but no fewer than 8.
      shape: T, P, V.
      computed: how, for the record; it is not compared.

    Raises:
      DataError: for a value that no cache can have.
    """
    if load.jitter:
        raise DataError(
            "data.features with data.jitter: every epoch would see the same instants; unset one"
        )
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is unknown; features are kept as {', '.join(DTYPES)}")
    described = describe_source(source)
    most = record_bytes(shape, dtype)
    clips = described["clips"]
    if shards < 0 or shards > clips:
        raise DataError(f"{shards} shards for {clips} clips: it must be 1 to {clips}, or 0")
    how = dataclasses.asdict(load)
    if not load.sampling.grid:
        del how["sampling"]["grid"]  # caches that are older than the field have none
    return {
        "format": _FORMAT,
        "source": described,
        "load": how,
        "vision": vision,
        "dtype": dtype,
        "shape": list(shape),
        "shards": shards or min(clips, max(8, math.ceil(clips * most / _SHARD_BYTES))),
        "computed": computed,
    }


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Where a manifest is not what is wanted, in words; fields that ``wanted`` lacks are free."""
    found = []
    for name, value in wanted.items():
        if isinstance(value, dict):
            inner = differences(stored.get(name) or {}, value)
            found += [f"{name}.{line}" for line in inner]
        elif stored.get(name) != value:
            found.append(f"{name} is {stored.get(name)!r} there, {value!r} here")
    return found


def read_manifest(directory: str | os.PathLike) -> dict[str, Any] | None:
    """The manifest of a cache; None if there is none.

    Raises:
      DataError: if it is damaged, or of another version.
    """
    path = pathlib.Path(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{str(path)[:80]}: {error.strerror}; correct the path") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the features anew") from None
    if version != _FORMAT:
        raise DataError(f"{path}: format {version} is not {_FORMAT}; prepare the features anew")
    return manifest


def write_manifest(directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Writes it beside, then renames it."""
    path = pathlib.Path(directory) / MANIFEST
    beside = beside_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(manifest, indent=2) + "\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror}") from None


def with_key(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with ``key``, the name by which shards know that they belong to it."""
    what = {
        name: value for name, value in manifest.items() if name not in ("done", "computed", "key")
    }
    text = json.dumps(what, sort_keys=True)
    return manifest | {"key": hashlib.sha256(text.encode()).hexdigest()[:16]}


def finish(directory: str | os.PathLike, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a cache whose shards are all there; returns it.

    It then has ``done``: how many frames, bytes and videos that could not be read there are, and
    the error of ``dtype`` (see :meth:`Error.report`).

    Raises:
      DataError: if a shard is damaged, or belongs to another cache.
    """
    error, done = Error(), {"frames": 0, "unreadable": 0, "bytes": 0}
    for shard in range(manifest["shards"]):
        path = shard_path(directory, manifest, shard)
        figures = shard_figures(path, manifest, shard)
        error.merge(figures["error"])
        done["bytes"] += path.stat().st_size
        for name in ("frames", "unreadable"):
            done[name] += figures[name]
    manifest = manifest | {"done": done | {"error": error.report()}}
    write_manifest(directory, manifest)
    return manifest


def check_fit(
    directory: str | os.PathLike, manifest: dict[str, Any], wanted: dict[str, Any]
) -> None:
    """Whether a cache is what is wanted.

    Raises:
      DataError: naming the differences.
    """
    if found := differences(manifest, wanted):
        raise DataError(
            f"{directory} holds the features of something else: {'; '.join(found)}. Use another "
            "directory, or remove this one and run adacm2 prepare"
        )


class FeatureClips:
    """What ``LoadClip`` gives for every example, with features [T, P, V] in place of pixels.

    Args:
      directory: of a complete cache.
      manifest: its own.
      source: of the examples.
      result: dtype of the features, ``bfloat16`` or ``float32``.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        manifest: dict[str, Any],
        source: Sequence[Example],
        result: str,
    ):
        self._directory, self._manifest = pathlib.Path(directory), manifest
        self._source, self._result = source, result
        self._of = clips_of(source)[1]
        self._bounds = np.array(shard_bounds(manifest))
        self._records: ArrayRecordDataSource | None = None

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._records is None:
            paths = _paths(self._directory, self._manifest)
            self._records = ArrayRecordDataSource([os.fspath(path) for path in paths])
        clip, shape = int(self._of[index]), self._manifest["shape"]
        shard = int(np.searchsorted(self._bounds, clip, side="right")) - 1
        try:
            record = self._records[clip + shard]  # every shard before has one record more
        except RuntimeError as error:
            path = shard_path(self._directory, self._manifest, shard)
            raise damaged(path, error) from None
        found = unpack(record, shape, self._manifest["dtype"], self._result)
        features, valid = np.zeros(shape, found.dtype), np.zeros(shape[0], bool)
        features[: len(found)], valid[: len(found)] = found, True
        example = self._source[index]
        return {
            "index": np.uint32(index),
            "frames": features,
            "valid": valid,
            "question": example.question,
            "answer": example.answer or "",
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # another process opens the files itself

    def __repr__(self) -> str:
        return f"FeatureClips({self._directory})"


def open_features(
    directory: str | os.PathLike,
    source: Sequence[Example],
    load: LoadClip,
    vision: dict[str, Any],
    shape: tuple[int, int, int],
    result: str,
) -> grain.MapDataset:
    """Opens a cache for training.

    Args:
      directory: of the cache, ``config.data.features``.
      source: of the examples.
      load: how the experiment reads clips.
      vision: what features depend on in the ViT; what it lacks is not compared.
      shape: T, P, V of the experiment.
      result: dtype of the features.

    Returns:
      The data set for ``data.pipeline.training_batches``.

    Raises:
      DataError: if there is none, it is not complete, or it was made from something else.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise DataError(
            f"data.features = {directory}: no {MANIFEST} there; run adacm2 prepare first"
        )
    wanted = make_manifest(
        source, load, vision, dtype=manifest["dtype"], shards=1, shape=shape, computed={}
    )
    check_fit(directory, manifest, {name: wanted[name] for name in _COMPARED})
    missing = missing_shards(directory, manifest)
    if missing or "done" not in manifest:
        raise DataError(
            f"data.features = {directory}: {len(missing)} of {manifest['shards']} shards are "
            "missing; run adacm2 prepare again, it goes on with them"
        )
    for shard, path in enumerate(_paths(directory, manifest)):
        shard_figures(path, manifest, shard)
    return grain.MapDataset.source(FeatureClips(directory, manifest, source, result))


def check_weights(directory: str | os.PathLike, vision: dict[str, Any]) -> None:
    """Whether a cache was made by this ViT.

    Args:
      directory: of the cache.
      vision: with the hash of its weights.

    Raises:
      DataError: if not.
    """
    check_fit(directory, read_manifest(directory) or {}, {"vision": vision})


def _paths(directory: str | os.PathLike, manifest: dict[str, Any]) -> list[pathlib.Path]:
    return [shard_path(directory, manifest, shard) for shard in range(manifest["shards"])]
