"""What late_questions.py has measured, as rows, as a page and as a picture."""

import io
import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from adacm2_jax.files import write_bytes
from adacm2_jax.scoring.intervals import wilson_interval
from adacm2_jax.scoring.metrics import exact_match

#: What keeps tokens without a question, the sessions' own first; and what knows the question.
LATE, KNOWN = ("open", "uniform", "random", "recent"), "known"
NAMES = {
    "open": "late, open memory",
    "uniform": "late, `uniform`",
    "random": "late, `random`",
    "recent": "late, `recent`",
    "known": "known before, `adacm2`",
}
#: Parts of the curve over the frames that came after the needle.
BINS = 8
GOAL = 0.8


class Cell(NamedTuple):
    """What is measured at one length of video."""

    policy: str
    #: That a layer keeps.
    tokens: int

    @property
    def key(self) -> str:
        return f"{self.policy} {self.tokens}"


def marked(lines: Sequence[dict], key: str) -> dict:
    correct = sum(exact_match(line["given"][key], line["answer"]) for line in lines)
    return {
        "questions": len(lines),
        "correct": correct,
        "accuracy": correct / len(lines) if lines else None,
        "interval": list(wilson_interval(correct, len(lines))),
    }


def summarise(lines: Sequence[dict], cells: Sequence[Cell], tokens_per_frame: int) -> list[dict]:
    """A row for each cell of one length, with its ``curve``: the accuracy by the frames that came
    after the needle."""
    frames = lines[0]["frames"]
    edges = np.linspace(0, frames, min(BINS, frames) + 1).round().astype(int).tolist()
    rows = []
    for cell in cells:
        curve = []
        for low, high in itertools.pairwise(edges):
            part = [line for line in lines if low <= frames - 1 - line["needle"] < high]
            curve.append({"from": low, "to": high - 1} | marked(part, cell.key))
        row = {
            "T": frames,
            "policy": cell.policy,
            "tokens": cell.tokens,
            "kept_tokens": max(line["kept"][cell.key] for line in lines),
            "total_tokens": frames * tokens_per_frame,
        }
        rows.append(row | marked(lines, cell.key) | {"curve": curve})
    return rows


def goal_holds(rows: Sequence[dict], frames: int = 64, share: int = 16) -> bool:
    """Whether at this length, with at most that share of the tokens, the open memory answers
    :data:`GOAL` of the late questions, ahead of every other of its size by more than both
    intervals."""
    sizes: dict[int, dict[str, dict]] = {}
    for row in rows:
        if row["T"] == frames and row["kept_tokens"] * share <= row["total_tokens"]:
            sizes.setdefault(row["tokens"], {})[row["policy"]] = row
    return any(
        found["open"]["accuracy"] >= GOAL
        and all(found["open"]["interval"][0] > found[other]["interval"][1] for other in LATE[1:])
        for found in sizes.values()
        if set(LATE) <= set(found)
    )


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line for each way to remember, a column for each length and size."""
    columns = list(dict.fromkeys((row["T"], row["tokens"], row["total_tokens"]) for row in rows))
    heads = [f"T = {t}: {kept} of {total:,} tokens" for t, kept, total in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(columns) + 1) + "|"]
    for policy in (*LATE, KNOWN):
        found = []
        for t, kept, _ in columns:
            (row,) = [r for r in rows if (r["T"], r["tokens"], r["policy"]) == (t, kept, policy)]
            low, high = row["interval"]
            found.append(f"{row['accuracy']:.1%} ({low:.1%}–{high:.1%})")
        lines.append(f"| {NAMES[policy]} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def page(results: dict) -> str:
    first, last = results["videos"]
    return PAGE.format(
        table=table(results["cells"]), questions=results["questions"], first=first, last=last
    )


PAGE = """# Late questions

Written by `make late-questions` from what it measured; all figures are in
[late_questions.json](late_questions.json).

The needle task of the [quickstart](quickstart.md) with its model: which digit was on the ground of
one colour, asked **after the last frame**. Accuracy with its 95 % interval (Wilson), {questions}
questions a cell, each about a video of its own: numbers {first:,} to {last:,} of the test split,
digits that training has not seen, H.264 files read at one frame a second. Chance is 10 %.

{table}
All memories of a column keep the same number of tokens in each layer; the newest frame is read
whole beside them. The open memory is what a session keeps for questions that nobody has asked yet
(see [memory.md](memory.md#novelty)). `uniform`, `random` and `recent` are other ways to keep tokens
without a question. `adacm2` has had the question from the first frame on.

A frame has 17 tokens. So a sixteenth of all is one token a frame, and there `uniform` keeps just
that: a token of every frame. Each token of this ViT shows what its whole frame shows. A memory of
constant size is a smaller and smaller share of a video that goes on, as from 64 to 256 frames with
34 tokens.

![Accuracy by the number of frames that came after the needle](late_questions.png)

The curve has the same answers by the number of frames that came after the needle, in eight parts of
the video.
"""


def draw(rows: Sequence[dict], path: pathlib.Path) -> None:
    """Accuracy by the frames after the needle, a panel for each length and size of the longest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["T"], row["tokens"]) for row in rows))[-4:]
    figure = Figure(figsize=(3.3 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(
        np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True
    ):
        axes.axhline(10, color="gray", linewidth=1, linestyle=":")
        for policy, style in zip((*LATE, KNOWN), ("o-", "^-", "D-", "v-", "s--"), strict=True):
            (row,) = [r for r in rows if (r["T"], r["tokens"], r["policy"]) == (*panel, policy)]
            parts = [part for part in row["curve"] if part["questions"]]
            middle = [(part["from"] + part["to"]) / 2 for part in parts]
            accuracy = np.array([part["accuracy"] for part in parts])
            low, high = np.array([part["interval"] for part in parts]).T
            spread = 100 * np.maximum([accuracy - low, high - accuracy], 0)
            axes.errorbar(
                middle, 100 * accuracy, spread, fmt=style, markersize=4, linewidth=1, capsize=2,
                label=NAMES[policy].replace("`", ""),
            )  # fmt: skip
        axes.set(
            title=f"T = {panel[0]}, {panel[1]} tokens", xlabel="frames after the needle",
            ylim=(0, 101),
        )  # fmt: skip
    first = figure.axes[0]
    first.set_ylabel("right answers, %")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())
