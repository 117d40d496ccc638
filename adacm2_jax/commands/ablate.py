"""``adacm2 ablate``: memories side by side, over lengths, tasks and runs, from trained models.

Every cell of the grid is an evaluation (``commands/evaluate.py``): all memories read each frame in
one pass. A cell that was finished is left as it is, one that was killed goes on.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from adacm2_jax.commands import ablate_report
from adacm2_jax.commands.evaluate import check_questions, described, evaluate, task_of
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.grid import Memory, memories_of, overridden, value_of, varied
from adacm2_jax.runs.load import experiment_of, load_params
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.scoring.metrics import METRICS, answers_of, video_of
from adacm2_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place of the grid.

    Attributes:
      name: of its directory.
      frames: T of the videos; 0: the run's.
      fields: of the experiment, by their paths.
      shown: the values of those that vary, by their names: columns of the tables.
    """

    name: str
    frames: int
    fields: dict[str, Any]
    shown: dict[str, Any]


def ablate(args: argparse.Namespace) -> int:
    """Runs the grid and writes its tables; returns the exit status: 1 if videos were not read."""
    memories = [Memory.parse(text) for text in args.memory]
    tokens, frames = _numbers("--tokens", args.tokens), _numbers("--frames", args.frames)
    fixed = dict(_assigned(text) for text in args.set)
    cells = [
        Cell(_name(length, fields), length, fixed | fields, _shown(fields))
        for length in frames or [0]
        for fields in varied(args.vary)
    ]
    runs = {_label(path, args.model): path for path in args.model}
    check_writable(args.output, f"--output {args.output}")
    output = pathlib.Path(args.output)
    # All that can be wrong is found before anything is computed.
    grid = {
        (run, cell.name): _experiment(path, cell, args)
        for run, path in runs.items()
        for cell in cells
    }
    for (_, name), experiment in grid.items():
        memories_of(memories, experiment, _longest(experiment, name), tokens)
        _check_metric(task_of(experiment))
    answers: list[dict[str, Any]] = []
    failed = 0
    with locked_output(output):
        for run, path in runs.items():
            model = grid[run, cells[0].name]
            params = load_params(model, path)
            processor = Processor.load(path, model.model)
            for cell in cells:
                experiment = grid[run, cell.name]
                length = _longest(experiment, cell.name)
                answerer = Answerer(
                    experiment.model,
                    params,
                    processor,
                    memories_of(memories, experiment, length, tokens),
                    experiment.generation,
                    experiment.seed,
                )
                place = output / "cells" / run / cell.name
                print(f"{run}, {cell.name}:", flush=True)
                lines, unread = run_cell(experiment, answerer, place)
                failed += unread
                answers += [{"run": run, "T": length, **cell.shown, **line} for line in lines]
        if not answers:
            raise UserError("no question has a known answer: there is nothing to compare")
        for written in ablate_report.write(answers, output):
            print(written)
    if failed:
        print(f"{failed} questions left out: their videos could not be read (see metrics.json)")
    return 1 if failed else 0


def run_cell(
    experiment: Experiment, answerer: Answerer, place: pathlib.Path
) -> tuple[list[dict[str, Any]], int]:
    """Answers one cell, unless that has been done.

    Args:
      experiment: of the cell.
      answerer: with its memories.
      place: its directory.

    Returns:
      A line for each answer that can be right or wrong: what ``predictions.jsonl`` says, and what
      is known of its question; and how many questions' videos could not be read.
    """
    from data.sources import open_source

    source = open_source(experiment.data, experiment.eval.split)
    task = task_of(experiment)
    check_questions(experiment, answerer.processor, source, task)
    of = described(experiment, answerer, source, task)
    results = _done(place, of) or evaluate(experiment, answerer, source, place, task, {"of": of})
    lines = [json.loads(line) for line in (place / "predictions.jsonl").read_text().splitlines()]
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


def _check_metric(task: Task | None) -> None:
    if task and task.metrics[0] == "captions":
        raise UserError(
            f"task {task.name}: a caption is not right or wrong; compare memories by eval.py, with "
            "several eval.policies"
        )


def _done(place: pathlib.Path, of: dict[str, str]) -> dict[str, Any] | None:
    """The results of a cell, if it was finished and is the same."""
    try:
        results = json.loads((place / "metrics.json").read_text())
    except (OSError, ValueError):
        return None
    return results if results.get("of") == of else None


def _records(source: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What stands of each question in ``records.jsonl`` beside the file of the questions."""
    questions = getattr(source, "path", None)
    path = pathlib.Path(questions or "").parent / "records.jsonl"
    if not questions or not path.is_file():
        return {}
    rows = map(json.loads, path.read_text().splitlines())
    return {row["id"]: {name: row.get(name, "") for name in ablate_report.KNOWN} for row in rows}


def _experiment(path: str, cell: Cell, args: argparse.Namespace) -> Experiment:
    experiment = overridden(experiment_of(path), cell.fields, cell.frames)
    changes: dict[str, Any] = {"policies": ("adacm2",)}
    if args.split:
        changes["split"] = args.split
    if args.limit:
        changes["limit"] = args.limit
    return dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, **changes))


def _longest(experiment: Experiment, name: str) -> int:
    sampling = experiment.data.sampling
    frames = sampling.num_frames if sampling.mode == "uniform" else sampling.max_frames
    frames = experiment.eval.full_frames or frames
    if not frames:
        raise UserError(f"{name}: nobody says how long the longest video is; give --frames")
    return frames


def _name(frames: int, fields: dict[str, Any]) -> str:
    parts = [f"T{frames}"] if frames else []
    parts += [f"{path.rsplit('.', 1)[-1]}={value}" for path, value in fields.items()]
    return ",".join(parts).replace("/", "_") or "all"


def _shown(fields: dict[str, Any]) -> dict[str, Any]:
    return {path.rsplit(".", 1)[-1]: value for path, value in fields.items()}


def _label(path: str, paths: Sequence[str]) -> str:
    """The end of a path, two names of it or as many as tell it from the others."""
    parts = pathlib.Path(os.path.abspath(path)).parts
    for count in range(2, len(parts)):
        end = "/".join(parts[-count:])
        if sum(os.path.abspath(other).endswith(f"/{end}") for other in paths) == 1:
            return end.replace("/", "_")
    raise UserError(f"--model {printable(path)} is given twice; leave one out")


def _numbers(flag: str, text: str | None) -> list[int]:
    if text is None:
        return []
    numbers = [value_of(part) for part in text.split(",")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(f"{flag} {printable(text[:60])} must be whole numbers, such as 16,64,256")
    return numbers


def _assigned(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {printable(text[:60])} must be FIELD=VALUE")
    return name, value_of(value)
