"""``adacm2 ablate``: memories side by side, over lengths, tasks and runs, from trained models.

Every cell of the grid is an evaluation (``commands/evaluate.py``): all memories read each frame in
one pass. A cell that was finished is left as it is, one that was killed goes on.
"""

import argparse
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adacm2_jax.commands import ablate_report
from adacm2_jax.commands.ablate_grid import (
    Cell,
    Grid,
    cells_of,
    grid_of,
    labels_of,
    of_model,
    sources_of,
)
from adacm2_jax.commands.evaluate import described, evaluate, task_of
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.app import directory
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.load import load_params
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.scoring.metrics import METRICS, answers_of, video_of
from adacm2_jax.tasks.task import Task


def ablate(args: argparse.Namespace) -> int:
    """Runs the grid and writes its tables; returns the exit status: 1 if videos were not read."""
    cells = cells_of(args)
    runs = labels_of(args.model)
    output = pathlib.Path(directory("output", args.output))
    check_writable(output, f"--output {args.output}")
    # All that can be wrong is found before anything is answered.
    grid = grid_of(args, cells, runs)
    with locked_output(output):
        sources = sources_of(grid, runs)
        answers, failed = _answers(grid, runs, cells, sources, output)
        if not answers:
            raise UserError("no video could be read: there is nothing to compare (metrics.json)")
        for written in ablate_report.write(answers, output, _about(args, grid, runs)):
            print(written)
    if failed:
        print(f"{failed} questions left out: their videos could not be read (see metrics.json)")
    return 1 if failed else 0


def _answers(
    grid: Grid,
    runs: Mapping[str, str],
    cells: Sequence[Cell],
    sources: Mapping[tuple[str, str], Sequence[Any]],
    output: pathlib.Path,
) -> tuple[list[dict[str, Any]], int]:
    """The rows of all cells, and how many questions' videos could not be read."""
    answers: list[dict[str, Any]] = []
    failed = 0
    for run, path in runs.items():
        opened, params, processor = None, None, None
        for cell in cells:
            place = grid[run, cell.name]
            experiment = place.experiment
            if (wanted := of_model(experiment)) != opened:
                params = None  # before others are read
                params = load_params(experiment, path)
                processor = Processor.load(pathlib.Path(path), experiment.model)
                opened = wanted
            assert params is not None and processor is not None
            answerer = Answerer(
                experiment.model,
                params,
                processor,
                place.memories,
                experiment.generation,
                experiment.seed,
            )
            print(f"{run}, {cell.name}:", flush=True)
            where = output / "cells" / run / cell.name
            lines, unread = run_cell(experiment, answerer, sources[run, cell.name], where)
            failed += unread
            answers += [{"run": run, "T": place.frames, **cell.shown, **line} for line in lines]
    return answers, failed


def _about(args: argparse.Namespace, grid: Grid, runs: Mapping[str, str]) -> str:
    """What the tables are of, in a sentence."""
    splits = dict.fromkeys(place.experiment.eval.split for place in grid.values())
    most = f", {args.limit} questions of a cell at most" if args.limit else ""
    return f"Models: {', '.join(runs)}. Split: {', '.join(splits)}{most}."


def run_cell(
    experiment: Experiment, answerer: Answerer, source: Sequence[Any], place: pathlib.Path
) -> tuple[list[dict[str, Any]], int]:
    """Answers one cell, unless that has been done.

    Args:
      experiment: of the cell.
      answerer: with its memories.
      source: its questions.
      place: its directory.

    Returns:
      A line for each answer that can be right or wrong: what ``predictions.jsonl`` says, and what
      is known of its question; and how many questions' videos could not be read.
    """
    task = task_of(experiment)
    of = described(experiment, answerer, source, task)
    results = _done(place, of) or evaluate(experiment, answerer, source, place, task, {"of": of})
    lines = _lines(place)
    known = _records(source)
    rows = [
        {
            "memory": line["policy"],
            "policy": answerer.models[line["policy"]].config.memory.policy,
            "id": line["id"],
            "video": video_of(line),
            "answer": line["answer"],
            "prediction": line["prediction"],
            "correct": _right(line, task),
            "kept_tokens": line["kept_tokens"],
            "total_tokens": line["total_tokens"],
            "category": line.get("category", ""),
            **known.get(line["id"], {}),
        }
        for line in lines
        if answers_of(line)
    ]
    return rows, len(results["failed"])


def _right(line: dict[str, Any], task: Task | None) -> int:
    """1 for a right answer, 0 for a wrong one: by the task's own metric, if it is of one."""
    if task is None:
        return int(line["correct"])
    return int(METRICS[task.metrics[0]]([line], (), 0)[""].value)


def _done(place: pathlib.Path, of: dict[str, str]) -> dict[str, Any] | None:
    """The results of a cell, if it was finished, is the same, and all its predictions are there."""
    try:
        results = json.loads((place / "metrics.json").read_text())
        if not isinstance(results, dict) or results.get("of") != of:
            return None
        there = Counter(line["policy"] for line in _lines(place))
        asked = {name: entry["questions"] for name, entry in results["policies"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return results if there == Counter(asked) and "failed" in results else None


def _lines(place: pathlib.Path) -> list[dict[str, Any]]:
    text = (place / "predictions.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _records(source: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What stands of each question in ``records.jsonl`` beside the file of the questions."""
    questions = getattr(source, "path", None)
    path = pathlib.Path(questions or "").parent / "records.jsonl"
    if not questions or not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except ValueError as error:
        raise UserError(
            f"{printable(str(path))} is damaged ({error}): build the set again, or move that file "
            "away if it is none of a generated set; what is answered stays"
        ) from None
    return {
        row["id"]: {name: row.get(name, "") for name in ablate_report.KNOWN}
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("id"), str)  # else of something else
    }
