"""A benchmark's examples: from its annotation and its videos, or from what ``build.py`` made."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from adacm2_jax.errors import DataError, printable
from adacm2_jax.tasks.task import Item, find, items_of
from adacm2_jax.tasks.videos import videos_in
from adacm2_jax.video.jpegs import as_video
from data.jsonl import Example

#: Beside the records of a built data set: ``start`` and ``end`` of each item of each record, by
#: split (of older sets how many items a record has).
INDEX = "items.json"
_MOST_NAMED = 5


def state_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a video file does, or a frame of a directory of frames."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def example_of(item: Item, video: str | bytes) -> Example:
    """What is asked, of a video at hand."""
    return Example(
        id=item.id,
        video=video,
        question=item.question,
        answer=item.answers[0] if item.answers else None,
        start=item.start,
        end=item.end,
        answers=tuple(item.answers),
        choices=tuple(item.choices),
        at=item.at,
        group=item.video,
        category=item.category,
    )


def read_items(name: str, annotations: str, split: str) -> list[Item]:
    """The items of a split, those of a video together, videos in the annotation's order.

    Raises:
      DataError: for a split that the task does not have, or an annotation that cannot be read.
    """
    by_video: dict[str, list[Item]] = {}
    for item in items_of(find(name), Path(annotations), split):
        by_video.setdefault(item.video, []).append(item)
    return [item for items in by_video.values() for item in items]


class TaskSource:
    """Examples of a task straight from its annotation.

    Args:
      name: of the task.
      annotations: directory of its annotation.
      videos: directory of its videos, or of their frames.
      split: of the annotation.
      allow_missing: leave out what is asked of videos that are not there; they are named.

    Raises:
      DataError: if anything is missing.
    """

    def __init__(
        self, name: str, annotations: str, videos: str, split: str, allow_missing: bool = False
    ):
        self._about = (name, annotations, videos, split)
        files = videos_in(videos, "data.task.videos")
        items = read_items(name, annotations, split)
        missing = sorted({item.video for item in items} - set(files))
        if missing:
            named = printable(", ".join(missing[:_MOST_NAMED]))
            told = f"{len(missing)} video(s) of task {name} are missing in {printable(videos)}: "
            told += named + (", …" if len(missing) > _MOST_NAMED else "")
            if not allow_missing or len(missing) == len({item.video for item in items}):
                raise DataError(f"{told}; data.task.allow_missing leaves their questions out")
            print(f"warning: {told}", file=sys.stderr)
        self._items = [item for item in items if item.video in files]
        self._files = {item.video: files[item.video] for item in self._items}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: SupportsIndex) -> Example:
        item = self._items[operator.index(index)]
        path = self._files[item.video]
        return example_of(item, as_video(path) if path.is_dir() else str(path))

    def clip(self, index: int) -> tuple[str, float | None, float | None]:
        """The name of an example's video, and the part of it that counts; no file is opened."""
        item = self._items[index]
        return item.video, item.start, item.end

    def __repr__(self) -> str:
        name, annotations, videos, split = self._about
        return f"TaskSource({name!r}, {annotations!r}, {videos!r}, {split!r})"

    def identity(self) -> str:
        """A hash of what is asked about what, in order, wherever it lies."""
        return hashlib.sha256(repr(self._items).encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the items or their video files do."""
        stats = [(str(path), state_of(path)) for path in self._files.values()]
        return f"{self._items} {stats}"


class BuiltSource:
    """Examples of a data set of ``build.py``: a record a video, read without TensorFlow.

    Args:
      directory: of the data set, the one with ``dataset_info.json``.
      split: of it.
      task: that it must be of; empty: any.

    Raises:
      DataError: if there is none, it is another task's, or it is damaged.
    """

    def __init__(self, directory: str | os.PathLike, split: str, task: str = ""):
        import tensorflow_datasets as tfds

        root = Path(directory)
        try:
            index = json.loads((root / INDEX).read_text())
            counts = {split: list(map(_count, entries)) for split, entries in index.items()}
            whole = all(count > 0 for each in counts.values() for count in each)
        except (OSError, ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise DataError(
                f"{printable(str(directory))}: no built benchmark here, or one that is not "
                "finished; python -m data.benchmark.build makes one, and finishes it"
            )
        if split not in counts:
            raise DataError(
                f"{printable(str(directory))}: no split {split!r}; it has {', '.join(counts)}"
            )
        self._root, self._split = root, split
        self._ends, self._windows = np.cumsum(counts[split]), index[split]
        try:
            builder = tfds.builder_from_directory(str(root))
            self._records: Any = builder.as_data_source(split)
            count = len(self._records)
        except Exception as error:  # by what is damaged: protobuf's, TFDS's, array_record's
            raise self._damaged(error) from error
        if task and builder.name != task:
            raise DataError(
                f"data.task.built={printable(str(directory))} was built of {builder.name}, but "
                f"data.task.name is {task}"
            )
        if count != len(self._ends):
            raise self._damaged(f"{count} records, where {len(self._ends)} belong")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _record(self, place: int) -> tuple[int, int]:
        """The record of an item, and the place of the record's first item."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        return number, int(self._ends[number - 1]) if number else 0

    def clip(self, index: int) -> tuple[int | str, float | None, float | None]:
        """The record of an example, and the part of its video that counts; none is read."""
        number, first = self._record(index)
        windows = self._windows[number]
        if isinstance(windows, int):  # nothing is known: a video of its own
            return f"item {index}", None, None
        start, end = windows[index - first]
        return number, start, end

    def __getitem__(self, index: SupportsIndex) -> Example:
        place = operator.index(index)
        if not 0 <= place < len(self):
            raise IndexError(index)
        number, first = self._record(place)
        try:
            record = self._records[number]
            items = json.loads(record["items"])
        except (RuntimeError, TypeError, ValueError) as error:  # array_record's, or nothing is read
            raise self._damaged(error) from error
        if first + len(items) != self._ends[number]:
            raise self._damaged(f"record {number} has {len(items)} items, other than {INDEX} says")
        return example_of(item_of(items[place - first]), record["video"])

    def _damaged(self, why: object) -> DataError:
        first = str(why).split("\n")[0][:200]
        return DataError(
            f"{printable(str(self._root))}: is damaged ({printable(first)}); remove it and build "
            "it again: python -m data.benchmark.build"
        )

    def __repr__(self) -> str:
        return f"BuiltSource({str(self._root)!r}, {self._split!r})"

    def identity(self) -> str:
        """A hash of what the records are, wherever they lie."""
        names = sorted(
            (path.name, path.stat().st_size) for path in self._root.glob("[!.]*.array_record*")
        )
        return hashlib.sha256(f"{names} {self._split}".encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the data does."""
        files = sorted(path for path in self._root.iterdir() if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{self!r} {stats}"


def _count(entry: int | list[list[float | None]]) -> int:
    """Items of a record, from what the index says of it."""
    if isinstance(entry, int):
        return entry
    return len([(start, end) for start, end in entry])


def item_of(fields: dict[str, Any]) -> Item:
    """An item again, from its fields in JSON."""
    lists = {name: tuple(fields[name]) for name in ("answers", "choices")}
    return Item(**(fields | lists))


def open_task(config: Any, split: str) -> Sequence[Example]:
    """The source of ``data.task``.

    Raises:
      DataError: if a field is missing, or what it names.
    """
    task = config.task
    if not task.name:
        raise DataError("data.source is 'task', but data.task.name is empty; name a benchmark")
    find(task.name)
    if task.built:
        return BuiltSource(task.built, split, task.name)
    for field in ("annotations", "videos"):
        if not getattr(task, field):
            raise DataError(
                f"data.task.{field} is empty: name the directory (or data.task.built, of what "
                "python -m data.benchmark.build made)"
            )
    return TaskSource(task.name, task.annotations, task.videos, split, task.allow_missing)
