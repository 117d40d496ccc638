"""Questions answered about a whole split of videos, all policies in one pass, and the summary."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import printable
from adacm2_jax.inference.answerer import Answer, Answerer
from adacm2_jax.inference.evidence import Remembered
from adacm2_jax.progress import Progress
from adacm2_jax.scoring.intervals import wilson_interval
from adacm2_jax.scoring.metrics import exact_match
from adacm2_jax.video.stream import VideoBatch

#: So many questions must be answered alike before a model is said to answer alike to everything.
_ALIKE = 10


def answer_batches(
    answerer: Answerer,
    batches: Iterable[VideoBatch],
    *,
    ask_as: Callable[[str], str],
    rows: int,
    text_width: int,
    write: Callable[[Sequence[dict]], None],
    failed: Callable[[Any, str], None],
    progress: Progress,
) -> float:
    """Answers the questions of batches of videos; one video's error is that video's alone.

    Args:
      answerer: with all policies.
      batches: of ``video.stream.video_batches``.
      ask_as: a question → what the networks read.
      rows: of a batch; a short one is filled up.
      text_width: of ``Answerer.text_width``, for all questions: one program serves all batches, and
        an answer does not depend on what else is in its batch.
      write: is given the lines of ``predictions.jsonl`` of every batch.
      failed: is told of every video that could not be read to its end, with the reason.
      progress: counts the videos.

    Returns:
      Seconds that reading and answering took, decoding included.
    """
    begun = time.perf_counter()
    for batch in batches:
        spare = rows - len(batch.rows)
        prompts = [ask_as(row.example.question) for row in batch.rows]
        totals = np.array([row.total for row in batch.rows] + [1] * spare)
        seeds = np.array([row.number for row in batch.rows] + [0] * spare)
        reading = answerer.start(prompts + [""] * spare, totals, seeds, text_width)
        for frames, valid in batch.chunks:
            answerer.read(reading, frames, valid)
        for row in batch.rows:
            if row.error:
                failed(row.example, row.error)
        lines = []
        for name in reading.states:
            answers = answerer.answer(reading, name)
            remembered = answerer.remembered(reading, name)
            for i, row in enumerate(batch.rows):
                if row.error is None:
                    used = usage(name, remembered[i], row.times, answerer.tokens_per_frame)
                    lines.append(prediction(row.example, answers[i]) | used)
        write(lines)
        progress.update(len(batch.rows))
    return time.perf_counter() - begun


def prediction(example: Any, answers: Sequence[Answer]) -> dict:
    """A line of ``predictions.jsonl``, without what the policy adds."""
    line: dict = {
        "id": example.id,
        "video": example.video if isinstance(example.video, str) else None,
        "question": example.question,
        "prediction": answers[0].text,
        "score": answers[0].score,
    }
    if len(answers) > 1:
        line["n_best"] = [dataclasses.asdict(answer) for answer in answers]
    if example.answer is not None:
        line |= {"answer": example.answer, "correct": exact_match(answers[0].text, example.answer)}
    return line


def usage(
    policy: str, kept: Remembered, times: np.ndarray, tokens_per_frame: int, moments: int = 3
) -> dict:
    """What an answer rests on: the policy, frames read, tokens kept in a layer and seen, and the
    seconds of the frames that are remembered most (where not all tokens are kept)."""
    total = kept.frames_seen * tokens_per_frame
    line = {
        "policy": policy,
        "frames": kept.frames_seen,
        "kept_tokens": kept.kept_tokens,
        "total_tokens": total,
    }
    if kept.frames and kept.kept_tokens < total:
        line["moments"] = [
            {
                "time": round(float(times[each.frame]), 3),
                "tokens": each.tokens,
                "score": each.score,
            }
            for each in kept.frames[:moments]
        ]
    return line


def summarise(predictions: Sequence[dict], policies: Iterable[str]) -> dict[str, dict]:
    """Results by policy.

    Accuracy (of the ``scored`` questions, whose answer is known; None if there is none) with its
    95 % interval;
    ``majority``, the accuracy of always giving the most frequent answer; ``alike``, whether the
    model gave one answer to everything although there are several; and tokens.
    """
    summary = {}
    for name in policies:
        rows = [row for row in predictions if row["policy"] == name]
        marked = [row for row in rows if "correct" in row]
        correct = sum(row["correct"] for row in marked)
        wanted = collections.Counter(row["answer"].strip().lower() for row in marked)
        given = {row["prediction"].strip().lower() for row in marked}
        summary[name] = {
            "accuracy": correct / len(marked) if marked else None,
            "interval": list(wilson_interval(correct, len(marked))),
            "majority": max(wanted.values()) / len(marked) if marked else None,
            "alike": len(marked) >= _ALIKE and len(wanted) > 1 and len(given) == 1,
            "questions": len(rows),
            "scored": len(marked),
            "kept_tokens": max((row["kept_tokens"] for row in rows), default=0),
            "total_tokens": max((row["total_tokens"] for row in rows), default=0),
        }
    return summary


def table(results: dict) -> str:
    """Results for a terminal."""
    lines = [
        f"{'policy':10} {'accuracy':>9} {'95 % interval':>17} {'majority':>9} {'questions':>10} "
        f"{'tokens kept':>16}"
    ]
    for name, row in results["policies"].items():
        accuracy, interval, majority = "-", "-", "-"
        if row["accuracy"] is not None:
            accuracy, majority = f"{row['accuracy']:.1%}", f"{row['majority']:.1%}"
            interval = "{:.1%} to {:.1%}".format(*row["interval"])
        kept = f"{row['kept_tokens']} of {row['total_tokens']}"
        # Of those whose answer is not known none is right or wrong.
        scored, asked = row["scored"], row["questions"]
        questions = str(asked) if scored == asked else f"{scored} of {asked}"
        lines.append(
            f"{name:10} {accuracy:>9} {interval:>17} {majority:>9} {questions:>10} {kept:>16}"
        )
    alike = [name for name, row in results["policies"].items() if row.get("alike")]
    if alike:
        lines.append(
            f"warning: one and the same answer to every question under {', '.join(alike)}: the "
            "model has not learned the task, or the questions do not fit its prompt"
        )
    if results["failed"]:
        lines.append(f"{len(results['failed'])} video(s) could not be read:")
        lines += [f"  {printable(row['id'])}: {row['error']}" for row in results["failed"]]
    return "\n".join(lines)
