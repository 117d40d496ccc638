"""A benchmark as a TFDS data set: array_record, one record a video, without TensorFlow.

    python -m data.benchmark.build lvu_scene --annotations lvu --videos lvu/videos --data-dir data

A record holds ``name``, ``video`` (the file's own bytes; of extracted frames a Motion-JPEG stream
of the JPEGs' own bytes) and ``items``, all that is asked of it as a list in JSON. So a video is
stored once, whatever is asked. Beside the records are ``items.json`` (``start`` and ``end`` of
each record's items) and ``report.json``: what is missing, cannot be decoded, is shorter than its
annotation says, or is in several splits. Nothing is left out without a line there and a number on
the terminal.

Shards of some videos each are written by worker processes, beside their place and then renamed;
the same command goes on after those that are there, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError, UserError, printable
from adacm2_jax.files import check_writable, write_text
from adacm2_jax.progress import Progress
from adacm2_jax.tasks.task import Item, find
from adacm2_jax.tasks.videos import videos_in
from data.benchmark.check import check
from data.benchmark.source import INDEX, read_items, state_of
from data.workers import deaf_to_signals, live_as_long_as_parent

VERSION = "1.0.0"
#: Videos of a shard.
SHARD = 32
_NAMED = 3
#: What a build knows of its splits, for one that builds others.
_MADE = ".splits.json"


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard to write: its place, and its videos with what is asked of them."""

    path: Path
    videos: tuple[tuple[str, Path, tuple[Item, ...]], ...]


def features() -> Any:
    """Of a record."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "name": tfds.features.Text(),
            "video": tfds.features.Tensor(shape=(), dtype=np.bytes_),
            "items": tfds.features.Text(),
        }
    )


def build(
    name: str,
    annotations: str,
    videos: str,
    data_dir: str,
    splits: Sequence[str] = (),
    workers: int = 0,
    shard: int = SHARD,
    runner: str = "local",
    beam: Sequence[str] = (),
) -> Path:
    """Builds splits of a task; what is there already stays.

    Args:
      name: of the task.
      annotations, videos: directories of its annotation and of its videos or frames.
      data_dir: where data sets are; this one goes to ``NAME/1.0.0`` in it.
      splits: by default all of the task.
      workers: processes; 0 for one a core.
      shard: videos of a shard.
      runner: ``local``, or a runner of Apache Beam, for sets that are too large for one machine.
      beam: options of Beam, such as ``project=…``.

    Returns:
      The directory of the data set, for ``data.task.built``.

    Raises:
      DataError: if an annotation cannot be read, or no video of a split can.
    """
    splits = tuple(splits) or find(name).splits
    files = videos_in(videos, "--videos")
    items = {split: read_items(name, annotations, split) for split in splits}
    root = Path(data_dir) / name / VERSION
    check_writable(root, f"--data-dir {data_dir}")
    for split, asked in items.items():  # before anything that is there is touched
        if not {item.video for item in asked} & set(files):
            raise DataError(f"task {name}, split {split}: no video of it is in {printable(videos)}")
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        made = _made_before(root, splits)
        for file in (INDEX, "dataset_info.json"):  # until all is there nobody reads a part of it
            (root / file).unlink(missing_ok=True)
        for split, asked in items.items():
            missing, jobs = _jobs(root, name, split, asked, files, shard)
            results = _write_all(jobs, workers, f"{name}, {split}", runner, beam)
            made[split] = _told_of(asked, missing, results)
            if not made[split]["items"]:
                first, why = next(iter(made[split]["report"]["corrupt"].items()))
                raise DataError(
                    f"task {name}, split {split}: no video of it can be decoded; the first, "
                    f"{printable(first)}: {printable(why)}"
                )
        _describe(
            root,
            name,
            {split: entry["items"] for split, entry in made.items()},
            {split: entry["shards"] for split, entry in made.items()},
        )
        report = {"leaks": _leaks({split: entry["names"] for split, entry in made.items()})}
        report |= {split: entry["report"] for split, entry in made.items()}
        write_text(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_text(root / _MADE, json.dumps(made))
    return root


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Raises ``DataError`` while another process builds here."""
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"--data-dir: another build is writing {printable(str(root))}; wait for it"
            ) from None
        yield


