"""A benchmark as a TFDS data set: array_record, one record a video, without TensorFlow.

    python -m data.benchmark.build lvu_scene --annotations lvu --videos lvu/videos --data-dir data

A record holds ``name``, ``video`` (the file's own bytes; of extracted frames a Motion-JPEG stream
of the JPEGs' own bytes) and ``items``, all that is asked of it as a list in JSON. So a video is
stored once, whatever is asked. Beside the records are ``items.json`` (how many items each record
has) and ``report.json``: what is missing, cannot be decoded, is shorter than its annotation says,
or is in several splits. Nothing is left out without a line there and a number on the terminal.

Shards of some videos each are written by worker processes, beside their place and then renamed;
the same command goes on after those that are there, and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError, UserError, printable
from adacm2_jax.files import check_writable
from adacm2_jax.progress import Progress
from adacm2_jax.tasks.task import Item, find
from adacm2_jax.tasks.videos import videos_in
from adacm2_jax.video.frames import Sampling, read_frames
from adacm2_jax.video.jpegs import as_video
from data.benchmark.source import INDEX, read_items
from data.workers import deaf_to_signals, live_as_long_as_parent

VERSION = "1.0.0"
#: Videos of a shard.
SHARD = 32
#: Seconds by which an annotation may be longer than its video.
SLACK = 1.0
_NAMED = 3


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
    root.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"leaks": _leaks(items)}
    counts: dict[str, list[int]] = {}
    shards: dict[str, list[int]] = {}
    for split, asked in items.items():
        missing, jobs = _jobs(root, name, split, asked, files, shard)
        if not jobs:
            raise DataError(f"task {name}, split {split}: no video of it is in {printable(videos)}")
        results = _write_all(jobs, workers, f"{name}, {split}", runner, beam)
        found = [line for result in results for line in result]
        report[split] = {
            "videos": len({item.video for item in asked}),
            "missing": missing,
            "corrupt": {line["name"]: line["error"] for line in found if "error" in line},
            "mismatched": {line["name"]: line["mismatch"] for line in found if "mismatch" in line},
        }
        counts[split] = [line["items"] for line in found if line.get("items")]
        shards[split] = [sum(bool(line.get("items")) for line in result) for result in results]
        if not counts[split]:
            raise DataError(f"task {name}, split {split}: no video of it can be decoded")
    _describe(root, name, counts, shards)
    (root / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return root


def _leaks(items: dict[str, list[Item]]) -> dict[str, list[str]]:
    """Videos that are in several splits: ``train & test`` → their names."""
    names = {split: {item.video for item in found} for split, found in items.items()}
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
    except (OSError, ValueError):
        return None
    return found["videos"] if job.path.exists() and found["of"] == _digest(job) else None


def _digest(job: Job) -> str:
    """Changes when the shard's files or questions do."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for _, path, _ in job.videos]
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
            lines.append(line)
            if items:
                record = {"name": name, "video": video, "items": _as_json(items)}
                example = serializer.get_tf_example(made.encode_example(record))
                # Else every process has its own order of the fields.
                writer.write(example.SerializeToString(deterministic=True))
    finally:
        writer.close()
    beside.replace(job.path)
    result = _result_path(job)
    partial = result.with_name(f"{result.name}.partial")
    partial.write_text(json.dumps({"of": _digest(job), "videos": lines}))
    partial.replace(result)


def check(
    name: str, path: Path, items: tuple[Item, ...]
) -> tuple[dict[str, Any], bytes, tuple[Item, ...]]:
    """A video, and whether it is what its annotation says.

    Returns:
      What is known of it (``name``; ``items``, how many are kept; ``error``, why it cannot be
      decoded; ``mismatch``, where its annotation goes beyond it), its bytes, and the items that are
      kept: an end behind the video's becomes the video's; what begins behind it is left out.
    """
    try:
        video = as_video(path) if path.is_dir() else path.read_bytes()
        # The first picture and the last: a file that is cut short has no last one.
        count, chunks = read_frames(video, Sampling("uniform", num_frames=2), size=16)
        last = None
        for chunk in chunks:
            last = chunk
        if last is None or not count:
            raise DataError("it has no picture")
        seconds = _duration(video)
    except (DataError, OSError) as error:
        return {"name": name, "error": str(error)[:300]}, b"", ()
    kept, beyond = [], []
    for item in items:
        if (item.start or 0.0) >= seconds:
            beyond.append(f"{item.id}: begins at {item.start:g} s, left out")
        elif item.end is not None and item.end > seconds + SLACK:
            beyond.append(f"{item.id}: ends at {item.end:g} s, read to the video's end")
            kept.append(dataclasses.replace(item, end=None))
        else:
            kept.append(item)
    line: dict[str, Any] = {"name": name, "items": len(kept)}
    if beyond:
        more = f" and {len(beyond) - _NAMED} more" if len(beyond) > _NAMED else ""
        line["mismatch"] = f"lasts {seconds:.2f} s; {'; '.join(beyond[:_NAMED])}{more}"
    return line, video, tuple(kept)


def _duration(video: bytes) -> float:
    from adacm2_jax.video.decoder import Decoder

    return Decoder(video).duration


def _as_json(items: Sequence[Item]) -> str:
    return json.dumps([dataclasses.asdict(item) for item in items], ensure_ascii=False)


def _describe(
    root: Path, name: str, counts: dict[str, list[int]], shards: dict[str, list[int]]
) -> None:
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
            for split in counts
        ],
        filename_template=template,
        check_data=False,
    )
    partial = root / f".{INDEX}.partial"
    partial.write_text(json.dumps(counts))
    partial.replace(root / INDEX)


def told(root: Path) -> list[str]:
    """The report in lines for a terminal."""
    report = json.loads((root / "report.json").read_text())
    lines = []
    for split, found in report.items():
        if split == "leaks":
            continue
        kinds = {kind: found[kind] for kind in ("missing", "corrupt", "mismatched")}
        said = ", ".join(f"{len(those)} {kind}" for kind, those in kinds.items())
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
    except OSError as error:
        where = printable(args.data_dir)
        print(f"error: --data-dir {where}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the shards that are there", flush=True)
        return 130
    print("\n".join(told(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
