"""A cache of features: what a frozen ViT makes of a training set, computed once.

A cache is a directory::

    manifest.json                             what it was made from, and what is in it
    features-00003-of-00016.frames            one shard, see shards.py

A *clip* is a video and the part of it that counts; examples that ask about the same clip share one,
and clips of one video share the frames that they have in common (windows.py). What is missing can
be computed at any time, anywhere, by anybody (``adacm2 prepare``).
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

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path
from data.feature_cache.reading import FeatureClips
from data.feature_cache.shards import (
    DTYPES,
    Error,
    frame_bytes,
    missing_shards,
    read_index,
    shard_path,
)
from data.jsonl import Example, JsonlSource
from data.pipeline import LoadClip

MANIFEST = "manifest.json"
#: Changes when the files of older versions cannot be read any more.
_FORMAT = 2
#: Bytes of a shard, about, unless their number is given.
_SHARD_BYTES = 1e9
_COMPARED = ("source", "load", "vision", "shape")


def clips_of(source: Sequence[Example]) -> tuple[list[int], np.ndarray]:
    """The distinct clips of a source.

    Returns:
      The example that each clip is first seen in, and the clip of every example, int64[examples].
      Of a source that has no ``clip(index)`` each example is taken to be another video.
    """
    clip_at = getattr(source, "clip", None)
    if clip_at is None:
        return list(range(len(source))), np.arange(len(source))
    numbers: dict[tuple, int] = {}
    first, of = [], []
    for index in range(len(source)):
        clip = clip_at(index)
        if clip not in numbers:
            numbers[clip] = len(first)
            first.append(index)
        of.append(numbers[clip])
    return first, np.array(of)


def videos_of(source: Sequence[Example]) -> list[list[int]]:
    """The clips of each video of a source, by their numbers in :func:`clips_of`.

    Their order, video by video, is that of the clips in the cache.
    """
    first, _ = clips_of(source)
    clip_at = getattr(source, "clip", None)
    if clip_at is None:
        return [[clip] for clip in range(len(first))]
    found: dict[Any, list[int]] = {}
    for clip, index in enumerate(first):
        found.setdefault(clip_at(index)[0], []).append(clip)
    return list(found.values())


def describe_source(source: Sequence[Example]) -> dict[str, Any]:
    """What a cache remembers of its source: the numbers of clips and videos, and a hash of them.

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
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"clips": len(first), "videos": len(videos_of(source)), "files": digest}


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
            "data.jitter = True: features are of the same instants in every epoch; unset it"
        )
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is unknown; features are kept as {', '.join(DTYPES)}")
    described = describe_source(source)
    videos, counts = described["videos"], [len(clips) for clips in videos_of(source)]
    if shards < 0 or shards > videos:
        raise DataError(f"{shards} shards for {videos} videos: it must be 1 to {videos}, or 0")
    if not shards:
        most = described["clips"] * shape[0] * frame_bytes(shape, dtype)
        shards = min(videos, max(8, math.ceil(most / _SHARD_BYTES)))
    ends = np.cumsum([0, *counts])
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
        "shards": shards,
        # Places of clips: videos are divided over the shards.
        "bounds": [int(ends[shard * videos // shards]) for shard in range(shards + 1)],
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

    It then has ``done``: how many frames the clips have, how many are stored (fewer where clips
    share some), bytes and clips that could not be read, and the error of ``dtype`` (see
    :meth:`Error.report`).

    Raises:
      DataError: if a shard is damaged, or belongs to another cache.
    """
    error, done = Error(), {"frames": 0, "stored": 0, "unreadable": 0, "bytes": 0}
    for shard in range(manifest["shards"]):
        path = shard_path(directory, manifest, shard)
        figures = read_index(path, manifest, shard).figures
        error.merge(figures["error"])
        done["bytes"] += path.stat().st_size
        for name in ("frames", "stored", "unreadable"):
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


def open_features(
    directory: str | os.PathLike,
    source: Sequence[Example],
    load: LoadClip,
    vision: dict[str, Any],
    shape: tuple[int, int, int],
    local: str | os.PathLike | None = None,
) -> grain.MapDataset:
    """Opens a cache for training.

    Args:
      directory: of the cache, ``config.data.features``.
      source: of the examples.
      load: how the experiment reads clips.
      vision: what features depend on in the ViT; what it lacks is not compared.
      shape: T, P, V of the experiment.
      local: a directory of this machine where frames that were read are kept, or None.

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
        what = f"{len(missing)} of {manifest['shards']} shards are missing"
        raise DataError(
            f"data.features = {directory}: {what if missing else 'adacm2 prepare did not finish'}; "
            "run adacm2 prepare again, it goes on where it was"
        )
    order = np.concatenate(videos_of(source))
    places = np.argsort(order)[clips_of(source)[1]]
    return grain.MapDataset.source(FeatureClips(directory, manifest, source, places, local))


def check_weights(directory: str | os.PathLike, vision: dict[str, Any]) -> None:
    """Whether a cache was made by this ViT.

    Args:
      directory: of the cache.
      vision: with the hash of its weights.

    Raises:
      DataError: if not.
    """
    check_fit(directory, read_manifest(directory) or {}, {"vision": vision})
