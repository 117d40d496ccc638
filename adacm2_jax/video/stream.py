"""Videos of any length for evaluation: a batch of them in lock-step, in bounded chunks."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adacm2_jax.errors import DataError

Future = concurrent.futures.Future

if TYPE_CHECKING:  # frames.py needs PyAV, which the library can be imported without
    from adacm2_jax.video.frames import Chunk


#: Questions about one video that are read together at most; each has a memory of its own.
MOST_QUESTIONS = 64


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video file and the part of it that counts, seconds; what comes after ``at`` does not."""

    video: str
    start: float | None
    end: float | None
    at: float | None = None


@dataclasses.dataclass
class Row:
    """One video of a batch while it is being read.

    Attributes:
      number: the place of its first example in the split.
      examples: what is asked of it, at least one.
      total: frames that it will have.
      chunks: the rest of it.
      error: why it could not be read to its end, or None.
      times: float64[n], instants of the frames handed out so far, seconds from the file's start.
    """

    number: int
    examples: Sequence[Any]
    total: int
    chunks: Iterator[Chunk]
    error: str | None = None
    times: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    @property
    def example(self) -> Any:
        """The first example; all are about the same frames."""
        return self.examples[0]


@dataclasses.dataclass
class VideoBatch:
    """Some videos, read together.

    Attributes:
      rows: at most ``room`` of them. A row whose ``error`` is set when all chunks have been taken
        must not be answered.
      chunks: frames uint8[B, F, size, size, 3] and valid bool[B, F], with B = ``room`` and F fixed;
        rows that have ended (or that the batch lacks) are padding.
      room: B, videos that the arrays have room for.
      end: how many examples of the split are done with this batch and those before it.
    """

    rows: list[Row]
    chunks: Iterator[tuple[np.ndarray, np.ndarray]]
    room: int
    end: int


def video_batches(
    examples: Iterable[Any],
    *,
    batch_size: int,
    chunk: int,
    size: int,
    workers: int,
    on_bad_video: Callable[[Any, str], None],
    first: int = 0,
    room: Callable[[int], int] | None = None,
    **options: Any,
) -> Iterator[VideoBatch]:
    """Groups a split into batches of videos and reads them in threads, one chunk ahead.

    Examples about the same part of the same video that follow one another are read as one video,
    once. While a batch is answered, the videos of the next are opened and their first chunks are
    read. Host memory holds two chunks of each video of a batch and one of the next, whatever the
    videos' length.

    Args:
      examples: the split, or what follows its first ones.
      batch_size: B, videos read together.
      chunk: F, frames of a chunk.
      size: side of the frames, pixels.
      workers: decoding threads.
      on_bad_video: is told of every example whose video cannot be opened, with the reason; it is
        left out.
      first: the place in the split of the first of the examples. From the ``end`` of any batch on,
        the batches are those that would have followed it.
      room: most questions about one video → B, for batches whose videos have several.
      options: for ``adacm2_jax.video.frames.read_frames``.
    """
    room = room or (lambda questions: batch_size)
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        concurrent.futures.ThreadPoolExecutor(1) as opener,
    ):
        groups = _groups(by_video(examples, first), room, size=size, chunk=chunk, **options)

        def open_next() -> tuple[_Group, list[Future]] | None:
            group = next(groups, None)
            if group is None:
                return None
            return group, [pool.submit(_read, row) for row in group.rows]

        ahead = opener.submit(open_next)
        while (opened := ahead.result()) is not None:
            group, chunks = opened
            for example, problem in group.bad:
                on_bad_video(example, problem)
            ahead = opener.submit(open_next)
            if group.rows:
                places = room(max(len(row.examples) for row in group.rows))
                steps = _lock_step(group.rows, chunks, pool, places, chunk, size)
                yield VideoBatch(group.rows, steps, places, group.end)


@dataclasses.dataclass
class _Group:
    """Videos of a batch, opened.

    Attributes:
      rows: the videos; none where nothing is left but what could not be opened.
      bad: examples before its end whose video could not be opened, with the reason.
      end: of ``VideoBatch``.
    """

    rows: list[Row]
    bad: list[tuple[Any, str]]
    end: int


def _groups(
    videos: Iterable[tuple[int, list[Any]]], room: Callable[[int], int], **options: Any
) -> Iterator[_Group]:
    """Opens the videos of one batch after the other."""
    rows: list[Row] = []
    bad: list[tuple[Any, str]] = []
    end = 0
    for number, asked in videos:
        try:
            row = open_video(asked[0], number, **options)
        except DataError as error:
            bad += [(example, str(error)) for example in asked]
            end = number + len(asked)
            continue
        row.examples = asked
        if rows and len(rows) >= room(max(len(each.examples) for each in [*rows, row])):
            yield _Group(rows, bad, end)
            rows, bad = [], []
        rows.append(row)
        end = number + len(asked)
        if len(rows) >= room(max(len(each.examples) for each in rows)):
            yield _Group(rows, bad, end)
            rows, bad = [], []
    if rows or bad:
        yield _Group(rows, bad, end)


def by_video(examples: Iterable[Any], first: int = 0) -> Iterator[tuple[int, list[Any]]]:
    """Examples about the same part of the same video that follow one another, at most
    ``MOST_QUESTIONS`` of them, and the place of the first."""
    asked: list[Any] = []
    number = first
    for place, example in enumerate(examples, first):
        if asked and (_part(example) != _part(asked[0]) or len(asked) == MOST_QUESTIONS):
            yield number, asked
            asked = []
        if not asked:
            number = place
        asked.append(example)
    if asked:
        yield number, asked


def _part(example: Any) -> tuple[Any, ...]:
    return example.start, example.end, example.at, example.video


def open_video(example: Any, number: int = 0, **options: Any) -> Row:
    """Opens an example's video; decodes nothing yet.

    Args:
      example: which video, and which part of it; what comes after its ``at`` is not read.
      number: the example's place in its split.
      options: for ``adacm2_jax.video.frames.read_frames``: ``sampling``, ``size``, ``chunk`` …

    Raises:
      DataError: if the video cannot be opened.
    """
    from adacm2_jax.video.frames import read_frames

    ends = [end for end in (example.end, example.at) if end is not None]
    end = min(ends, default=None)
    total, chunks = read_frames(example.video, start=example.start, end=end, **options)
    return Row(number, [example], total, chunks)


def lock_step(
    rows: list[Row], pool: concurrent.futures.Executor, batch_size: int, chunk: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of all rows side by side, as ``VideoBatch.chunks``; ``pool`` reads one chunk ahead.

    A row that cannot be read on ends there, with its ``error`` set.
    """

    return _lock_step(
        rows, [pool.submit(_read, row) for row in rows], pool, batch_size, chunk, size
    )


def _read(row: Row) -> Chunk | None:
    """The next chunk of a video; None at its end, or where it cannot be read on."""
    try:
        return next(row.chunks, None)
    except DataError as error:
        row.error = str(error)
        return None


def _lock_step(
    rows: list[Row],
    ahead: Sequence[Future],
    pool: concurrent.futures.Executor,
    batch_size: int,
    chunk: int,
    size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """:func:`lock_step`, the first chunks of which are being read."""
    while True:
        parts = [future.result() for future in ahead]
        if not any(parts):
            return
        ahead = [
            pool.submit(_read if part else lambda _: None, row)
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
