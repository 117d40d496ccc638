"""Training clips of the suite that are drawn when they are read, and single frames with labels."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np

from data.jsonl import Example
from data.suite.plan import Plan
from data.suite.styles import STYLES, WORDS, draw_video
from data.suite.video import Kind, digits_of

#: What a single frame shows → how many kinds of it there are; the last is that it shows nothing.
LABELS = {"digit": 11, "ground": len(WORDS) + 1}
# Frames that are drawn together, on one background.
_TOGETHER = 8


@dataclasses.dataclass(frozen=True)
class DrawnVideo:
    """A video of the ``train`` split, by its kind and number."""

    kind: Kind
    number: int

    def frames(self, size: int) -> np.ndarray:
        """Draws it, uint8[T, size, size, 3]."""
        return self.kind.frames("train", self.number, size)


class DrawnClips:
    """Examples of a mixture of tasks and styles, whose videos are :class:`DrawnVideo`.

    Args:
      kinds: of the clips, which take turns; one that is given twice is seen twice as often.
      size: how many clips there are.
    """

    def __init__(self, kinds: Sequence[Kind], size: int):
        self._kinds, self._size = tuple(kinds), size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> Example:
        place = operator.index(index)
        if not 0 <= place < self._size:
            raise IndexError(index)
        turn, kind = place // len(self._kinds), self._kinds[place % len(self._kinds)]
        # A kind's places differ, so that one given twice does not show the same videos.
        number = turn * self._kinds.count(kind)
        number += self._kinds[: place % len(self._kinds)].count(kind)
        questions = kind.plan("train", number).questions
        question = questions[number % len(questions)]
        return Example(
            id=f"drawn-{kind.task}-{kind.style}-t{kind.num_frames}-{number:05d}",
            video=DrawnVideo(kind, number),
            question=question.text,
            answer=question.answer,
            start=None,
            end=None,
            category=kind.task,
        )

    def __repr__(self) -> str:
        return f"DrawnClips({list(self._kinds)}, {self._size})"

    def identity(self) -> str:
        """Changes when the clips do."""
        return repr(self)

    def fingerprint(self) -> str:
        """The same: there is no file that could change."""
        return repr(self)


def labelled_frames(
    rows: int, size: int, styles: Sequence[str] = ("grounds",), share: float = 0.0, seed: int = 0
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Endless batches of single frames of the ``train`` split, with what they show.

    Args:
      rows: of a batch.
      size: side of a frame, pixels.
      styles: that take turns.
      share: of the frame's side that a digit takes; 0 for the styles' own.
      seed: of all that is random.

    Yields:
      uint8[rows, size, size, 3], and int64[rows] for each of :data:`LABELS`.
    """
    digits, labels = digits_of("train")
    rng, turn = np.random.default_rng(seed), 0
    while True:
        frames: list[np.ndarray] = []
        shown: dict[str, list[np.ndarray]] = {kind: [] for kind in LABELS}
        for first in range(0, rows, _TOGETHER):
            count = min(_TOGETHER, rows - first)
            style, turn = styles[turn % len(styles)], turn + 1
            pace = STYLES[style].pace
            grounds, images = (
                rng.integers(len(pace.words), size=count),
                rng.integers(len(labels), size=count),
            )
            # Empty frames need no half of the lessons.
            empty = rng.random(count) < pace.blank / 4
            places = np.array([WORDS.index(word) for word in pace.words])
            shown["digit"].append(np.where(empty, LABELS["digit"] - 1, labels[images]))
            shown["ground"].append(np.where(empty, LABELS["ground"] - 1, places[grounds]))
            grounds, images = np.where(empty, -1, grounds), np.where(empty, -1, images)
            plan = Plan(pace.words, grounds, images, np.arange(count), ())
            frames.append(draw_video(plan, style, digits, rng, size, share))
        found = {kind: np.concatenate(values) for kind, values in shown.items()}
        yield np.concatenate(frames), found
