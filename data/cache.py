"""Decoded clips on disk: many epochs over short videos pay for decoding once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path, remove_abandoned
from data.jsonl import Example
from data.pipeline import LoadClip, clips, iter_batches, stack

_ROWS = 64


class CachedClips:
    """What ``LoadClip`` gives for every example, from memory-mapped arrays.

    Workers and threads share the operating system's page cache; nothing is held per process.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._texts = json.loads((directory / "texts.json").read_text())
        self._arrays: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._arrays is None:
            self._arrays = {
                name: np.load(self._directory / f"{name}.npy", mmap_mode="r")
                for name in ("frames", "valid")
            }
        question, answer = self._texts[index]
        return {
            "index": np.uint32(index),
            "frames": self._arrays["frames"][index],
            "valid": self._arrays["valid"][index],
            "question": question,
            "answer": answer,
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # another process maps the files itself

    def __repr__(self) -> str:
        return f"CachedClips({self._directory})"


def cached_clips(
    source: Sequence[Example], load: LoadClip, directory: str | os.PathLike, workers: int = 0
) -> grain.MapDataset:
    """Decodes a source once into ``directory`` (unless it is there) and serves the clips from it.

    The place depends on the source's files and on ``load``, so a change of either decodes anew. An
    interrupted run leaves nothing that would be taken for a whole cache.

    Args:
      source: with a ``fingerprint()``.
      load: how a clip is read; ``jitter`` cannot be cached.
      directory: for caches.
      workers: decoding processes; 0 decodes in threads.

    Raises:
      DataError: with ``jitter``, or if the disk has no room for the clips.
    """
    if load.jitter:
        raise DataError(
            "data.cache with data.jitter: every epoch would see the same instants; unset one"
        )
    name = hashlib.sha256(f"{source.fingerprint()} {load}".encode()).hexdigest()[:16]
    target = pathlib.Path(directory) / name
    if not target.exists():
        _fill(source, load, target, workers)
    return grain.MapDataset.source(CachedClips(target))


def _fill(source: Sequence[Example], load: LoadClip, target: pathlib.Path, workers: int) -> None:
    shape = (len(source), load.num_frames, load.size, load.size, 3)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, target.name)
    disk, size = os.statvfs(target.parent), math.prod(shape)
    if size > disk.f_bavail * disk.f_frsize:
        raise DataError(
            f"{target.parent}: no room for {size / 1e9:.1f} GB of decoded clips; unset data.cache, "
            "or set data.cache_dir to a larger disk"
        )
    partial = beside_path(target)
    partial.mkdir()
    try:
        _decode(source, load, partial, shape, workers)
        partial.rename(target)
    except OSError:
        if not target.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _decode(
    source: Sequence[Example],
    load: LoadClip,
    partial: pathlib.Path,
    shape: tuple[int, ...],
    workers: int,
) -> None:
    create = np.lib.format.open_memmap
    frames = create(partial / "frames.npy", "w+", np.uint8, shape)
    valid = create(partial / "valid.npy", "w+", bool, shape[:2])
    texts: list[tuple[str, str]] = []
    batches = clips(source, load).batch(_ROWS, drop_remainder=False, batch_fn=stack)
    reader = iter_batches(batches, workers)
    for batch in tqdm(reader, total=-(-len(source) // _ROWS), desc="decode", disable=None):
        rows = slice(len(texts), len(texts) + len(batch["index"]))
        frames[rows], valid[rows] = batch["frames"], batch["valid"]
        texts += zip(batch["question"].tolist(), batch["answer"].tolist(), strict=True)
    reader.close()
    frames.flush()
    valid.flush()
    (partial / "texts.json").write_text(json.dumps(texts))
