"""Which checkpoint of a run answers: ``eval.select`` names the split that says so."""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from adacm2_jax.commands.evaluate import evaluate
from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import write_json
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.partial import describe
from adacm2_jax.runs.workdir import is_base, saved_steps
from adacm2_jax.tasks.task import Task

#: Of captions their sum is compared, as LAVIS and MA-LMM do.
CAPTIONS = ("CIDEr", "BLEU_4", "METEOR", "ROUGE_L")


def check(experiment: Experiment, weights: str | os.PathLike, video: bool = False) -> None:
    """Whether what has been asked for can be had; ``video``: for one video.

    Raises:
      UserError: if ``eval.step`` or ``eval.select`` is set and this is no run, or the run has no
        such step.
    """
    settings = experiment.eval
    asked = {"eval.step": settings.step, "eval.select": settings.select}
    if settings.select and video:
        raise UserError("eval.select chooses for a split; name a step for a --video by eval.step")
    named = [f"{name}={value}" for name, value in asked.items() if value]
    if not named:
        return
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: a step is named, or it is chosen; leave one out")
    place = printable(os.fspath(weights))
    if is_base(weights) or not saved_steps(weights):
        raise UserError(f"{named[0]}: {place} is no run with checkpoints; leave it out")
    if settings.step and settings.step not in saved_steps(weights):
        there = ", ".join(map(str, saved_steps(weights)))
        raise UserError(
            f"eval.step={settings.step}: {place} has kept steps {there}; name one, or "
            "train with checkpoint.keep_every"
        )


def choose_step(
    experiment: Experiment,
    weights: str | os.PathLike,
    answerer: Callable[[Experiment], Answerer],
    source: Sequence[Any],
    output: str | os.PathLike,
    task: Task | None = None,
) -> int:
    """Answers ``eval.select`` with every checkpoint that a run has kept; of the best the first.

    What is known of a step is kept in ``OUTPUT/select``: a killed selection goes on.

    Args:
      experiment: whose first policy is compared.
      weights: of the run.
      answerer: makes one for an experiment, of the step that it names.
      source: the examples of ``eval.select``.
      output: as ``evaluate`` has it.
      task: the benchmark; None for other data.

    Raises:
      UserError: if the split has no known answers.
    """
    root, settings = pathlib.Path(output) / "select", experiment.eval
    if len(saved_steps(weights)) == 1 and is_main():
        print(
            "warning: the run has kept one checkpoint; train with checkpoint.keep_every to choose",
            file=sys.stderr,
        )
    split, policies = settings.select, settings.policies[:1]
    if split == settings.split and is_main():
        print(
            f"warning: the checkpoint is chosen on {split!r}, the split that is reported: its "
            "figure is too high; say so where you report it",
            file=sys.stderr,
        )
    place = root / "selection.json"
    known = _known(place)
    found: dict[str, dict[str, Any]] = {}
    if is_main():
        root.mkdir(parents=True, exist_ok=True)
    for step in saved_steps(weights):
        own = dataclasses.replace(settings, step=step, select="", split=split, policies=policies)
        one = dataclasses.replace(experiment, eval=own)
        count = min(own.limit or len(source), len(source))
        try:
            saved = os.stat(pathlib.Path(weights) / "checkpoints" / str(step)).st_mtime_ns
        except FileNotFoundError:
            raise UserError(
                f"eval.select={split}: the checkpoint of step {step} has been removed meanwhile; "
                "wait until the training has ended, and ask again"
            ) from None
        of = describe(one, f"{step} {saved}", source, count, task.name if task else "")
        entry = known.get(str(step), {})
        if entry.get("of") != of:
            if is_main():
                print(f"step {step}, {split}:", flush=True)
            results = evaluate(one, answerer(one), source, root / f"{split}-{step}", task)
            entry = {"value": figure(results, policies[0]), "of": of}
        found[str(step)] = entry
        if is_main():
            write_json(place, {"split": split, "steps": known | found})
    values = {step: entry["value"] for step, entry in found.items() if entry["value"] is not None}
    best = int(max(values, key=lambda name: values[name])) if values else 0
    # Process 0 alone has computed a task's figures.
    best = int(multihost_utils.broadcast_one_to_all(np.int32(best)))
    if not best:
        raise UserError(f"eval.select={split}: no answer of it is known; name another split")
    if is_main():
        write_json(place, {"split": split, "steps": found, "step": best})
        for name, value in values.items():
            print(f"step {name}: {value:.4f}{'  chosen' if int(name) == best else ''}")
    return best


def _known(place: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What an earlier selection has found; nothing where its file is not ours."""
    if not place.exists():
        return {}
    try:
        steps = json.loads(place.read_text()).get("steps", {})
        return {step: entry for step, entry in steps.items() if {"of", "value"} <= set(entry)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def figure(results: dict[str, Any], policy: str) -> float | None:
    """What checkpoints are compared by: a task's first metric, accuracy, or captions' sum."""
    value = results["policies"][policy].get("accuracy")
    if value is not None:
        return float(value)
    metrics = results.get("scores", {}).get(policy, {}).get("metrics", {})
    parts = [metrics[name]["value"] for name in CAPTIONS if name in metrics]
    return float(sum(parts)) if parts else None
