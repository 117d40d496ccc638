"""A picture of what was remembered of a video: which frames, which patches of them, how much.

Works for any video and any grid of patches; needs matplotlib (``pip install 'adacm2-jax[run]'``),
which is imported when something is drawn.
"""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import UserError, printable

INK, MUTED, FAINT, KEPT, WRONG, PAPER = (
    "#1f2937",
    "#6b7280",
    "#cfd5dd",
    "#0d9488",
    "#b45309",
    "#ffffff",
)
#: Thumbnails in the row of frames, and how many of them at least show what was dropped.
SHOWN, DROPPED = 11, 4


@dataclasses.dataclass(frozen=True)
class Counts:
    """Tokens of one cross-attention layer (where layers differ: of the fullest).

    Attributes:
      seen: of all frames so far.
      kept: in the memory now.
      bound: the most that the memory can ever keep; None if it grows with the video.
    """

    seen: int
    kept: int
    bound: int | None


def draw_memory(
    path: str | os.PathLike,
    frames: np.ndarray | Mapping[int, np.ndarray],
    kept: Sequence[np.ndarray],
    times: np.ndarray,
    question: str,
    answer: str,
    counts: Counts,
    grid: tuple[int, int] | None = None,
    truth: str | None = None,
) -> None:
    """Draws what a memory holds of a video and writes it as a PNG.

    Args:
      path: of the PNG.
      frames: uint8[T, height, width, 3], all frames that were read, or what gives frame t as
        ``frames[t]``.
      kept: for each layer int[n, 2], the frame and the place in it of every token that is kept:
        place 0 is the frame's CLS token, then come the patches row by row.
      times: float[T], seconds.
      question: that was asked.
      answer: that was given.
      counts: how many tokens there are.
      grid: patches of a frame, rows and columns; by default the smallest square that holds them.
      truth: the right answer, where it is known.

    Raises:
      UserError: if a token lies outside of the video or the grid, or matplotlib is missing.
    """
    layers = [np.asarray(pairs, int).reshape(-1, 2) for pairs in kept]
    pairs = np.concatenate(layers) if layers else np.zeros((0, 2), int)
    count = len(times)
    if len(pairs) and not (0 <= pairs[:, 0].min() and pairs[:, 0].max() < count):
        raise UserError(f"a token of frame {pairs[:, 0].max()} is kept, but there are {count}")
    most = int(pairs[:, 1].max(initial=1))
    rows, columns = grid or (math.isqrt(most - 1) + 1,) * 2
    if most > rows * columns:
        raise UserError(f"patch {most} is kept, but the grid has {rows} x {columns} patches")

    # tokens[t, p]: in how many layers the token is kept.
    tokens = np.zeros((count, rows * columns + 1), int)
    np.add.at(tokens, (pairs[:, 0], pairs[:, 1]), 1)
    shown = choose_frames(tokens.sum(1))

    figure, (head, row, line) = _canvas()
    _draw_head(head, question, answer, truth, counts)
    centres = _draw_frames(row, frames, tokens, times, shown, (rows, columns), len(layers))
    _draw_timeline(line, tokens, times, shown, centres, len(layers))
    figure.savefig(path, facecolor=PAPER, format="png")


def choose_frames(held: np.ndarray, shown: int = SHOWN, dropped: int = DROPPED) -> list[int]:
    """Frames for the row: those that hold most tokens and the newest, and dropped ones between.

    Args:
      held: int[T], tokens that each frame holds.
      shown: how many frames.
      dropped: how many of them at least hold none, if there are as many.

    Returns:
      Their numbers, in time order.
    """
    count = len(held)
    if count <= shown:
        return list(range(count))
    # Of frames that hold as many, those that are spread over the video come first.
    spread = np.array([int(f"{t:040b}"[::-1], 2) for t in range(count)])
    holding = [int(t) for t in np.lexsort((spread, -np.asarray(held))) if held[t]]
    if count - 1 in holding:  # what is newest is always of interest
        holding.remove(count - 1)
        holding.insert(0, count - 1)
    empty = [t for t in range(count) if not held[t]]
    room = max(shown - len(holding), min(dropped, len(empty)))
    chosen = holding[: shown - min(room, len(empty))]
    # Each dropped frame is the one farthest from all that are shown already.
    while len(chosen) < shown and empty:
        near = np.abs(np.subtract.outer(empty, chosen)).min(1) if chosen else np.ones(len(empty))
        chosen.append(empty.pop(int(np.argmax(near))))
    return sorted(chosen)