def _made_before(root: Path, splits: Sequence[str]) -> dict[str, Any]:
    """What is known of the other splits that are there, whole."""
    try:
        found = json.loads((root / _MADE).read_text())
    except (OSError, ValueError):
        return {}
    return {split: entry for split, entry in found.items() if split not in splits}


def _told_of(asked: Sequence[Item], missing: list[str], results: list[list[dict]]) -> dict:
    """Of a split: items of each record, records of each shard, names of its videos, its report."""
    found = [line for result in results for line in result]
    names = sorted({item.video for item in asked})
    report = {
        "videos": len(names),
        "questions": len(asked),
        "kept": sum(line.get("items", 0) for line in found),
        "missing": missing,
        "corrupt": {line["name"]: line["error"] for line in found if "error" in line},
        "mismatched": {line["name"]: line["mismatch"] for line in found if "mismatch" in line},
    }
    return {
        # Of shards of an earlier version only how many they are.
        "items": [line.get("windows") or line["items"] for line in found if line.get("items")],
        "shards": [sum(bool(line.get("items")) for line in result) for result in results],
        "names": names,
        "report": report,
    }


def _leaks(videos: dict[str, list[str]]) -> dict[str, list[str]]:
    """Videos that are in several splits: ``train & test`` → their names."""
    names = {split: set(found) for split, found in videos.items()}
    return {
        f"{one} & {other}": sorted(names[one] & names[other])
        for one, other in itertools.combinations(names, 2)
        if names[one] & names[other]
    }


def _jobs(
    root: Path, name: str, split: str, items: list[Item], files: dict[str, Path], shard: int
) -> tuple[list[str], list[Job]]:
    by_video: dict[str, list[Item]] = collections.defaultdict(list)
    for item in items:
        by_video[item.video].append(item)
    missing = sorted(set(by_video) - set(files))
    there = [(video, files[video], tuple(by_video[video])) for video in by_video if video in files]
    parts = [tuple(there[start : start + shard]) for start in range(0, len(there), shard)]
    total = len(parts)
    jobs = [
        Job(root / f"{name}-{split}.array_record-{number:05}-of-{total:05}", part)
        for number, part in enumerate(parts)
    ]
    # Of an earlier build of more or fewer videos.
    for path in set(root.glob(f"{name}-{split}.array_record-*")) - {job.path for job in jobs}:
        path.unlink()
        path.with_name(f".{path.name}.json").unlink(missing_ok=True)
    return missing, jobs


def _write_all(
    jobs: list[Job], workers: int, what: str, runner: str, beam: Sequence[str]
) -> list[list[dict]]:
    """Writes the shards that are not there; what is known of the videos of each."""
    left = [job for job in jobs if _result(job) is None]
    if left and runner != "local":
        from data.benchmark import beam as pipeline

        pipeline.write(left, runner, beam)
    elif left:
        context = multiprocessing.get_context("spawn")  # a fork may inherit locked locks
        workers = min(workers or os.cpu_count() or 1, len(left))
        with (
            Progress(what, len(jobs), unit="shards", initial=len(jobs) - len(left)) as progress,
            concurrent.futures.ProcessPoolExecutor(
                workers, context, initializer=live_as_long_as_parent
            ) as pool,
        ):
            with deaf_to_signals():
                written = pool.map(write_shard, left)
            for _ in written:
                progress.update()
    return [_result(job) or [] for job in jobs]


def _result_path(job: Job) -> Path:
    """Where what is known of a shard stands; written after the shard, so both are whole."""
    return job.path.with_name(f".{job.path.name}.json")


def _result(job: Job) -> list[dict] | None:
    """What is known of a shard; None if it is not there, or of other files or questions."""
    try:
        found = json.loads(_result_path(job).read_text())
        same = found["of"] == _digest(job) and found["bytes"] == job.path.stat().st_size
        return list(found["videos"]) if same else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _digest(job: Job) -> str:
    """Changes when the shard's files or questions do."""
    stats = [(path.name, state_of(path)) for _, path, _ in job.videos]
    asked = [(name, items) for name, _, items in job.videos]
    return hashlib.sha256(repr((VERSION, stats, asked)).encode()).hexdigest()


