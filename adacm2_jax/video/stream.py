"""Videos of any length for evaluation: a batch of them in lock-step, in bounded chunks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from adacm2_jax.errors import DataError

if TYPE_CHECKING:  # frames.py needs PyAV, which the library can be imported without
    from adacm2_jax.video.frames import Chunk


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video file and the part of it that counts, seconds."""

    video: str
    start: float | None
    end: float | None


@dataclasses.dataclass
class Row:
    """One video of a batch while it is being read.

    Attributes:
      number: the example's place in the split.
      example: what is asked of it.
      total: frames that it will have.
      chunks: the rest of it.
      error: why it could not be read to its end, or None.
      times: float64[n], instants of the frames handed out so far, seconds from the file's start.
    """

    number: int
    example: Any
    total: int
    chunks: Iterator[Chunk]
    error: str | None = None
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))


@dataclasses.dataclass
class VideoBatch:
    """Some videos, read together.

    Attributes:
      rows: at most ``batch_size`` of them. A row whose ``error`` is set when all chunks have been
        taken must not be answered.
      chunks: frames uint8[B, F, size, size, 3] and valid bool[B, F], with B = ``batch_size`` and F
        fixed; rows that have ended (or that a short last batch lacks) are padding.
    """

    rows: list[Row]
    chunks: Iterator[tuple[np.ndarray, np.ndarray]]


def video_batches(
    examples: Iterable[Any],
    *,
    batch_size: int,
    chunk: int,
    size: int,
    workers: int,
    on_bad_video: Callable[[Any, str], None],
    **options: Any,
) -> Iterator[VideoBatch]:
    """Groups a split into batches of videos and reads them in threads, one chunk ahead.

    Host memory holds two chunks of each video of one batch, whatever the videos' length.

    Args:
      examples: the split.
      batch_size: B, videos read together.
      chunk: F, frames of a chunk.
      size: side of the frames, pixels.
      workers: decoding threads.
      on_bad_video: is told of every video that cannot be opened, with the reason; it is left out.
      options: for ``adacm2_jax.video.frames.read_frames``.
    """
    rows: list[Row] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for number, example in enumerate(examples):
            try:
                rows.append(open_video(example, number, size=size, chunk=chunk, **options))
            except DataError as error:
                on_bad_video(example, str(error))
            if len(rows) == batch_size:
                yield VideoBatch(rows, lock_step(rows, pool, batch_size, chunk, size))
                rows = []
        if rows:
            yield VideoBatch(rows, lock_step(rows, pool, batch_size, chunk, size))


def open_video(example: Any, number: int = 0, **options: Any) -> Row:
    """Opens an example's video; decodes nothing yet.

    Args:
      example: which video, and which part of it.
      number: the example's place in its split.
      options: for ``adacm2_jax.video.frames.read_frames``: ``sampling``, ``size``, ``chunk`` …

    Raises:
      DataError: if the video cannot be opened.
    """
    from adacm2_jax.video.frames import read_frames

    total, chunks = read_frames(example.video, start=example.start, end=example.end, **options)
    return Row(number, example, total, chunks)


def lock_step(
    rows: list[Row], pool: concurrent.futures.Executor, batch_size: int, chunk: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of all rows side by side, as ``VideoBatch.chunks``; ``pool`` reads one chunk ahead.

    A row that cannot be read on ends there, with its ``error`` set.
    """

    def read(row: Row) -> Chunk | None:
        try:
            return next(row.chunks, None)
        except DataError as error:
            row.error = str(error)
            return None

    ahead = [pool.submit(read, row) for row in rows]
    while True:
        parts = [future.result() for future in ahead]
        if not any(parts):
            return
        ahead = [
            pool.submit(read if part else lambda _: None, row)
            for row, part in zip(rows, parts, strict=True)
        ]
        frames = np.zeros((batch_size, chunk, size, size, 3), np.uint8)
        valid = np.zeros((batch_size, chunk), bool)
        for i, part in enumerate(parts):
            if part:
                frames[i, : len(part.frames)] = part.frames
                valid[i, : len(part.frames)] = True
                rows[i].times = np.concatenate([rows[i].times, part.times])
        yield frames, valid
