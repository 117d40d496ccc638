"""A whole split answered: what ``eval.py`` does, and ``train.py`` at the end."""

import itertools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from adacm2_jax.distributed import is_main
from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable, keep_earlier, write_json
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.evaluate import answer_batches, summarise
from adacm2_jax.inference.processor import Processor
from adacm2_jax.progress import Progress
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.video.stream import video_batches


def evaluate(
    experiment: Experiment,
    answerer: Answerer,
    source: Sequence[Any],
    output: str | os.PathLike,
) -> dict:
    """Answers a split under every policy and writes ``predictions.jsonl`` and ``metrics.json``.

    Predictions are written as they come, to ``predictions.partial.jsonl``, which gets its name at
    the end; those of earlier evaluations get a number. Of several processes all answer, for each
    holds a part of the parameters; the first writes.

    Args:
      experiment: whose ``eval`` and ``data`` say how.
      answerer: with every policy.
      source: of the examples.
      output: a directory, which the caller holds (``runs.lock``) against others that write there.

    Returns:
      What ``metrics.json`` holds: ``policies`` (see ``summarise``), ``seconds`` and ``failed``, the
      videos that could not be read.
    """
    output, settings = pathlib.Path(output), experiment.eval
    count = min(settings.limit or len(source), len(source))
    predictions: list[dict] = []
    failed: list[dict] = []
    partial = output / "predictions.partial.jsonl"
    if is_main():
        check_writable(output, f"results go to {output}")
        output.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)

    def write(lines: Sequence[dict]) -> None:
        predictions.extend(lines)
        if is_main():
            with partial.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)

    def note(example: Any, error: str) -> None:
        failed.append({"id": example.id, "error": error})

    with Progress("evaluate", count, unit="videos", shown=is_main()) as progress:
        batches = video_batches(
            itertools.islice(source, count),
            batch_size=settings.batch_size,
            chunk=settings.chunk,
            size=experiment.model.vision.image_size,
            workers=settings.workers,
            on_bad_video=note,
            sampling=experiment.data.sampling,
            resize=experiment.data.resize,
            on_truncated=experiment.data.on_truncated,
            on_warning=lambda line: print(f"warning: {line}", file=sys.stderr),
        )
        seconds = answer_batches(
            answerer,
            batches,
            ask_as=experiment.data.ask,
            rows=settings.batch_size,
            text_width=answerer.text_width(
                experiment.data.ask(example.question) for example in itertools.islice(source, count)
            ),
            write=write,
            failed=note,
            progress=progress,
        )
    results = {
        "policies": summarise(predictions, answerer.models),
        "seconds": seconds,
        "failed": failed,
    }
    if is_main():
        write([])  # so that the file is there
        for path in (output / "predictions.jsonl", output / "metrics.json"):
            keep_earlier(path)
        partial.replace(output / "predictions.jsonl")
        write_json(output / "metrics.json", results)
    return results


def check_questions(experiment: Experiment, processor: Processor, source: Sequence[Any]) -> None:
    """Finds a question in JSON lines that is too long before any video is decoded.

    Raises:
      UserError: naming the first.
    """
    path = getattr(source, "path", None)  # of JSON lines; what we render ourselves fits
    for example in source if path else ():
        try:
            processor.questions([experiment.data.ask(example.question)])
        except UserError as error:
            where = f"{printable(str(path))}: id {printable(example.id)}"
            raise UserError(f"{where}: {error}") from None
