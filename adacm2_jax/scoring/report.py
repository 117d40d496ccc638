"""All figures of a task's predictions, and their table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from adacm2_jax.errors import UserError, printable
from adacm2_jax.scoring.metrics import METRICS, Figure, Row, answers_of


def score(
    rows: Sequence[Row], metrics: Sequence[str], train: Sequence[str] = (), seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Figures of predictions by policy.

    Args:
      rows: lines of ``predictions.jsonl``, of one split.
      metrics: names in :data:`METRICS`.
      train: answers of the training split, for the constant guess.
      seed: of the resampling.

    Returns:
      Policy → ``questions``, ``scored`` (those whose answers are known) and ``metrics``: name → the
      fields of :class:`Figure`, and ``categories``: category → the same. Values of JSON.

    Raises:
      UserError: for a metric that is unknown, or whose needs the predictions do not meet.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"metric {name!r} is unknown; there are {', '.join(sorted(METRICS))}")
    found: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(str(row.get("policy", "")) for row in rows):
        mine = [row for row in rows if str(row.get("policy", "")) == policy]
        known = [row for row in mine if answers_of(row)]
        entries: dict[str, Any] = {}
        if known:
            for name in metrics:
                entries |= _with_categories(name, known, train, seed)
        found[policy] = {"questions": len(mine), "scored": len(known), "metrics": entries}
    return found


def _with_categories(
    name: str, rows: Sequence[Row], train: Sequence[str], seed: int
) -> dict[str, Any]:
    figures = METRICS[name](rows, train, seed)
    entries = {part or name: _plain(figure) for part, figure in figures.items()}
    categories = sorted({str(row.get("category", "")) for row in rows})
    if len(categories) > 1:
        for category in categories:
            those = [row for row in rows if str(row.get("category", "")) == category]
            for part, figure in METRICS[name](those, train, seed).items():
                entries[part or name].setdefault("categories", {})[category] = _plain(figure)
    return entries


def _plain(figure: Figure) -> dict[str, Any]:
    values = {key: value for key, value in dataclasses.asdict(figure).items() if value is not None}
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items()
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures for a terminal: of each policy and metric, then by category."""
    lines = [
        f"{'policy':10} {'metric':24} {'value':>8} {'95 % interval':>19} {'constant':>9} "
        f"{'units':>6} {'videos':>6}"
    ]
    for policy, entry in found.items():
        for name, figure in entry["metrics"].items():
            lines.append(_line(policy, name, figure))
            if "macro" in figure:
                macro = figure | {"value": figure["macro"], "interval": figure["macro_interval"]}
                macro.pop("constant", None)
                lines.append(_line("", "  mean of categories", macro))
            for category, part in figure.get("categories", {}).items():
                lines.append(_line("", f"  {printable(category) or '(none)'}", part))
            if "train_constant" in figure:
                value, answer = figure["train_constant"]
                lines.append(f"{'':10}   always {printable(answer)!r}, as in training: {value:.1%}")
        if entry["scored"] < entry["questions"]:
            lines.append(f"{policy:10} {entry['scored']} of {entry['questions']} answers are known")
    return "\n".join(lines)


def _line(policy: str, name: str, figure: dict[str, Any]) -> str:
    interval, constant = figure.get("interval"), figure.get("constant")
    between = "{:.1%} to {:.1%}".format(*interval) if interval else "-"
    return (
        f"{policy:10} {name[:24]:24} {figure['value']:>8.1%} {between:>19} "
        f"{f'{constant[0]:.1%}' if constant else '-':>9} {figure['units']:>6} {figure['videos']:>6}"
    )
