"""The grid of ``adacm2 ablate``: its cells, and all that can be wrong with them.

Everything here happens before a parameter is read.
"""

import argparse
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adacm2_jax.commands import ablate_report
from adacm2_jax.commands.evaluate import check_questions, check_videos, task_of
from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError, printable
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.experiment import MAY_CHANGE, Experiment, difference, to_dict
from adacm2_jax.runs.grid import (
    OF_THE_RUN,
    Memory,
    check_once,
    memories_of,
    overridden,
    value_of,
    varied,
)
from adacm2_jax.runs.load import check_params, experiment_of
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


@dataclasses.dataclass(frozen=True)
class Place:
    """What a run is asked in a cell.

    Attributes:
      experiment: of the run, with the cell's fields.
      frames: T of its videos.
      memories: by their labels.
    """

    experiment: Experiment
    frames: int
    memories: dict[str, MemoryConfig]


Grid = dict[tuple[str, str], Place]


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The cells that a command line names."""
    fixed: dict[str, Any] = {}
    for text in args.set:
        name, value = _assigned(text)
        if name in fixed:
            raise UserError(f"--set {name} is there twice; leave one out")
        fixed[name] = value
    combined, frames = varied(args.vary), _numbers("--frames", args.frames)
    _check_fields(fixed, combined[0], args)
    columns = _columns(list(combined[0]))
    return [
        Cell(
            _name(length, columns, fields),
            length,
            fixed | fields,
            {columns[name]: value for name, value in fields.items()},
        )
        for length in frames or [0]
        for fields in combined
    ]


def _check_fields(fixed: Mapping, vary: Mapping, args: argparse.Namespace) -> None:
    """Refuses fields that something else sets, so that their values would count for nothing."""
    lengths = r"data\.sampling\.(num|max)_frames|data\.\w+\.num_frames|eval\.full_frames"
    owners = [
        (r"eval\.policies", "--memory", True),
        (rf"model\.memory\.(?!({'|'.join(OF_THE_RUN)})$).*", "--memory, for each memory", True),
        (r"eval\.split", "--split", bool(args.split)),
        (r"eval\.limit", "--limit", bool(args.limit)),
        (lengths, "--frames", bool(args.frames)),
    ]
    for flag, names in (("--set", fixed), ("--vary", vary)):
        for name in names:
            shown = f"{flag} {printable(name[:60])}"
            if flag == "--vary" and name in fixed:
                raise UserError(f"{shown}: --set gives it a value, too; leave one out")
            for fields, owner, there in owners:
                if there and re.fullmatch(fields, name):
                    raise UserError(f"{shown} is set by {owner}; leave it out")


def grid_of(args: argparse.Namespace, cells: Sequence[Cell], runs: Mapping[str, str]) -> Grid:
    """Every run in every cell.

    Raises:
      UserError: for what cannot be, and for runs of which there is no one accuracy, for their
        memories or questions are not of a kind.
    """
    from data.sources import check_source

    memories = [Memory.parse(text) for text in args.memory]
    tokens = _numbers("--tokens", args.tokens)
    grid: Grid = {}
    for run, path in runs.items():
        stored = experiment_of(path)
        for cell in cells:
            experiment = _experiment(stored, cell, args)
            frames = _longest(experiment, cell.name)
            held = memories_of(memories, experiment, frames, tokens)
            grid[run, cell.name] = Place(experiment, frames, held)
            check_metric(task_of(experiment))
            check_source(experiment.data, experiment.eval.split)
    first = next(iter(runs))
    for (run, name), place in grid.items():
        if run != first:
            _check_alike(grid[first, name], place, f"{name}: the models {first} and {run}")
    for run, path in runs.items():
        for place in _each_model(grid, run, cells):
            check_params(place.experiment, path)
    return grid


def _check_alike(one: Place, other: Place, what: str) -> None:
    """Refuses accuracies over runs that do not hold the same."""
    if one.frames != other.frames:
        return  # lines of their own in every table
    tokens = [place.experiment.model.vision.tokens_per_frame for place in (one, other)]
    if tokens[0] != tokens[1]:
        raise UserError(
            f"{what} have {tokens[0]} and {tokens[1]} tokens a frame; compare them each by itself"
        )
    for label, memory in one.memories.items():
        if memory != other.memories[label]:
            raise UserError(
                f"{what} would not have the same memory {label}, for their ratios differ; give "
                "it a size, or --set model.memory.recent_ratio and conserve_ratio"
            )
    if lines := difference(_asked(one.experiment), _asked(other.experiment)):
        changed = " ".join(line.strip() for line in lines[:2])
        raise UserError(
            f"{what} would be asked otherwise ({printable(changed[:200])}): there is no one "
            "accuracy of both; --set that field, or give --split"
        )


def _asked(experiment: Experiment) -> dict[str, Any]:
    """What is asked, and how; models may have generated videos of their own, each by its seed."""
    values = to_dict(experiment)
    data, split = values["data"], experiment.eval.split
    fields = {name: data[name] for name in ("source", "prompt", "sampling", "resize")}
    own = data.get(experiment.data.source, {})
    if experiment.data.source == "jsonl":
        own = {split: own.get(split)}
    own = {name: own[name] for name in own if name not in ("seed", "train_size", "drawn")}
    asked = {"split": split, "limit": experiment.eval.limit}
    return {
        "data": fields | {experiment.data.source: own},
        "eval": asked,
        "generation": values["generation"],
    }


def sources_of(grid: Grid, runs: Mapping[str, str]) -> dict[tuple[str, str], Sequence[Any]]:
    """The questions of every run in every cell; generated ones are made where they are not yet.

    Raises:
      UserError: for questions that cannot be read or answered, or of which no answer is known.
    """
    from data.sources import open_source

    sources: dict[tuple[str, str], Sequence[Any]] = {}
    for (run, name), place in grid.items():
        experiment = place.experiment
        source = open_source(experiment.data, experiment.eval.split)
        check_videos(source, experiment.eval.split)
        processor = Processor.load(pathlib.Path(runs[run]), experiment.model)
        check_questions(experiment, processor, source, task_of(experiment))
        examples = itertools.islice(source, experiment.eval.limit or None)
        if not any(each.answer is not None or each.answers for each in examples):
            raise UserError(
                f"{name}: no question of split {experiment.eval.split!r} has a known answer: there "
                "is nothing to compare; add them, or name another --split"
            )
        sources[run, name] = source
    return sources


def of_model(experiment: Experiment) -> dict[str, Any]:
    """What parameters depend on: cells in which it is the same share them."""
    values = to_dict(experiment)
    model = {name: value for name, value in values["model"].items() if name != "memory"}
    more = {name: values[name] for name in ("init_from", "init_missing", "mesh", "seed")}
    return {"model": model, "step": experiment.eval.step, "optim": values["optim"], **more}


def _each_model(grid: Grid, run: str, cells: Sequence[Cell]) -> list[Place]:
    """One cell of a run for all that its parameters may be."""
    found: list[Place] = []
    for cell in cells:
        place = grid[run, cell.name]
        if of_model(place.experiment) not in [of_model(each.experiment) for each in found]:
            found.append(place)
    return found


def check_metric(task: Task | None) -> None:
    if task and task.metrics[0] == "captions":
        raise UserError(
            f"task {task.name}: a caption is not right or wrong; compare memories by eval.py, with "
            "several eval.policies"
        )


def _experiment(stored: Experiment, cell: Cell, args: argparse.Namespace) -> Experiment:
    experiment = overridden(stored, cell.fields, cell.frames)
    if lines := difference(to_dict(stored), to_dict(experiment), MAY_CHANGE["evaluate"]):
        changed = " ".join(line.strip() for line in lines[:2])
        raise UserError(
            f"{cell.name}: the model was not trained so ({printable(changed[:200])}); leave that "
            "field out, or train another run"
        )
    changes: dict[str, Any] = {"policies": ("adacm2",)}
    if args.split:
        changes["split"] = args.split
    if args.limit:
        changes["limit"] = args.limit
    return dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, **changes))


def _longest(experiment: Experiment, name: str) -> int:
    """T: of uniform sampling the frames that are taken, else the most that can be."""
    sampling = experiment.data.sampling
    if sampling.mode == "uniform":
        return sampling.num_frames
    frames = experiment.eval.full_frames or sampling.max_frames
    if not frames:
        raise UserError(f"{name}: nobody says how long the longest video is; give --frames")
    return frames


def _columns(paths: Sequence[str]) -> dict[str, str]:
    """What fields are called in the tables: their last names, where nothing else is called so."""
    last = {path: path.rsplit(".", 1)[-1] for path in paths}
    times = Counter(last.values())
    return {
        path: path if times[name] > 1 or name in ablate_report.COLUMNS else name
        for path, name in last.items()
    }


def _name(frames: int, columns: Mapping[str, str], fields: Mapping[str, Any]) -> str:
    """Of a cell's directory."""
    parts = [f"T{frames}"] if frames else []
    parts += [f"{columns[path]}={value}" for path, value in fields.items()]
    whole = ",".join(parts) or "all"
    name = printable(whole).replace("/", "_")[:120]
    if name == whole:
        return name
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def labels_of(paths: Sequence[str]) -> dict[str, str]:
    """Every run's path, by its end: two names of it, or as many as tell it from the others."""
    real = [os.path.realpath(path) for path in paths]
    for path, place in zip(paths, real, strict=True):
        if real.count(place) > 1:
            raise UserError(f"--model {printable(path)} is given twice; leave one out")
    parts = [pathlib.Path(os.path.abspath(path)).parts[1:] for path in paths]
    for count in range(2, max(2, *map(len, parts)) + 1):
        labels = ["_".join(each[-count:]) or "root" for each in parts]
        if len(set(labels)) == len(labels):
            return dict(zip(labels, paths, strict=True))
    raise UserError(f"--model {printable(paths[0])} and others have one name; rename one of them")


def _numbers(flag: str, text: str | None) -> list[int]:
    if text is None:
        return []
    numbers = [value_of(part) for part in text.split(",")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise UserError(
            f"{flag} {printable(text[:60])} must be whole numbers of at least 1, such as 16,64,256"
        )
    check_once(f"{flag} {printable(text[:60])}", numbers)
    return numbers


def _assigned(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {printable(text[:60])} must be FIELD=VALUE")
    return name, value_of(value)
