"""What ``adacm2 ablate`` writes: tidy tables, a page and figures."""

import csv
import importlib.util
import io
import itertools
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from adacm2_jax.files import keep_earlier, write_bytes, write_text
from adacm2_jax.scoring.intervals import mean_interval, numbered

#: What a generated data set knows of its questions (``records.jsonl``).
KNOWN = ("task", "style", "when", "age", "chance")
#: Columns that tell one group of answers from another, where they are there.
_NOT_GROUPS = frozenset(
    "run memory policy id video answer prediction correct kept_tokens total_tokens age chance "
    "category".split()
)
_FIGURES = frozenset(
    "accuracy low high chance questions videos runs lowest_run highest_run kept_tokens "
    "total_tokens memory policy".split()
)
#: Names of columns; a field that varies and is called so has its whole path.
COLUMNS = _NOT_GROUPS | _FIGURES | {*KNOWN, "T"}
#: All that is written.
_FILES = ("answers.csv", "accuracy.csv", "ages.csv", "report.md", "accuracy.png", "ages.png")
Row = dict[str, Any]


def write(answers: Sequence[Row], output: pathlib.Path, about: str = "") -> list[pathlib.Path]:
    """Writes ``answers.csv`` (a line an answer), ``accuracy.csv``, ``ages.csv`` and ``report.md``,
    and ``accuracy.png`` and ``ages.png`` where matplotlib is installed. Those of other answers that
    are there get a number.

    Args:
      answers: of all cells.
      output: a directory that is there.
      about: what they are of, for ``report.md``.

    Returns:
      What was written.
    """
    accuracy, ages = table(answers), table(answers, by_age=True)
    text = _csv(answers)
    there = output / "answers.csv"
    if not (there.is_file() and there.read_bytes() == text.encode()):
        keep_earlier(*(output / name for name in _FILES))
    written = []
    for name, content in (
        ("answers.csv", text),
        ("accuracy.csv", _csv(accuracy)),
        ("ages.csv", _csv(ages) if ages else ""),
    ):
        if content:
            write_text(output / name, content)
            written.append(output / name)
    page = output / "report.md"
    write_text(page, report(accuracy, ages, about))
    written.append(page)
    if importlib.util.find_spec("matplotlib"):
        written.append(_draw(accuracy, "T", output / "accuracy.png", "frames of the video"))
        if ages:
            longest = max(row["T"] for row in ages)
            last = [row for row in ages if row["T"] == longest]
            name = f"frames since what is asked about, T = {longest}"
            written.append(_draw(last, "age", output / "ages.png", name))
    return written


