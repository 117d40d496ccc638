"""A whole split answered: what ``eval.py`` does, and ``train.py`` at the end."""

import itertools
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable, keep_earlier, write_json
from adacm2_jax.inference import evaluate as inference
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.processor import Processor
from adacm2_jax.progress import Progress
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.partial import PartialPredictions, describe, digest
from adacm2_jax.scoring import captions, report
from adacm2_jax.scoring.metrics import METRICS
from adacm2_jax.tasks.task import Task, find
from adacm2_jax.video.stream import video_batches


def task_of(experiment: Experiment) -> Task | None:
    """The benchmark that an experiment is about; None if it is about other data."""
    if experiment.data.source != "task":
        return None
    return find(experiment.data.task.name)


def evaluate(
    experiment: Experiment,
    answerer: Answerer,
    source: Sequence[Any],
    output: str | os.PathLike,
    task: Task | None = None,
    notes: Mapping[str, Any] | None = None,
) -> dict:
    """Answers a split under every policy and writes ``predictions.jsonl`` and ``metrics.json``.

    Predictions are written as they come, to ``predictions.partial.jsonl``, which gets its name at
    the end; where it is there, and of the same, the rest is answered (``runs.partial``). Earlier
    results get a number. Of several processes all answer, for each holds a part of the parameters;
    the first writes.

    Args:
      experiment: whose ``eval`` and ``data`` say how.
      answerer: with every policy.
      source: of the examples.
      output: a directory, which the caller holds (``runs.lock``) against others that write there.
      task: the benchmark that they are of: its metrics are computed, too.
      notes: for ``metrics.json``.

    Returns:
      What ``metrics.json`` holds: ``policies`` (see ``summarise``), ``seconds``, ``failed``, the
      examples whose videos could not be read, and of a task ``task`` and ``scores``
      (``scoring.report.score``).

    Raises:
      UserError: if the task's metrics need what is not there; before anything is answered.
    """
    output, settings = pathlib.Path(output), experiment.eval
    check_videos(source, settings.split)
    count = min(settings.limit or len(source), len(source))
    metrics = check_task(experiment, task, source, count)
    if is_main():
        check_writable(output, f"results go to {output}")
        output.mkdir(parents=True, exist_ok=True)
    partial = PartialPredictions(output, described(experiment, answerer, source, task))
    _say(partial, count)
    failed = list(partial.failed)
    begun = time.perf_counter() - partial.seconds
    answerer.skip(partial.batches)

    def note(example: Any, error: str) -> None:
        failed.append({"id": example.id, "error": error})

    def write(lines: Sequence[dict], done: int) -> None:
        partial.add(lines, failed, done, time.perf_counter() - begun)

    with Progress(
        "evaluate", count, initial=partial.done, unit="questions", shown=is_main()
    ) as progress:
        batches = video_batches(
            itertools.islice(source, partial.done, count),
            first=partial.done,
            batch_size=settings.batch_size,
            room=lambda questions: inference.room_for(settings.batch_size, questions),
            chunk=settings.chunk,
            size=experiment.model.vision.image_size,
            workers=settings.workers,
            on_bad_video=note,
            sampling=experiment.data.sampling,
            resize=experiment.data.resize,
            on_truncated=experiment.data.on_truncated,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
        )
        inference.answer_batches(
            answerer,
            batches,
            first=partial.done,
            ask_as=experiment.data.ask,
            rows=settings.batch_size,
            text_width=answerer.text_width(
                experiment.data.ask(text)
                for example in itertools.islice(source, count)
                for text in {example.question, inference.read_beside(example)}
            ),
            write=write,
            failed=note,
            progress=progress,
            by=task.by if task else "generate",
            judged=task is None,
        )
    results: dict = {
        "policies": inference.summarise(partial.lines, answerer.models),
        "seconds": time.perf_counter() - begun,
        "failed": failed,
        **(notes or {}),
    }
    if is_main() and task:
        _score(results, task, metrics, partial.lines)
    if is_main():
        keep_earlier(output / "predictions.jsonl")
        keep_earlier(output / "metrics.json")
        write_json(output / "metrics.json", results)
    partial.finish()
    return results


