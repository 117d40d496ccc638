"""Questions answered about a whole split of videos, all policies in one pass, and the summary."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import printable
from adacm2_jax.inference.answerer import Answer, Answerer, Likelihoods, bucket
from adacm2_jax.inference.evidence import Remembered
from adacm2_jax.progress import Progress
from adacm2_jax.scoring import report
from adacm2_jax.scoring.intervals import wilson_interval
from adacm2_jax.scoring.metrics import exact_match
from adacm2_jax.video.stream import VideoBatch

#: So many questions must be answered alike before a model is said to answer alike to everything.
_ALIKE = 10


def room_for(batch_size: int, questions: int) -> int:
    """How many videos are read together, where each has up to so many questions: one, or as many as
    have no more rows than ``batch_size`` (filled up, see ``answerer.bucket``)."""
    return max(1, batch_size // bucket(questions))


def answer_batches(
    answerer: Answerer,
    batches: Iterable[VideoBatch],
    *,
    ask_as: Callable[[str], str],
    rows: int,
    text_width: int,
    write: Callable[[Sequence[dict], int], None],
    failed: Callable[[Any, str], None],
    progress: Progress,
    first: int = 0,
    by: str = "generate",
    judged: bool = True,
) -> None:
    """Answers the questions of batches of videos; one video's error is that video's alone.

    Args:
      answerer: with all policies.
      batches: of ``video.stream.video_batches``, with :func:`room_for`.
      ask_as: a question → what the networks read.
      rows: for how many questions the language model writes together.
      text_width: of ``Answerer.text_width``, for all questions: one program serves all batches, and
        an answer does not depend on what else is in its batch.
      write: is given the lines of ``predictions.jsonl`` of every batch, and how many examples of
        the split are done.
      failed: is told of every example whose video could not be read to its end, with the reason.
      progress: counts the examples.
      first: examples of the split that were done before.
      by: ``generate``, or ``likelihood``: the most probable of the choices is the answer.
      judged: whether lines say if they are correct, by :func:`exact_match`.
    """
    done = first
    for batch in batches:
        most = max(len(row.examples) for row in batch.rows)
        asked = [_filled(row.examples, most) for row in batch.rows]
        spare = batch.room - len(batch.rows)
        prompts = [ask_as(example.question) for examples in asked for example in examples]
        before = [ask_as(read_beside(example)) for examples in asked for example in examples]
        blank = [""] * (spare * most)
        totals = np.array([row.total for row in batch.rows] + [1] * spare)
        seeds = np.array([row.number for row in batch.rows] + [0] * spare)
        late = before + blank if before != prompts else None
        reading = answerer.start(prompts + blank, totals, seeds, text_width, late)
        for frames, valid in batch.chunks:
            answerer.read(reading, frames, valid)
        for row in batch.rows:
            if row.error:
                for example in row.examples:
                    failed(example, row.error)
        lines = []
        for name in reading.states:
            if by == "likelihood":
                candidates = _candidates(batch, most)
                answers: Sequence = answerer.log_likelihoods(reading, name, candidates)
            else:
                answers = answerer.answer(reading, name, rows)
            remembered = answerer.remembered(reading, name)
            for i, row in enumerate(batch.rows):
                for j, example in enumerate(row.examples if row.error is None else ()):
                    place = i * most + j
                    kept = remembered[place]
                    used = usage(name, kept, row.times, answerer.tokens_per_frame)
                    lines.append(prediction(example, answers[place], judged) | used)
        write(lines, batch.end)
        progress.update(batch.end - done)
        done = batch.end


def read_beside(example: Any) -> str:
    """What is read beside the frames up to the last one: the question, unless it comes late."""
    return example.question if example.reading is None else example.reading


def _filled(examples: Sequence[Any], count: int) -> list[Any]:
    """As many for every video: the last one again."""
    return [*examples, *[examples[-1]] * (count - len(examples))]


def _candidates(batch: VideoBatch, most: int) -> list[tuple[str, ...]]:
    """The choices for every row of a batch; none for a row that fills up, or will not count."""
    candidates: list[tuple[str, ...]] = [()] * (batch.room * most)
    for i, row in enumerate(batch.rows):
        for j, example in enumerate(row.examples if row.error is None else ()):
            candidates[i * most + j] = example.choices
    return candidates


def prediction(example: Any, answers: Sequence[Answer] | Likelihoods, judged: bool = True) -> dict:
    """A line of ``predictions.jsonl``, without what the policy adds: all that scoring needs."""
    line: dict = {
        "id": example.id,
        "video": example.video if isinstance(example.video, str) else None,
        "question": example.question,
    }
    if isinstance(answers, Likelihoods):
        best = int(np.argmax(answers.log_probs))
        line |= {
            "prediction": example.choices[best],
            "score": float(answers.log_probs[best]),
            "choice_log_probs": answers.log_probs.tolist(),
            "choice_tokens": answers.tokens.tolist(),
        }
    else:
        line |= {"prediction": answers[0].text, "score": answers[0].score}
        if len(answers) > 1:
            line["n_best"] = [dataclasses.asdict(answer) for answer in answers]
    if example.answer is not None:
        right = example.answers or (example.answer,)
        line["answer"] = example.answer
        if judged:
            line["correct"] = any(exact_match(line["prediction"], answer) for answer in right)
    for name in ("answers", "choices"):
        if getattr(example, name):
            line[name] = list(getattr(example, name))
    for name in ("group", "category"):
        if getattr(example, name):
            line[name] = getattr(example, name)
    if read_beside(example) != example.question:
        line["reading"] = example.reading
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
    if "scores" in results:
        return "\n".join([report.table(results["scores"]), *_failures(results)])
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
    return "\n".join(lines + _failures(results))


def _failures(results: dict) -> list[str]:
    if not results["failed"]:
        return []
    lines = [f"{len(results['failed'])} video(s) could not be read:"]
    return lines + [f"  {printable(row['id'])}: {row['error']}" for row in results["failed"]]