def age_bin(age: int) -> str:
    """The ages are in bins of powers of four: 0, 1-3, 4-15, 16-63 …"""
    if age == 0:
        return "0"
    low = 4 ** int(np.log2(age) // 2)
    return f"{low}-{4 * low - 1}"


def table(answers: Sequence[Row], by_age: bool = False) -> list[Row]:
    """Accuracy by group and memory, over all runs.

    The interval resamples videos; one that several models have answered about counts once.

    Args:
      answers: a row an answer.
      by_age: also by the age of what is asked about; answers of none are left out.
    """
    groups: dict[tuple, list[Row]] = {}
    every = dict.fromkeys(name for row in answers for name in row)
    names = [name for name in every if name not in _NOT_GROUPS]
    for row in answers:
        if by_age and not isinstance(row.get("age"), int):
            continue
        own = [row.get(name, "") for name in names]
        if by_age:
            own.append(age_bin(row["age"]))
        groups.setdefault((*own, row["memory"]), []).append(row)
    found = []
    for key, rows in groups.items():
        correct = np.array([row["correct"] for row in rows], np.float64)
        videos, count = numbered([row["video"] for row in rows])
        low, high = mean_interval(correct, videos)
        by_run: dict[str, list[int]] = {}
        for row in rows:
            by_run.setdefault(row["run"], []).append(row["correct"])
        each = [float(np.mean(values)) for values in by_run.values()]
        chances = [row["chance"] for row in rows if isinstance(row.get("chance"), float)]
        labels = [*names, "age"] if by_age else names
        found.append(
            dict(zip(labels, key[:-1], strict=True))
            | {
                "memory": rows[0]["memory"],
                "policy": rows[0]["policy"],
                "accuracy": float(correct.mean()),
                "low": low,
                "high": high,
                "chance": float(np.mean(chances)) if chances else "",
                "questions": len(rows),
                "videos": count,
                "runs": len(each),
                "lowest_run": min(each),
                "highest_run": max(each),
                "kept_tokens": max(row["kept_tokens"] for row in rows),
                "total_tokens": max(row["total_tokens"] for row in rows),
            }
        )
    return found


def report(accuracy: Sequence[Row], ages: Sequence[Row], about: str = "") -> str:
    """The tables as Markdown: a table a group, a line a memory."""
    parts = ["# Memories compared", "", "Accuracy with its 95 % interval over videos.", about]
    for title, rows in _grouped(accuracy, "T").items():
        chance = sorted(row["chance"] for row in rows if row["chance"] != "")
        ends = dict.fromkeys(f"{value:.0%}" for value in chance[:1] + chance[-1:])
        note = f" Chance: {' to '.join(ends)}." if chance else ""
        parts += ["", f"## {title or 'all'}", "", _markdown(rows, "T", "T = {}") + note]
    if ages:
        longest = max(row["T"] for row in ages)
        parts += ["", f"# By the age of what is asked about, T = {longest}"]
        last = [row for row in ages if row["T"] == longest]
        for title, rows in _grouped(last, "age").items():
            parts += ["", f"## {title or 'all'}", "", _markdown(rows, "age", "{} frames ago")]
    return "\n".join(parts) + "\n"


def _grouped(rows: Sequence[Row], across: str) -> dict[str, list[Row]]:
    """Rows by what their figures are of, in words."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(_words(row, across)), []).append(row)
    return groups


def _words(row: Row, across: str) -> list[str]:
    """What is known of the questions by itself, and of other fields their names, too, unless they
    say the same again (``tasks`` of ``data.suite``)."""
    known = [str(row[name]) for name in KNOWN if row.get(name) and name not in (across, "chance")]
    for name, value in row.items():
        if name in _FIGURES or name in KNOWN or name in (across, "T"):
            continue
        if not (name in ("tasks", "styles") and value in known):
            known.append(f"{name} = {value}")
    return known


def _places(rows: Sequence[Row], across: str) -> list[Any]:
    values = dict.fromkeys(row[across] for row in rows)
    return sorted(values, key=lambda value: int(str(value).split("-")[0]))


def _markdown(rows: Sequence[Row], across: str, head: str) -> str:
    columns = _places(rows, across)
    lines = [
        "| memory | tokens | " + " | ".join(head.format(column) for column in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for memory, own in itertools.groupby(sorted(rows, key=_order(rows)), lambda r: r["memory"]):
        cells = {row[across]: row for row in own}
        kept = max(row["kept_tokens"] for row in cells.values())
        shown = [
            "{accuracy:.1%} ({low:.1%}–{high:.1%})".format(**cells[column])
            if column in cells
            else ""
            for column in columns
        ]
        label = memory.replace("|", "\\|")  # else it would end the cell
        lines.append(f"| `{label}` | {kept:,} | " + " | ".join(shown) + " |")
    counts = sorted({row["questions"] for row in rows})
    asked = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return "\n".join(lines) + f"\n\nQuestions a cell: {asked}."


def _order(rows: Sequence[Row]):
    places: dict[str, int] = {}
    for row in rows:
        places.setdefault(row["memory"], len(places))
    return lambda row: places[row["memory"]]


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _draw(rows: Sequence[Row], across: str, path: pathlib.Path, name: str) -> pathlib.Path:
    """Accuracy by memory, a panel a group."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _grouped(rows, across)
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    memories = list(dict.fromkeys(row["memory"] for row in rows))
    colours = [colormaps["tab10" if len(memories) <= 10 else "tab20"](i) for i in range(20)]
    looks = dict(
        zip(
            memories,
            zip(itertools.cycle(colours), itertools.cycle("os^Dvp*Xh<>"), strict=False),
            strict=False,
        )
    )
    for panel in panels.flat[len(groups) :]:
        panel.set_visible(False)
    for panel, (title, own) in zip(panels.flat, groups.items(), strict=False):
        places = _places(own, across)
        for number, memory in enumerate(memories):
            cells = {row[across]: row for row in own if row["memory"] == memory}
            at = [i for i, place in enumerate(places) if place in cells]
            value, low, high = (
                np.array([100 * cells[places[i]][field] for i in at])
                for field in ("accuracy", "low", "high")
            )
            spread = np.maximum([value - low, high - value], 0)
            colour, marker = looks[memory]
            look = dict(color=colour, marker=marker, capsize=2, linewidth=1)
            # Beside one another, or equal ones would hide their intervals.
            aside = (number - (len(memories) - 1) / 2) * min(0.04, 0.3 / len(memories))
            panel.errorbar(np.array(at) + aside, value, spread, label=_plain(memory), **look)
        chances = [row["chance"] for row in own if row["chance"] != ""]
        if chances:
            panel.axhline(100 * min(chances), color="gray", linewidth=1, linestyle=":")
        panel.set(title=_plain(title), ylim=(0, 101), xlabel=name, ylabel="accuracy, %")
        panel.set_xticks(range(len(places)), [str(place) for place in places])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the tables have the label
        figure.savefig(picture, dpi=130, format="png")
    write_bytes(path, picture.getvalue())
    return path


def _plain(text: str) -> str:
    """Text as matplotlib shows it unchanged: it would set formulas, and leave out labels with _."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
