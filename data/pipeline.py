"""Training batches: clips of a fixed number of frames, shuffled, endless, resumable (Grain)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from data.errors import DataError
from data.jsonl import Example
from data.video import Sampling, read_clip


@dataclasses.dataclass(frozen=True)
class LoadClip(grain.transforms.RandomMap):
    """``Example`` → ``frames`` uint8[T, size, size, 3], ``valid`` bool[T], ``index``, texts.

    A video that cannot be read becomes a clip without a valid frame, and is logged: it adds nothing
    to the loss, and a long run does not die of it.

    Attributes:
      sampling: which frames are taken; a clip is padded or cut to ``num_frames``.
      num_frames: T.
      size: side of the frames, pixels.
      jitter: a random instant in each of T equal segments, instead of its middle.
      on_truncated: ``error`` (the video is skipped) or ``use`` (what could be read is used).
      resize: how frames are made square: ``clean`` or ``ma_lmm``, see ``data.resize``.
    """

    sampling: Sampling
    num_frames: int
    size: int
    jitter: bool
    on_truncated: str
    resize: str = "clean"

    def random_map(self, element: tuple[int, Example], rng: np.random.Generator) -> dict[str, Any]:
        index, example = element
        frames = np.zeros((self.num_frames, self.size, self.size, 3), np.uint8)
        valid = np.zeros(self.num_frames, bool)
        try:
            clip = read_clip(
                example.video,
                self.sampling,
                size=self.size,
                start=example.start,
                end=example.end,
                rng=rng if self.jitter else None,
                resize=self.resize,
                on_truncated=self.on_truncated,
                on_warning=logging.warning,
            )[: self.num_frames]
            frames[: len(clip)], valid[: len(clip)] = clip, True
        except DataError as error:
            logging.warning("skipped %s: %s", example.id, error)
        return {
            "index": np.uint32(index),
            "frames": frames,
            "valid": valid,
            "question": example.question,
            "answer": example.answer or "",
        }


class Indexed:
    """A source whose elements know their place, which seeds what is random about a video."""

    def __init__(self, source: Sequence[Example]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return int(index), self._source[index]

    def __repr__(self) -> str:
        return f"Indexed({self._source!r})"


def clips(source: Sequence[Example], load: LoadClip) -> grain.MapDataset:
    """Every example of a source, decoded on demand."""
    return grain.MapDataset.source(Indexed(source)).seed(0).random_map(load)


def training_batches(
    dataset: grain.MapDataset,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator over shuffled batches of this process.

    The order depends on ``seed`` alone. The iterator's state can be saved and restored (with
    Orbax), by as many ``workers``, and goes on with the very next batch.

    Args:
      dataset: from :func:`clips` or ``data.cache.cached_clips``.
      batch_size: rows of a batch in this process.
      seed: of the shuffling.
      workers: processes that decode; 0 decodes in threads of this one.
      rank, world: this process and their number; each takes every ``world``-th example.

    Raises:
      DataError: if there are fewer examples than processes times rows.
    """
    if len(dataset) < batch_size * world:
        raise DataError(
            f"{len(dataset)} training examples do not fill one batch of {batch_size * world}; "
            "lower batch_size"
        )
    rows = dataset.seed(seed).shuffle()[rank::world].repeat()
    # Endless rows leave no remainder; counting it overflows where batch_size is 1.
    batches = rows.batch(batch_size, drop_remainder=True, batch_fn=stack)
    return iter_batches(batches, workers)


def iter_batches(batches: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    """Reads batches ahead: in ``workers`` processes, or in threads of this one; the same order."""
    if workers:
        reader = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        return iter(reader.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of :class:`LoadClip` as one batch; texts become arrays of strings."""
    texts = ("question", "answer")
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key not in texts}
    return batch | {key: np.array([row[key] for row in rows]) for key in texts}
