"""``adacm2 questions``: a benchmark's questions as JSON lines, joined with the videos at hand.

The lines are what ``data.jsonl`` reads (docs/videos.md), and lmms-eval's tasks of ours.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable, write_text
from adacm2_jax.tasks.task import Item, every, find, items_of
from adacm2_jax.tasks.videos import videos_in

_MOST_NAMED = 5


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    made.add_argument("task", metavar="TASK", help=f"one of {', '.join(sorted(every()))}")
    made.add_argument(
        "--annotations", required=True, metavar="DIR", help="with the files as they are published"
    )
    made.add_argument(
        "--videos", required=True, metavar="DIR", help="with the videos, also in folders of it"
    )
    made.add_argument("--split", default="test", help="(default %(default)s)")
    made.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    made.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out questions whose video is not there, and say how many",
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(args: argparse.Namespace) -> int:
    """Writes the lines; returns the exit status. Imports no JAX."""
    try:
        _run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


def _run(args: argparse.Namespace) -> None:
    task = find(args.task)
    if args.split not in task.splits:
        raise UserError(f"--split {args.split!r}: {task.name} has {', '.join(task.splits)}")
    output = pathlib.Path(args.output)
    if output.is_dir():
        raise UserError(f"--output {printable(args.output)}: is a directory; name a file")
    check_writable(output.parent, f"--output {args.output}")
    files = videos_in(args.videos, "--videos")
    items = items_of(task, pathlib.Path(args.annotations), args.split)
    missing = sorted({item.video for item in items if item.video not in files})
    if missing and (not args.skip_missing or len(missing) == len({item.video for item in items})):
        more = ", …" if len(missing) > _MOST_NAMED else ""
        raise UserError(
            f"--videos {printable(args.videos)}: {len(missing)} video(s) of {task.name} are not "
            f"there: {printable(', '.join(missing[:_MOST_NAMED]))}{more}; --skip-missing leaves "
            "their questions out"
        )
    lines = [
        json.dumps(line, ensure_ascii=False) + "\n"
        for line in lines_of(items, files, output.parent)
    ]
    count = len(lines)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, "".join(lines))
    except OSError as error:
        raise UserError(f"--output {printable(args.output)}: {error.strerror}") from None
    left_out = f", {len(items) - count} left out: {len(missing)} videos missing" if missing else ""
    print(f"{printable(args.output)}: {count} questions{left_out}")


def lines_of(
    items: Sequence[Item], files: dict[str, pathlib.Path], beside: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """JSON lines of the items whose videos are there; paths are relative to ``beside``."""
    for item in items:
        if item.video not in files:
            continue
        line: dict[str, Any] = {
            "id": item.id,
            "video": os.path.relpath(files[item.video], beside),
            "question": item.question,
            "group": item.video,
        }
        if item.answers:
            line["answer"] = item.answers[0]
        if len(item.answers) > 1:
            line["answers"] = list(item.answers)
        if item.choices:
            line["choices"] = list(item.choices)
        for name in ("start", "end", "at", "category"):
            value = getattr(item, name)
            if value not in (None, ""):
                line[name] = value
        yield line
