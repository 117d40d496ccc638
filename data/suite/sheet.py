"""Contact sheets: what the videos of a kind look like, for a person to check that they can be read.

One strip a video: some of its frames in a row, each with its number under it, those that answer the
first question framed; the question and its answer stand below.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from adacm2_jax.files import beside_path
from data.suite.video import Kind

_GAP, _LINE, _FRAMED = 4, 14, (255, 0, 200)


def draw_sheet(
    kind: Kind,
    split: str,
    videos: int = 4,
    *,
    columns: int = 16,
    size: int = 56,
    scale: int = 2,
) -> Image.Image:
    """Draws the first videos of a kind as the model sees them.

    Args:
      kind: of the videos.
      split: of them.
      videos: how many.
      columns: frames of a video, at most.
      size: side of the frames that are drawn, pixels.
      scale: pixels of the sheet for one of them.
    """
    side = size * scale
    columns = min(columns, kind.num_frames)
    height = side + 2 * _LINE + 3 * _GAP
    width = columns * (side + _GAP) + _GAP
    sheet = Image.new("RGB", (width, videos * height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for number in range(videos):
        plan = kind.plan(split, number)
        frames, question = kind.frames(split, number, size), plan.questions[0]
        top = number * height + _GAP
        for place, t in enumerate(choose_frames(kind.num_frames, question.frames, columns)):
            left = _GAP + place * (side + _GAP)
            picture = Image.fromarray(frames[t]).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            if t in question.frames:
                box = (left - 2, top - 2, left + side + 1, top + side + 1)
                pen.rectangle(box, outline=_FRAMED, width=3)
            pen.text((left + 2, top + side + 1), str(t), fill=(200, 200, 200))
        others = f"   (+ {len(plan.questions) - 1} more)" if len(plan.questions) > 1 else ""
        text = f"{kind.task}, {kind.style}: {question.text}  {question.answer}{others}"
        pen.text((_GAP, top + side + _LINE), text, fill=(255, 255, 255))
    return sheet


def choose_frames(total: int, needed: tuple[int, ...], columns: int) -> list[int]:
    """Which frames are shown: those that answer, as far as there is room, and others evenly."""
    chosen = set(needed[:columns])
    for t in np.linspace(0, total - 1, 4 * columns).round().astype(int)[_spread(4 * columns)]:
        if len(chosen) >= min(columns, total):
            break
        chosen.add(int(t))
    for t in range(total):
        if len(chosen) >= min(columns, total):
            break
        chosen.add(t)
    return sorted(chosen)


def _spread(count: int) -> np.ndarray:
    """The numbers below ``count``, such that the first of them lie far apart."""
    order = sorted(range(count), key=lambda i: (i % 4, i))
    return np.array(order)


def write_sheet(path: str | os.PathLike, kind: Kind, split: str, videos: int = 4) -> None:
    """Writes the sheet of :func:`draw_sheet` as a PNG file."""
    path = pathlib.Path(path)
    beside = beside_path(path)
    try:
        draw_sheet(kind, split, videos).save(beside, format="PNG")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