def write_shard(job: Job) -> None:
    """Reads, checks and writes the videos of one shard."""
    from array_record.python import array_record_module
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    beside = job.path.with_name(f".{job.path.name}.partial")
    made, lines = features(), []
    serializer = ExampleSerializer(made.get_serialized_info())
    writer = array_record_module.ArrayRecordWriter(str(beside), "group_size:1")
    try:
        for name, path, items in job.videos:
            line, video, items = check(name, path, items)
            line["windows"] = [(item.start, item.end) for item in items]
            lines.append(line)
            if items:
                record = {"name": name, "video": video, "items": _as_json(items)}
                example = serializer.get_tf_example(made.encode_example(record))
                # Else every process has its own order of the fields.
                writer.write(example.SerializeToString(deterministic=True))
    finally:
        writer.close()
    size = beside.stat().st_size
    beside.replace(job.path)
    told = {"of": _digest(job), "bytes": size, "videos": lines}
    write_text(_result_path(job), json.dumps(told))


def _as_json(items: Sequence[Item]) -> str:
    return json.dumps([dataclasses.asdict(item) for item in items], ensure_ascii=False)


def _describe(root: Path, name: str, items: dict[str, list], shards: dict[str, list[int]]) -> None:
    """Writes what TFDS reads a data set by, and the index."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=root,
        dataset_name=name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    tfds.folder_dataset.write_metadata(
        data_dir=root,
        features=features(),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=shards[split],
                num_bytes=0,
                filename_template=template.replace(split=split),
            )
            for split in items
        ],
        filename_template=template,
        check_data=False,
    )
    write_text(root / INDEX, json.dumps(items))


def told(root: Path) -> list[str]:
    """The report in lines for a terminal."""
    report = json.loads((root / "report.json").read_text())
    lines = []
    for split, found in report.items():
        if split == "leaks":
            continue
        kinds = {kind: found[kind] for kind in ("missing", "corrupt", "mismatched")}
        said = ", ".join(f"{len(those)} {kind}" for kind, those in kinds.items())
        left_out = found["questions"] - found["kept"]
        said += f"; {left_out} of {found['questions']} questions left out" if left_out else ""
        lines.append(f"{split}: {found['videos']} videos; {said}")
        for kind, those in kinds.items():
            for video in list(those)[:_NAMED]:
                why = f": {printable(those[video])}" if isinstance(those, dict) else ""
                lines.append(f"  {kind} {printable(video)}{why}")
    for pair, names in report["leaks"].items():
        lines.append(f"{len(names)} video(s) in {pair}: {printable(', '.join(names[:_NAMED]))}")
    return [*lines, f"all of it: {root / 'report.json'}", f"--config.data.task.built={root}"]


def _check_runner(runner: str, options: Sequence[str]) -> None:
    """Before anything is read.

    Raises:
      UserError: if options are given to no runner, or Beam is not installed.
    """
    if runner == "local" and options:
        raise UserError(f"--beam={options[0]} is for a runner of Beam; name one by --runner")
    if runner != "local" and importlib.util.find_spec("apache_beam") is None:
        raise UserError(f"--runner={runner} needs Apache Beam: pip install apache-beam")
    if runner != "local":
        from data.beam_runner import options_of

        options_of(runner, options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.benchmark.build",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--annotations", required=True, metavar="DIR", help="as published")
    parser.add_argument("--videos", required=True, metavar="DIR", help="or of extracted frames")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="for data sets")
    parser.add_argument("--split", action="append", default=[], help="by default all")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    parser.add_argument(
        "--runner",
        default="local",
        help="or direct, dataflow, flink: Apache Beam's (default: local)",
    )
    parser.add_argument(
        "--beam", action="append", default=[], metavar="NAME=VALUE", help="an option of Beam"
    )
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error(f"--workers {args.workers} must be at least 0")
    try:
        _check_runner(args.runner, args.beam)
        root = build(
            args.task,
            args.annotations,
            args.videos,
            args.data_dir,
            args.split,
            args.workers,
            runner=args.runner,
            beam=args.beam,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record's, of a full disk
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        where, why = printable(args.data_dir), getattr(error, "strerror", None) or error
        print(f"error: --data-dir {where}: {printable(str(why)[:200])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the shards that are there", flush=True)
        return 130
    print("\n".join(told(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
