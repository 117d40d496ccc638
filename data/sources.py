"""Where examples come from: the user's JSON lines, or a TFDS directory; all of them ``Example``."""

from __future__ import annotations

import hashlib
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

from adacm2_jax.errors import DataError
from data.jsonl import Example, JsonlSource


class RecordSource:
    """Examples from a TFDS data set on disk (array_record files), read without TensorFlow.

    Args:
      directory: of the prepared data set, the one that holds ``dataset_info.json``.
      split: such as ``train`` or ``test[:100]``.
      evidence_only: take the annotated part (``start`` to ``end``) instead of the whole video.

    Raises:
      DataError: if there is no such data set or split.
    """

    def __init__(self, directory: str | os.PathLike, split: str, evidence_only: bool = False):
        import tensorflow_datasets as tfds

        if not os.path.exists(os.path.join(directory, "dataset_info.json")):
            raise DataError(f"{directory}: no prepared TFDS data set here; build it first")
        builder = tfds.builder_from_directory(os.fspath(directory))
        name = split.split("[")[0]
        if name not in builder.info.splits:
            known = ", ".join(builder.info.splits)
            raise DataError(f"{directory}: no split {name!r}; it has {known}")
        self._records = builder.as_data_source(split)
        self._evidence_only = evidence_only
        self._name = f"{builder.data_path} {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(index)
        record = self._records[operator.index(index)]
        text = {key: record[key].decode() for key in ("id", "question", "answer")}
        window = (
            (float(record["start"]), float(record["end"])) if self._evidence_only else (None, None)
        )
        return Example(video=record["video"], start=window[0], end=window[1], **text)

    def __repr__(self) -> str:
        return f"RecordSource({self._name}, evidence_only={self._evidence_only})"

    def identity(self) -> str:
        """A hash of what the records are, wherever and whenever they were written."""
        directory = pathlib.Path(self._name.rsplit(" ", 1)[0])
        files = sorted(path for path in directory.glob("*.array_record*") if path.is_file())
        stats = [(path.name, path.stat().st_size) for path in files]
        text = f"{directory.parent.name} {self._name.rsplit(' ', 1)[1]} {len(self)} {stats}"
        return hashlib.sha256(f"{text} {self._evidence_only}".encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes when the data does: name, size and time of every file."""
        directory = pathlib.Path(self._name.rsplit(" ", 1)[0])
        files = sorted(path for path in directory.iterdir() if path.is_file())
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return f"{self!r} {stats}"


def check_source(config: Any, split: str) -> None:
    """Refuses what :func:`open_source` would refuse, as far as that is seen without making data.

    Raises:
      DataError: as :func:`open_source` does.
    """
    if config.source == "suite":
        from data.suite.builder import check_suite

        check_suite(config, split)
    elif config.source != "needle":
        open_source(config, split)


def open_source(config: Any, split: str) -> Sequence[Example]:
    """Opens what ``config.data`` of an experiment names for a split.

    Args:
      config: with ``source`` (``jsonl``, ``task``, ``needle`` or ``suite``) and its fields; see
        ``configs/``.
      split: ``train`` or ``test``, or another that a task has; of ``suite`` also ``val``. For
        ``jsonl``, the fields ``train`` and ``test`` are file names; only the answers of ``train``
        are required.

    Raises:
      DataError: for an unknown source, or a file that is missing or wrong.
    """
    if config.source == "jsonl":
        if split not in config.jsonl:
            raise DataError(f"split {split!r} is unknown; data.jsonl has {', '.join(config.jsonl)}")
        path = config.jsonl[split]
        if not path:
            raise DataError(f"data.jsonl.{split} is empty: set it to a JSON-lines file")
        return JsonlSource(path, require_answer=split == "train")
    if config.source == "task":
        from data.benchmark.source import open_task

        return open_task(config, split)
    if config.source == "needle":
        from data.needle.builder import build
        from data.needle.drawn import DrawnClips

        drawn = getattr(config.needle, "drawn", False)
        if drawn and split == "train":
            return DrawnClips(config.needle.num_frames, config.needle.train_size)
        sizes = {"train": config.needle.train_size, "test": config.needle.test_size}
        if drawn:
            del sizes["train"]
        sizes = {name: size for name, size in sizes.items() if size}
        directory = build(config.data_dir, config.needle.num_frames, sizes)
        return RecordSource(directory, split, config.needle.evidence_only)
    if config.source == "suite":
        from data.suite.builder import open_suite

        return open_suite(config, split)
    known = "'jsonl', 'task', 'needle' or 'suite'"
    raise DataError(f"data.source is {config.source!r}; it must be {known}")
