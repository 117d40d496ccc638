"""Training clips of the needle task that are drawn when they are read: no file, nothing to decode.

They are the clips of the ``train`` split, by the same numbers, without the way through H.264.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import SupportsIndex

import numpy as np

from data.jsonl import Example
from data.needle.builder import check_length, make_rng
from data.needle.render import COLOURS, ask, draw_frame, draw_video, load_digits, plan_video

#: What a single frame shows → how many kinds of it there are.
LABELS = {"digit": 10, "colour": len(COLOURS)}


@dataclasses.dataclass(frozen=True)
class DrawnVideo:
    """A video of the ``train`` split, by its length and number."""

    num_frames: int
    number: int

    def frames(self, size: int) -> np.ndarray:
        """Draws it, uint8[T, size, size, 3]."""
        digits, labels = load_digits("train")
        rng = make_rng("train", self.num_frames, self.number)
        plot = plan_video(len(labels), self.num_frames, rng, repeat=False)
        return draw_video(plot, digits, rng, size)


class DrawnClips:
    """Examples whose videos are :class:`DrawnVideo`: any number of them costs nothing.

    Args:
      num_frames: T of every clip.
      size: how many clips there are.

    Raises:
      DataError: for a length that no video of the task has.
    """

    def __init__(self, num_frames: int, size: int):
        check_length(num_frames)
        self._num_frames, self._size = num_frames, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = operator.index(index)
        if not 0 <= number < self._size:
            raise IndexError(index)
        _, labels = load_digits("train")
        rng = make_rng("train", self._num_frames, number)
        plot = plan_video(len(labels), self._num_frames, rng, repeat=False)
        return Example(
            id=f"drawn-t{self._num_frames}-{number:05d}",
            video=DrawnVideo(self._num_frames, number),
            question=ask(plot.asked, number, self._num_frames, "train"),
            answer=str(labels[plot.images[plot.needle]]),
            start=None,
            end=None,
        )

    def __repr__(self) -> str:
        return f"DrawnClips({self._num_frames}, {self._size})"

    def identity(self) -> str:
        """Changes when the clips do."""
        return repr(self)

    def fingerprint(self) -> str:
        """The same: there is no file that could change."""
        return repr(self)


def labelled_frames(
    rows: int, size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Endless batches of single frames of the ``train`` split, with what they show.

    Args:
      rows: of a batch.
      size: side of a frame, pixels.
      seed: of all that is random.

    Yields:
      uint8[rows, size, size, 3], and int64[rows] for each of :data:`LABELS`.
    """
    digits, labels = load_digits("train")
    rng, colours = np.random.default_rng(seed), list(COLOURS.values())
    while True:
        image, colour = rng.integers(len(labels), size=rows), rng.integers(len(colours), size=rows)
        frames = [
            draw_frame(digits[i], colours[c], rng, size) for i, c in zip(image, colour, strict=True)
        ]
        yield np.stack(frames), {"digit": labels[image], "colour": colour}
