"""Test sets of the suite: H.264 files and the JSON lines that ask about them.

A directory holds ``videos/``, ``questions.jsonl``, which ``data/jsonl.py`` reads, and
``records.jsonl``: the same lines with all that is known of each. ``built.json`` says what it was
made from. A video is determined by its kind, split and number alone, so every build gives the same
bytes; one that was stopped goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from adacm2_jax.errors import DataError, printable
from adacm2_jax.files import remove_abandoned, write_bytes, write_json, write_text
from adacm2_jax.progress import Progress
from data.jsonl import JsonlSource
from data.needle.render import FRAME_SIZE, encode
from data.suite.drawn import DrawnClips
from data.suite.plan import READING, WHEN, chance
from data.suite.video import SPLITS, Kind, check_frames
from data.workers import deaf_to_signals, live_as_long_as_parent

QUESTIONS, RECORDS, BUILT = "questions.jsonl", "records.jsonl", "built.json"
#: Changes when a build of the same kinds gives other videos or questions.
VERSION = 1
# So many are drawn before worker processes have so much as started.
_FEW_FRAMES = 4000
# A smaller frame has no digit that can be read.
_LEAST_SIZE = 16
# What JsonlSource reads of a record.
_READ = ("id", "video", "question", "answer", "group", "category", "reading")


def records_of(kind: Kind, split: str, number: int) -> list[dict[str, Any]]:
    """All that is known of the questions about one video."""
    video = _name(kind, split, number)
    when = WHEN.get(kind.task, "before")
    return [
        {
            "id": f"{video}-{place}",
            "video": f"videos/{video}.mp4",
            "question": question.text,
            "answer": question.answer,
            "group": video,
            "category": kind.task,
            "task": kind.task,
            "style": kind.style,
            "split": split,
            "num_frames": kind.num_frames,
            "when": when,
            "reading": question.text if when == "before" else READING[kind.task],
            "age": question.age,
            "frames": list(question.frames),
            "chance": chance(kind.task, kind.num_frames),
        }
        for place, question in enumerate(kind.plan(split, number).questions)
    ]


def build(
    directory: str | os.PathLike,
    kinds: Sequence[Kind],
    split: str,
    videos: int,
    size: int = FRAME_SIZE,
    shown: bool = True,
) -> pathlib.Path:
    """Writes a set unless it is there already; goes on with one that was stopped.

    Args:
      directory: of this set alone.
      kinds: of the videos.
      split: ``val``, ``test`` or ``train``.
      videos: of each kind.
      size: side of the frames, pixels; even.
      shown: whether to show how far long work is.

    Returns:
      The file of the questions.

    Raises:
      DataError: for another set in that directory, or a directory that cannot be written to.
    """
    root = pathlib.Path(directory)
    if split not in SPLITS:
        raise DataError(f"split {split!r:.60} is unknown; there are {', '.join(SPLITS)}")
    if videos < 1:
        raise DataError(f"videos = {videos}: a set needs 1 or more of each kind")
    if not kinds:
        raise DataError("a set needs a task and a style; name one of each")
    _check_size(size, max(kind.num_frames for kind in kinds))
    made_from = _describe(kinds, split, videos, size)
    try:
        _check_same(root, made_from)
        asked = (root / QUESTIONS).exists()
        # What cannot be asked is found before anything is drawn.
        records = [] if asked else _records(kinds, split, videos)
        (root / "videos").mkdir(parents=True, exist_ok=True)
        if not (root / BUILT).exists():
            write_json(root / BUILT, made_from)
        _write_videos(root, kinds, split, videos, size, shown)  # also one that was lost since
        if not asked:
            _write_lines(root, records)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError(
            f"{printable(str(root)[:80])}: a process that drew videos was killed, by want of "
            "memory most often; the same command goes on where it was"
        ) from None
    except OSError as error:
        raise DataError(
            f"{printable(str(root)[:80])}: no set can be written there "
            f"({printable(error.strerror or str(error))}); name another directory"
        ) from error
    return root / QUESTIONS


def check_suite(config: Any, split: str) -> list[Kind]:
    """The kinds of videos that ``config.data`` of an experiment names for a split.

    Raises:
      DataError: for an unknown split or kind, or no directory to build in.
    """
    suite = config.suite
    if split not in SPLITS:
        raise DataError(f"split {split!r:.60} is unknown; data.suite has {', '.join(SPLITS)}")
    options: dict[str, Any] = {"needle_frames": suite.needle_frames, "share": suite.share}
    options["seed"] = suite.seed
    if split != "train":
        options |= {"questions": suite.questions_per_video, "ages": tuple(suite.ages)}
    kinds = [
        Kind(task, style, suite.num_frames, **options)
        for style, task in itertools.product(suite.styles, suite.tasks)
    ]
    if split == "train":
        return kinds
    if not config.data_dir:
        raise DataError("data.data_dir is empty; name a directory, such as runs/data")
    if suite.test_size < 1:
        raise DataError(f"data.suite.test_size = {suite.test_size} must be at least 1, to evaluate")
    return list(dict.fromkeys(kinds))


def open_suite(config: Any, split: str) -> DrawnClips | JsonlSource:
    """What ``config.data`` of an experiment names for a split: training clips are drawn, the other
    splits are built in ``data_dir`` unless they are there.

    Raises:
      DataError: for an unknown split or kind.
    """
    suite, kinds = config.suite, check_suite(config, split)
    if split == "train":
        return DrawnClips(kinds, suite.train_size)
    made_from = _describe(kinds, split, suite.test_size, FRAME_SIZE)
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    directory = pathlib.Path(config.data_dir) / "suite" / f"{split}-t{suite.num_frames}-{digest}"
    return JsonlSource(build(directory, kinds, split, suite.test_size))


def _name(kind: Kind, split: str, number: int) -> str:
    return f"{kind.name(split)}-{number:05d}"


def _describe(kinds: Sequence[Kind], split: str, videos: int, size: int) -> dict[str, Any]:
    """What a set is made from, as JSON gives it back."""
    values = [dataclasses.asdict(kind) for kind in kinds]
    made_from = {"version": VERSION, "split": split, "videos": videos, "size": size}
    return json.loads(json.dumps(made_from | {"kinds": values}))


def _check_size(size: int, num_frames: int) -> None:
    """Refuses a side that H.264 or the digits cannot have, or that memory has no room for."""
    if size < _LEAST_SIZE or size % 2:
        raise DataError(f"size = {size} must be an even number of at least {_LEAST_SIZE} pixels")
    check_frames(num_frames, size)


def _check_same(root: pathlib.Path, made_from: dict[str, Any]) -> None:
    """Refuses a directory that holds another set, or of which nobody can tell."""
    try:
        stored = json.loads((root / BUILT).read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise DataError(
            f"{printable(str(root / BUILT))} is damaged ({printable(str(error))}): remove the set, "
            "or name another directory"
        ) from None
    if stored != made_from:
        raise DataError(
            f"{printable(str(root))} holds another set (see {BUILT} there); name another directory"
        )


def _numbers(kinds: Sequence[Kind], videos: int) -> Iterator[tuple[Kind, int]]:
    return itertools.product(kinds, range(videos))


def _write_videos(
    root: pathlib.Path, kinds: Sequence[Kind], split: str, videos: int, size: int, shown: bool
) -> None:
    jobs = [
        (str(root / "videos" / f"{_name(kind, split, number)}.mp4"), kind, split, number, size)
        for kind, number in _numbers(kinds, videos)
    ]
    jobs = [job for job in jobs if not os.path.isfile(job[0])]
    if not jobs:
        return
    remove_abandoned(root / "videos")
    with contextlib.ExitStack() as opened:
        many = sum(job[1].num_frames for job in jobs) > _FEW_FRAMES
        progress = Progress(f"{split} videos", len(jobs), unit="videos", shown=shown and many)
        opened.enter_context(progress)
        done: Iterator[None] = map(_write_video, *zip(*jobs, strict=True))
        if many:
            context = multiprocessing.get_context("spawn")  # a fork may inherit locked locks
            pool = concurrent.futures.ProcessPoolExecutor(
                os.cpu_count(), context, initializer=_begin
            )
            opened.enter_context(pool)
            with deaf_to_signals():
                done = pool.map(_write_video, *zip(*jobs, strict=True), chunksize=4)
        for _ in done:
            progress.update()


def _write_video(path: str, kind: Kind, split: str, number: int, size: int) -> None:
    write_bytes(path, encode(kind.frames(split, number, size)))


def _records(kinds: Sequence[Kind], split: str, videos: int) -> list[dict[str, Any]]:
    return [
        record
        for kind, number in _numbers(kinds, videos)
        for record in records_of(kind, split, number)
    ]


def _write_lines(root: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(record) for record in records]
    write_text(root / RECORDS, "\n".join(lines) + "\n")
    read = [json.dumps({name: record[name] for name in _READ}) for record in records]
    # The last that is written: where it is, all is.
    write_text(root / QUESTIONS, "\n".join(read) + "\n")


def _begin() -> None:
    """In a process that makes videos."""
    os.nice(5)  # what else this machine does at the time, such as training, comes first
    live_as_long_as_parent()
