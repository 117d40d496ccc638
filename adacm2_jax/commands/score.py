"""``adacm2 score``: the figures of predictions that are on disk, without a model."""

import argparse
import json
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import write_json
from adacm2_jax.scoring.metrics import METRICS
from adacm2_jax.scoring.report import score, table
from adacm2_jax.tasks.task import every, find


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    made.add_argument("predictions", metavar="PREDICTIONS", help="a predictions.jsonl of a split")
    made.add_argument("--task", metavar="NAME", help=f"one of {', '.join(sorted(every()))}")
    made.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help=f"instead of the task's; may be given several times: {', '.join(sorted(METRICS))}",
    )
    made.add_argument(
        "--train-answers",
        metavar="FILE",
        help="answers of the training split, whose most frequent is a constant guess: JSON lines "
        "with answer, or a text with one a line",
    )
    made.add_argument(
        "--seed", type=int, default=0, help="of the resampling of videos (default %(default)s)"
    )
    made.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(args: argparse.Namespace) -> int:
    """Prints the figures; returns the exit status. Imports no JAX."""
    if hasattr(signal, "SIGPIPE"):  # `… | head` ends it like every command that prints
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        _run(args)
    except UserError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


def _run(args: argparse.Namespace) -> None:
    if not args.task and not args.metric:
        raise UserError("--task is missing: name the benchmark, or a --metric")
    task = find(args.task) if args.task else None
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must be at least 0")
    rows = read_rows(args.predictions)
    names = tuple(args.metric or []) or with_beams(task.metrics if task else (), rows)
    train = read_answers(args.train_answers) if args.train_answers else []
    found = score(rows, names, train, args.seed)
    if not any(entry["scored"] for entry in found.values()):
        raise UserError(
            f"{printable(args.predictions)}: no line has the right answer; nothing to score"
        )
    print(table(found))
    if args.output:
        try:
            write_json(args.output, {"task": args.task or "", "scores": found})
        except OSError as error:
            where = printable(args.output)
            raise UserError(f"--output {where}: cannot be written: {error.strerror}") from None


def with_beams(names: tuple[str, ...], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The metrics without those of five beams where the predictions have fewer, which is said."""
    fewest = min(len(row.get("n_best") or ()) for row in rows)
    left_out = [name for name in names if name.endswith("top5") and fewest < 5]
    if left_out:
        print(
            f"warning: {', '.join(left_out)} needs the five best answers of each question "
            f"(generation.num_return=5); there are {max(fewest, 1)}; left out",
            file=sys.stderr,
        )
    return tuple(name for name in names if name not in left_out)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


#: What fields of a prediction hold, where they are there and not null.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "prediction": _is_text,
    "question": _is_text,
    "answer": _is_text,
    "answers": _all(_is_text),
    "choices": _all(_is_text),
    "choice_log_probs": _all(_is_number),
    "choice_tokens": _all(_is_number),
    "n_best": _all(lambda beam: isinstance(beam, dict) and _is_text(beam.get("text"))),
    "policy": _is_text,
    "category": _is_text,
}


def read_rows(path: str) -> list[dict[str, Any]]:
    """The lines of ``predictions.jsonl``.

    Raises:
      UserError: naming the first line that is none.
    """
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not {"id", "question", "prediction"} <= set(row):
            raise UserError(
                f"{printable(path)}: line {number} is no prediction: give a predictions.jsonl that "
                "eval.py wrote"
            )
        for name, holds in _FIELDS.items():
            value = row.get(name)
            if not (holds(value) if value is not None else name not in ("prediction", "question")):
                raise UserError(
                    f"{printable(path)}: line {number}: {name} is {printable(repr(value)[:60])}, "
                    "not what eval.py writes; give a file that it wrote"
                )
        rows.append(row)
    if not rows:
        raise UserError(f"{printable(path)}: has no predictions")
    return rows


def read_answers(path: str) -> list[str]:
    """Answers of JSON lines (``answer``, or the first of ``answers``), or of a text's lines.

    Raises:
      UserError: if there is none.
    """
    answers = []
    for line in _text(path).split("\n"):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            several = entry.get("answers") or [entry.get("answer")]
            first = several[0] if isinstance(several, list) else None
            answers += [first] if isinstance(first, str) else []
        else:
            answers.append(line.strip())
    if not answers:
        raise UserError(f"--train-answers {printable(path)}: has no answers")
    return answers


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such file: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{printable(path)}: cannot be read: {error}") from None
