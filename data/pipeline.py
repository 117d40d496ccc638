"""Training batches: clips of a fixed number of frames, shuffled, endless, resumable (Grain)."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import re
import signal
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from adacm2_jax.errors import DataError, UserError, printable
from adacm2_jax.video.frames import Sampling, read_clip
from data.feature_cache.reading import StoredClip, read_clips
from data.jsonl import Example
from data.workers import THREADS, begin_decoding, deaf_to_signals, decoder_threads


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
      resize: how frames are made square: ``clean`` or ``ma_lmm``, see ``adacm2_jax.video.resize``.
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
            clip = self._read(example, rng)[: self.num_frames]
            frames[: len(clip)], valid[: len(clip)] = clip, True
        except DataError as error:
            logging.warning("skipped %s: %s", printable(example.id), error)
        return {
            "index": np.uint32(index),
            "frames": frames,
            "valid": valid,
            "question": example.question,
            "answer": example.answer or "",
        }

    def _read(self, example: Example, rng: np.random.Generator) -> np.ndarray:
        if not isinstance(example.video, str | bytes):
            return example.video.frames(self.size)
        return read_clip(
            example.video,
            self.sampling,
            size=self.size,
            start=example.start,
            end=example.end,
            rng=rng if self.jitter else None,
            resize=self.resize,
            on_truncated=self.on_truncated,
            on_warning=logging.warning,
            threads=decoder_threads(),
        )


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


class TrainingBatches:
    """An endless iterator over shuffled batches of one process, see :func:`training_batches`.

    Attributes:
      examples: how many have been handed out so far, over all processes: the iterator's whole
        state.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int,
        world: int,
        ahead: int,
    ):
        self._ahead = ahead
        self._rows = dataset.seed(seed).shuffle().repeat()
        self._batch_size, self._workers = batch_size, workers
        self._rank, self._world = rank, world
        self._reader: BatchReader | None = None
        self.examples = 0

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._reader is None:
            rows = self._rows[self.examples + self._rank :: self._world]
            # Endless rows leave no remainder; counting it overflows where batch_size is 1.
            size = self._batch_size // self._world
            self._reader = iter_batches(
                rows.batch(size, drop_remainder=True, batch_fn=stack), self._workers, self._ahead
            )
        batch = next(self._reader)
        self.examples += self._batch_size
        return batch

    def seek(self, examples: int) -> None:
        """Goes on after so many examples, as if they had been handed out."""
        self.close()
        self.examples = examples

    def close(self) -> None:
        """Ends worker processes and threads."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None


def training_batches(
    dataset: grain.MapDataset,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    ahead: int = 4,
) -> TrainingBatches:
    """An endless iterator over shuffled batches of this process.

    There is one order of examples, that of all processes together: position ``epoch · N + place``,
    where every epoch is a permutation of its own of the ``N`` examples. Batch ``g`` is positions
    ``g · batch_size`` to ``(g + 1) · batch_size``; one may hold the end of an epoch and the start
    of the next, so nothing is dropped or repeated, whatever ``N`` is. Process ``r`` of ``w`` reads
    rows ``r``, ``r + w`` … of each batch, and those alone.

    The order depends on ``seed`` and ``N`` alone. How many examples were handed out
    (``TrainingBatches.examples``) is therefore all that has to be kept: a new iterator that seeks
    there goes on with the very next example, with any number of processes, workers and rows.

    Args:
      dataset: from :func:`clips` or ``data.cache.cached_clips``.
      batch_size: rows of a batch, over all processes.
      seed: of the shuffling.
      workers: processes that decode; 0 decodes in threads of this one.
      rank, world: this process and their number.
      ahead: batches that threads read ahead, where there are no worker processes.

    Raises:
      DataError: if there are fewer examples than rows, or the rows do not divide over processes.
    """
    if len(dataset) < batch_size:
        raise DataError(
            f"{len(dataset)} training examples do not fill one batch of {batch_size}; "
            f"set train.batch_size to {len(dataset)} or less"
        )
    if batch_size % world:
        raise DataError(f"batch_size = {batch_size} does not divide over {world} processes")
    return TrainingBatches(dataset, batch_size, seed, workers, rank, world, ahead)


def iter_batches(batches: grain.MapDataset, workers: int, ahead: int = 4) -> BatchReader:
    """Reads batches ahead: in ``workers`` processes, or in threads of this one; the same order."""
    if not workers:
        options = grain.ReadOptions(num_threads=min(THREADS, ahead), prefetch_buffer_size=ahead)
        return BatchReader(iter(batches.to_iter_dataset(options)), 0)
    dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    processes = grain.MultiprocessingOptions(num_workers=workers)
    reader = iter(
        dataset.mp_prefetch(processes, worker_init_fn=functools.partial(begin_decoding, workers))
    )
    with deaf_to_signals():  # a last batch is wanted of them after it
        reader.get_state()  # makes the iterators that are to start
        reader.start_prefetch()
    return BatchReader(reader, workers)


class BatchReader:
    """Grain's reader; a decoding process that ends is told in one line.

    Args:
      reader: of batches.
      workers: processes that decode for it; 0 for none.
    """

    def __init__(self, reader: grain.DatasetIterator, workers: int):
        self._reader, self._workers = reader, workers

    def __iter__(self) -> BatchReader:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._reader)
        except (RuntimeError, OSError) as error:
            if problem := self._problem(error):
                raise problem from error
            raise

    def close(self) -> None:
        """Ends worker processes and threads."""
        self._reader.close()

    def _problem(self, error: Exception) -> UserError | None:
        if not self._workers:
            return None
        ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        status = int(ended.group(1)) if ended else 0
        # Decoding processes write to shared memory alone.
        if status == -signal.SIGBUS or getattr(error, "errno", None) == errno.ENOSPC:
            return UserError(
                "no room in the shared memory /dev/shm, through which decoding processes hand over "
                f"their batches: enlarge it (docker run --shm-size=8g), or lower "
                f"data.workers={self._workers}; 0 decodes without"
            )
        if not ended:
            return None
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        cause = " (memory that runs out is the usual cause)" if status == -signal.SIGKILL else ""
        return UserError(
            f"a decoding process was ended {how}{cause}: look at the log above, or lower "
            f"data.workers={self._workers}; the same command goes on from the newest checkpoint"
        )


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows of :class:`LoadClip`, or stored clips, as one batch; texts become arrays of strings."""
    texts = ("question", "answer")
    batch = {
        key: read_clips([row[key] for row in rows])
        if isinstance(rows[0][key], StoredClip)
        else np.stack([row[key] for row in rows])
        for key in rows[0]
        if key not in texts
    }
    return batch | {key: np.array([row[key] for row in rows]) for key in texts}
