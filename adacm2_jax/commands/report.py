"""What an answer rests on, as files to look at: ``adacm2 report``."""

import argparse
import importlib.util
import json
import os
import pathlib
import sys

from adacm2_jax.commands.ask import open_model, print_replies, reading_of, reply_line
from adacm2_jax.files import beside_path, check_writable, keep_earlier, write_text
from adacm2_jax.inference.picture import draw_memory
from adacm2_jax.inference.report import Report, counts_of, make_report, page
from adacm2_jax.runs.lock import locked_output


def report(args: argparse.Namespace) -> int:
    """``adacm2 report CLIP --model RUN --question … --output DIR``."""
    reading = reading_of(args)
    check_writable(args.output, f"--output {args.output}")
    model = open_model(args, compare=True)
    model.check(args.video, questions=args.question, **reading)
    with locked_output(args.output):
        study = model.study(args.video, args.question, **reading)
        paths = write_report(make_report(study, args.model), args.output)
    replies = [*study.replies, *(reply for other in study.beside.values() for reply in other)]
    if args.json:
        for reply in replies:
            print(json.dumps(reply_line(reply)))
    else:
        print_replies(replies)
        for path in paths:
            print(path)
    return 0


def write_report(made: Report, output: str | os.PathLike) -> list[pathlib.Path]:
    """Writes ``report.html``, and ``memory.png`` for each question; earlier ones get a number.

    Args:
      made: the report.
      output: a directory that is there.

    Returns:
      What was written.
    """
    directory, study = pathlib.Path(output), made.study
    html = directory / "report.html"
    earlier = [path for path in directory.glob("memory-*.png") if path.stem[7:].isdecimal()]
    keep_earlier(html, directory / "memory.png", *earlier)
    write_text(html, page(made))
    paths = [html]
    if reason := _no_picture(made):
        print(f"warning: no memory.png: {reason}", file=sys.stderr)
        return paths
    for number, reply in enumerate(study.replies):
        name = f"memory-{number + 1}.png" if number else "memory.png"
        path = directory / name
        beside = beside_path(path)
        try:
            draw_memory(
                beside,
                made.frames,
                study.kept[number],
                study.times,
                reply.question,
                reply.answer,
                counts_of(study, number),
                study.grid,
            )
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        paths.append(path)
    return paths


def _no_picture(made: Report) -> str:
    """Why there is nothing that matplotlib could draw, or draw with."""
    if not made.study.kept[0]:
        return "policy merge keeps means, which belong to no frame"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is missing: pip install 'adacm2-jax[run]'"
    return ""