def described(
    experiment: Experiment, answerer: Answerer, source: Sequence[Any], task: Task | None = None
) -> dict[str, str]:
    """What an evaluation is of (``runs.partial.describe``), its memories included."""
    count = min(experiment.eval.limit or len(source), len(source))
    memories = {name: repr(model.config.memory) for name, model in answerer.models.items()}
    name = task.name if task else ""
    of = describe(experiment, answerer.digest(), source, count, name)
    return of | {"memories": digest(memories)}


def check_videos(source: Sequence[Any], split: str) -> None:
    """Refuses clips that are drawn when they are trained on: no file holds them.

    Raises:
      UserError: naming the split.
    """
    if len(source) and hasattr(source[0].video, "frames"):
        raise UserError(
            f"split {split!r} is drawn while it is trained on, and has no videos to answer about; "
            "name another, such as test"
        )


def check_task(
    experiment: Experiment, task: Task | None, source: Sequence[Any], count: int
) -> tuple[str, ...]:
    """The metrics of a task that can be computed of the experiment.

    Raises:
      UserError: if Java or a package is missing, or an example has no choices to rank.
    """
    if task is None:
        return ()
    for name in task.metrics:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UserError(f"task {task.name}: metric {name!r} is unknown; there are {known}")
    _say_protocol(experiment, task)
    if "captions" in task.metrics and is_main():
        captions.check_installed()
        captions.check_java()
    if task.by == "likelihood":
        for number in range(count):
            if len(source[number].choices) < 2:
                where = printable(source[number].id)
                raise UserError(f"task {task.name}: {where} has no choices, which are to be ranked")
    few = experiment.generation.num_return < 5
    left_out = [name for name in task.metrics if name.endswith("top5") and few]
    if left_out and is_main():
        print(
            f"warning: {', '.join(left_out)} needs generation.num_return=5 (and as many "
            f"num_beams), which is {experiment.generation.num_return}; left out",
            file=sys.stderr,
        )
    return tuple(name for name in task.metrics if name not in left_out)


def _say_protocol(experiment: Experiment, task: Task) -> None:
    """Says where an experiment asks otherwise than the benchmark's protocol does."""
    other = []
    if experiment.data.prompt != task.prompt:
        other.append(f"data.prompt={task.prompt!r}")
    for name, value in task.generation.items():
        if getattr(experiment.generation, name) != value:
            other.append(f"generation.{name}={value}")
    if other and is_main():
        print(
            f"warning: {task.name} is not asked as its protocol says, which has "
            f"{', '.join(other)} (configs/ has it so)",
            file=sys.stderr,
        )


def _say(partial: PartialPredictions, count: int) -> None:
    if not is_main():
        return
    if partial.set_aside:
        print(
            f"the unfinished predictions here have another {', '.join(partial.set_aside)}: kept "
            "under a number, and all is answered anew",
            file=sys.stderr,
        )
    elif partial.done:
        print(f"{partial.done} of {count} questions are answered; the rest follows", flush=True)


def _score(results: dict, task: Task, metrics: tuple[str, ...], lines: Sequence[dict]) -> None:
    """Adds a task's figures; of the first metric also where those of other data are."""
    results["task"] = task.name
    results["scores"] = report.score(lines, metrics)
    for policy, entry in results["scores"].items():
        if figure := entry["metrics"].get(metrics[0]):
            results["policies"][policy] |= {
                "accuracy": figure["value"],
                "interval": figure["interval"],
                "majority": figure["constant"][0] if "constant" in figure else None,
                "scored": entry["scored"],
            }


def check_questions(
    experiment: Experiment,
    processor: Processor,
    source: Sequence[Any],
    task: Task | None = None,
) -> None:
    """Finds a question, or a choice that is to be ranked, that is too long before any video is
    decoded.

    Raises:
      UserError: naming the first.
    """
    path = getattr(source, "path", None)  # of JSON lines; what we render ourselves fits
    for example in source if path or task else ():
        try:
            texts = example.question, inference.read_beside(example)
            processor.questions([experiment.data.ask(text) for text in texts])
            if task and task.by == "likelihood":
                processor.candidates([""] * len(example.choices), example.choices)
        except UserError as error:
            where = f"{printable(str(path or source))}: id {printable(example.id)}"
            raise UserError(f"{where}: {error}") from None
