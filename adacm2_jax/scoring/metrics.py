"""The metrics of benchmarks, by name: :data:`METRICS`.

A metric turns rows, which are lines of ``predictions.jsonl``, into :class:`Figure` objects. Nothing
here needs a model: what a run writes is enough.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import UserError, printable
from adacm2_jax.scoring.choices import DIGITS, LETTERS, chosen
from adacm2_jax.scoring.intervals import macro_interval, mean_interval, numbered

Row = dict[str, Any]


@dataclasses.dataclass
class Figure:
    """One figure of some rows.

    Attributes:
      value: the figure.
      interval: its 95 % interval, over videos; None if there is none.
      units: what it is a mean of: questions, or clips.
      videos: how many those belong to.
      constant: what the best constant answer would score, and which it is; None if there is none.
      train_constant: the same of the answer that is most frequent in training.
      macro: the mean over the categories, where there are several.
      macro_interval: its interval.
    """

    value: float
    interval: tuple[float, float] | None
    units: int
    videos: int
    constant: tuple[float, str] | None = None
    train_constant: tuple[float, str] | None = None
    macro: float | None = None
    macro_interval: tuple[float, float] | None = None


def exact_match(prediction: str, answer: str) -> bool:
    """Equal after lower-casing and trimming white space."""
    return prediction.strip().lower() == answer.strip().lower()


def answers_of(row: Row) -> list[str]:
    """The right answers of a row; empty where they are not known."""
    if row.get("answers"):
        return list(row["answers"])
    return [] if row.get("answer") is None else [row["answer"]]


def video_of(row: Row) -> str:
    """What a row is resampled with."""
    return str(row.get("group") or row.get("video") or row["id"])


# --- what a row answers ---------------------------------------------------------------------------


def _whole(row: Row) -> str | None:
    return row["prediction"].strip()


def _first_word(row: Row) -> str | None:
    return next(iter(row["prediction"].split()), "")


def _picked(row: Row, labels: str) -> str | None:
    place = chosen(row["prediction"], _need(row, "choices"), labels)
    return None if place is None else row["choices"][place].strip()


def _ranked(row: Row, per_token: bool = False) -> str | None:
    scores = np.array(_need(row, "choice_log_probs"), np.float64)
    choices = _need(row, "choices")
    if per_token:
        tokens = np.array(_need(row, "choice_tokens"), np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = scores / tokens if len(tokens) == len(scores) else tokens[:0]
    if len(scores) != len(choices) or np.isnan(scores).any():
        raise UserError(
            f"prediction {printable(str(row.get('id')))}: choice_log_probs or choice_tokens are no "
            f"number for each of {len(choices)} choices; answer the split again with this task"
        )
    return choices[int(np.argmax(scores))].strip()


def _need(row: Row, name: str) -> Any:
    if not row.get(name):
        raise UserError(
            f"prediction {printable(str(row.get('id')))} has no {name}: the metric needs them; "
            "answer the split again with this task"
        )
    return row[name]


def _is_right(given: Callable[[Row], str | None], row: Row) -> float:
    return float(given(row) in [answer.strip() for answer in answers_of(row)])


def _any_of_five(cut: Callable[[str], str], row: Row) -> float:
    beams = _need(row, "n_best")
    answers = [answer.strip() for answer in answers_of(row)]
    return float(any(cut(beam["text"]) in answers for beam in beams[:5]))


def _stated(row: Row) -> float:
    """A number is right if the text has its digits and no others, Yes or No if it is in it."""
    text = row["prediction"].strip()
    for answer in answers_of(row):
        if answer.isdigit():
            if "".join(re.findall(r"\d+", text)) == answer:
                return 1.0
        elif answer in text or text == answer[:1]:
            return 1.0
    return 0.0


# --- metrics --------------------------------------------------------------------------------------


def _by_video(given: Callable[[Row], str | None], rows: Sequence[Row]) -> list[Row]:
    """One row for all windows of a video: most of them must agree; of equals the first counts."""
    joined = []
    for windows in _windows(rows):
        votes = collections.Counter(given(row) for row in windows)
        joined.append(windows[0] | {"prediction": max(votes, key=votes.__getitem__) or ""})
    return joined


def _ranked_by_video(rows: Sequence[Row]) -> list[Row]:
    """One row for all windows of a video, with the mean of their log-probabilities."""
    joined = []
    for windows in _windows(rows):
        scores = np.mean([_need(row, "choice_log_probs") for row in windows], axis=0)
        joined.append(windows[0] | {"choice_log_probs": scores.tolist()})
    return joined


def _windows(rows: Sequence[Row]) -> Iterable[list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (video_of(row), row["question"], *answers_of(row))
        found.setdefault(key, []).append(row)
    return found.values()


def _text_keys(row: Row) -> list[str]:
    return [answer.strip() for answer in answers_of(row)]


def _place_keys(row: Row, labels: str = LETTERS) -> list[str]:
    answers = _text_keys(row)
    places = [i for i, choice in enumerate(_need(row, "choices")) if choice.strip() in answers]
    return [labels[place] for place in places if place < len(labels)]


def accuracy(
    rows: Sequence[Row],
    train: Sequence[str],
    seed: int,
    *,
    score: Callable[[Row], float],
    keys: Callable[[Row], list[str]] = _text_keys,
    join: Callable[[Sequence[Row]], list[Row]] | None = None,
) -> dict[str, Figure]:
    """The share of right rows.

    Args:
      rows: with known answers, at least one.
      train: answers of the training split.
      seed: of the resampling.
      score: 1 for a right row, 0 for a wrong one.
      keys: the constant answers that would be right for a row.
      join: windows of a video to one row.

    Returns:
      One figure, without a name of its own.
    """
    rows = join(rows) if join else rows
    values = np.array([score(row) for row in rows], np.float64)
    groups, videos = numbered([video_of(row) for row in rows])
    figure = Figure(float(values.mean()), mean_interval(values, groups, seed), len(rows), videos)
    kinds, count = numbered([str(row.get("category", "")) for row in rows])
    if count > 1:
        figure.macro = float(np.mean([values[kinds == kind].mean() for kind in range(count)]))
        figure.macro_interval = macro_interval(values, groups, kinds, seed)
    fits = collections.Counter(key for row in rows for key in dict.fromkeys(keys(row)))
    if fits:
        best = max(fits, key=fits.__getitem__)
        figure.constant = fits[best] / len(rows), best
    if train and keys is _text_keys:
        counts = collections.Counter(answer.strip() for answer in train)
        usual = max(counts, key=counts.__getitem__)
        figure.train_constant = fits[usual] / len(rows), usual
    return {"": figure}


def _captions(rows: Sequence[Row], train: Sequence[str], seed: int) -> dict[str, Figure]:
    from adacm2_jax.scoring.captions import caption_figures

    return caption_figures(rows, seed)


def _metrics() -> dict[str, Callable[..., dict[str, Figure]]]:
    make = functools.partial
    given: dict[str, Callable[[Row], str | None]] = {
        "top1": _whole,
        "first_word": _first_word,
        "multiple_choice": make(_picked, labels=LETTERS),
        "multiple_choice_digits": make(_picked, labels=DIGITS),
        "ranked": _ranked,
        "ranked_per_token": make(_ranked, per_token=True),
    }
    keys: dict[str, Callable[[Row], list[str]]] = {
        "multiple_choice": _place_keys,
        "multiple_choice_digits": make(_place_keys, labels=DIGITS),
    }
    metrics: dict[str, Callable[..., dict[str, Figure]]] = {
        name: make(accuracy, score=make(_is_right, each), keys=keys.get(name, _text_keys))
        for name, each in given.items()
    }
    voted = make(_is_right, _whole)
    for name in ("top1", "first_word", "multiple_choice"):
        metrics[f"{name}_by_video"] = make(accuracy, score=voted, join=make(_by_video, given[name]))
    metrics["ranked_by_video"] = make(
        accuracy, score=make(_is_right, _ranked), join=_ranked_by_video
    )
    metrics["top5"] = make(accuracy, score=make(_any_of_five, str.strip))
    metrics["first_word_top5"] = make(
        accuracy, score=make(_any_of_five, lambda text: next(iter(text.split()), ""))
    )
    metrics["stated"] = make(accuracy, score=_stated)
    metrics["captions"] = _captions
    return metrics


#: Name → (rows with known answers, answers of the training split, seed) → figures by their names,
#: of which the empty one is the metric's own. ``top1``: the best beam is the answer, but for white
#: space around it; ``top5``: one of five beams is; ``first_word``: its first word is; ``ranked``:
#: the most probable choice is, by all its tokens together, or ``per_token``; ``multiple_choice``:
#: the one that the text names; ``…_by_video``: the windows of a video vote.
METRICS = _metrics()