def _canvas() -> tuple[Any, tuple[Any, Any, Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install matplotlib") from None
    figure = Figure(figsize=(12, 4.8), dpi=150)
    FigureCanvasAgg(figure)
    boxes = ((0.03, 0.765, 0.94, 0.195), (0.03, 0.42, 0.94, 0.30), (0.03, 0.15, 0.94, 0.19))
    parts = tuple(figure.add_axes(box) for box in boxes)
    for axes in parts[:2]:
        axes.set_axis_off()
    return figure, (parts[0], parts[1], parts[2])


def _draw_head(axes: Any, question: str, answer: str, truth: str | None, counts: Counts) -> None:
    """The question and the answer at the left, the counts at the right."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    lines = textwrap.wrap(f"“{printable(question)}”", 62)
    text = "\n".join(lines[:2]) + (" …" if len(lines) > 2 else "")
    plain = dict(weight="bold", parse_math=False)  # a $ in a question is no formula
    axes.text(0, 1, text, fontsize=15.5, color=INK, va="top", linespacing=1.2, **plain)
    right = truth is None or answer.strip() == truth.strip()
    note = "" if truth is None else "  ✓ right" if right else f"  ✗ right would be {truth}"
    colour = KEPT if right else WRONG
    said = axes.annotate("answer:  ", (0, 0.1), fontsize=13, color=MUTED)
    for word, size in ((textwrap.shorten(printable(answer), 40), 24), (note, 13)):
        said = axes.annotate(
            word,
            (1, 0.1),
            xycoords=(said, axes.transAxes),
            fontsize=size,
            color=colour,
            **plain,
        )
    bound = "none" if counts.bound is None else f"{counts.bound:,}"
    for place, (number, label, colour) in enumerate(
        (
            (f"{counts.seen:,}", "tokens seen", MUTED),
            (f"{counts.kept:,}", "kept", KEPT),
            (bound, "the most it can keep,\nhowever long the video", INK),
        )
    ):
        x = (0.685, 0.79, 0.86)[place]
        axes.text(x, 1, number, fontsize=22, color=colour, va="top", weight="bold")
        axes.text(x, 0.6, label, fontsize=10.5, color=MUTED, va="top", linespacing=1.25)


def _draw_frames(
    axes: Any,
    frames: Any,
    tokens: np.ndarray,
    times: np.ndarray,
    shown: Sequence[int],
    grid: tuple[int, int],
    layers: int,
) -> list[float]:
    """The row of frames; returns where each one's middle is, as a share of the row's width."""
    from matplotlib.patches import Rectangle

    gap, wide, high = 0.12, 11.28, 1.41  # inches: figure size times the row's box
    height, width = np.asarray(frames[shown[0]]).shape[:2]
    side = min((wide + gap) / max(len(shown), 6) - gap, high * 0.86 * width / height)
    tall = side * height / width
    start = (wide - len(shown) * (side + gap) + gap) / 2
    axes.set(xlim=(0, wide), ylim=(0, high))
    bottom = 0.1
    centres = []
    for place, t in enumerate(shown):
        left = start + place * (side + gap)
        centres.append((left + side / 2) / wide)
        held = tokens[t]
        picture = np.asarray(frames[t], np.float32)
        veiled = 0.16 * picture + 0.84 * (0.35 * picture.mean(-1, keepdims=True) + 165)
        picture = np.where(_patch_mask(held, grid, (height, width))[..., None], picture, veiled)
        box = (left, left + side, bottom, bottom + tall)
        axes.imshow(
            picture.clip(0, 255).astype(np.uint8),
            extent=box,
            aspect="auto",
            interpolation="nearest",
        )
        cell_high, cell_wide = tall / grid[0], side / grid[1]
        for patch in np.flatnonzero(held[1:]):
            row, column = divmod(int(patch), grid[1])
            axes.add_patch(
                Rectangle(
                    (left + column * cell_wide, bottom + tall - (row + 1) * cell_high),
                    cell_wide,
                    cell_high,
                    fill=False,
                    edgecolor=KEPT,
                    clip_on=False,
                    linewidth=0.8 + 1.6 * held[1 + patch] / layers,
                )
            )
        any_held = bool(held.any())
        axes.add_patch(
            Rectangle(
                (left, bottom),
                side,
                tall,
                fill=False,
                edgecolor=KEPT if any_held else FAINT,
                clip_on=False,
                linewidth=2.2 if any_held else 1,
            )
        )
        if held[0]:
            axes.text(
                left + 0.04,
                bottom + tall - 0.04,
                "CLS",
                fontsize=7.5,
                weight="bold",
                color=PAPER,
                va="top",
                bbox=dict(boxstyle="round,pad=0.25", facecolor=KEPT, edgecolor="none"),
            )
        axes.text(
            left + side / 2,
            bottom + tall + 0.05,
            _clock(float(times[t])),
            fontsize=9.5,
            color=KEPT if any_held else MUTED,
            weight="bold" if any_held else "normal",
            ha="center",
            va="bottom",
        )
    return centres


def _patch_mask(held: np.ndarray, grid: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """bool[height, width]: the pixels of kept patches; of a kept CLS alone, all of them."""
    rows, columns = grid
    if held[0] and not held[1:].any():
        return np.ones(shape, bool)
    y = np.arange(shape[0]) * rows // shape[0]
    x = np.arange(shape[1]) * columns // shape[1]
    return (held[1:].reshape(rows, columns) > 0)[np.ix_(y, x)]


def _draw_timeline(
    axes: Any,
    tokens: np.ndarray,
    times: np.ndarray,
    shown: Sequence[int],
    centres: Sequence[float],
    layers: int,
) -> None:
    """Every frame at its time: a tick for those that were dropped, a bar for those that hold
    tokens, and a line from each thumbnail to its frame."""
    from matplotlib.patches import ConnectionPatch

    held = tokens.sum(1) / max(layers, 1)
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1.0
    first, last = float(times[0]) - step / 2, float(times[-1]) + step / 2
    highest = max(float(held.max()), 1.0)
    axes.set(xlim=(first, last), ylim=(0, highest * 1.6))
    axes.bar(times, np.full(len(times), highest * 0.05), step * 0.8, color=FAINT, linewidth=0)
    axes.bar(times, held, max(step * 0.8, (last - first) / 400), color=KEPT, linewidth=0)
    for t, centre in zip(shown, centres, strict=True):
        top = max(float(held[t]), highest * 0.05)
        if held[t]:
            axes.annotate(
                f"{held[t]:.3g}",
                (times[t], top),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=KEPT,
                weight="bold",
            )
        line = ConnectionPatch(
            (centre, 0.03),
            (times[t], held[t] + highest * 0.3 if held[t] else highest * 0.08),
            coordsA=axes.figure.axes[1].transAxes,
            coordsB=axes.transData,
            color=KEPT if held[t] else FAINT,
            linewidth=1.2 if held[t] else 0.8,
            alpha=0.9,
            zorder=0,
        )
        axes.figure.add_artist(line)
    axes.patch.set_visible(False)  # the lines are drawn beneath
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_yticks([])
    axes.tick_params(axis="x", colors=MUTED, labelsize=9.5, length=0)
    axes.xaxis.set_major_formatter(lambda value, _: _clock(value))
    axes.set_xlabel(
        "Time in the video. Grey: frames that were read and dropped. Green: frames of which the "
        "memory still holds tokens, and how many in a layer.\nKept patches are outlined; CLS is "
        "the token that stands for a whole frame.",
        fontsize=9.5,
        color=MUTED,
        labelpad=6,
    )


def _clock(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``."""
    whole = int(seconds)
    text = f"{whole // 60}:{whole % 60:02d}"
    if whole >= 3600:
        text = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return text
