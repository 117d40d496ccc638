"""The tables of ``make suite`` on one page: a table a study, from what ``adacm2 ablate`` wrote.

python benchmarks/suite_tables.py [--workdir runs/suite] [--output docs/suite_tables.md]
"""

import argparse
import csv
import pathlib
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.errors import UserError  # noqa: E402
from adacm2_jax.files import check_writable, write_text  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from benchmarks.suite import STUDIES  # noqa: E402

HEAD = """# The suite in tables

Written by `python benchmarks/suite_tables.py` from what `make suite` leaves ([suite.md](suite.md)
explains tasks and studies, [results.md](results.md) says what the tables mean). Accuracy in % with
its 95 % interval over videos; a column is a task, with the number of frames (and the style).
*Tokens* is what a layer holds in the end, at most.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/suite")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", default="docs/suite_tables.md")
    args = parser.parse_args()
    root, output = pathlib.Path(args.workdir) / args.split, pathlib.Path(args.output)
    check_writable(output.parent, f"--output {args.output}")
    parts = [HEAD]
    for name, study in STUDIES.items():
        several = len(study.stages) > 1
        places = {stage: root / name / stage if several else root / name for stage in study.stages}
        found = {
            (stage if several else ""): read(place / "accuracy.csv")
            for stage, place in places.items()
            if (place / "accuracy.csv").exists()
        }
        if found:
            parts.append(section(name, found))
    if len(parts) == 1:
        raise UserError(f"{root} has no results; run make suite")
    write_text(output, "\n".join(parts))
    print(output)


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """The rows of an ``accuracy.csv``."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def section(name: str, found: dict[str, list[dict[str, str]]]) -> str:
    """A study: a line a memory (and trained model), a column a cell."""
    rows = [row for own in found.values() for row in own]
    styles = {row["style"] for row in rows}
    columns = list(dict.fromkeys(column_of(row, styles) for row in rows))
    lines = [
        f"## `{name}`",
        "",
        "| memory | tokens | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for stage, own in found.items():
        for memory in dict.fromkeys(row["memory"] for row in own):
            cells = {column_of(row, styles): row for row in own if row["memory"] == memory}
            kept = max(int(row["kept_tokens"]) for row in cells.values())
            label = " ".join(filter(None, [stage and f"{stage}:", f"`{memory}`"]))
            shown = [cell(cells.get(column)) for column in columns]
            lines.append(f"| {label} | {kept:,} | " + " | ".join(shown) + " |")
    asked = span(int(row["questions"]) for row in rows)
    videos, runs = span(int(row["videos"]) for row in rows), span(int(row["runs"]) for row in rows)
    lines += ["", f"Questions a cell: {asked}, about {videos} videos, by {runs} model(s).", ""]
    return "\n".join(lines)


def column_of(row: dict[str, str], styles: set[str]) -> str:
    """The head of a row's column."""
    style = f", {row['style']}" if len(styles) > 1 else ""
    return f"`{row['task']}`, {int(row['T']):,}{style}"


def cell(row: dict[str, str] | None) -> str:
    """An accuracy and its interval."""
    if row is None:
        return ""
    value, low, high = (100 * float(row[name]) for name in ("accuracy", "low", "high"))
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def span(numbers) -> str:
    """One number, or the least and the most."""
    values: Sequence[int] = sorted(set(numbers))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


if __name__ == "__main__":
    app.guarded(main)
