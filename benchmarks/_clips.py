"""Clips of the needle task as files, for the checks that ask a server about them."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import PIL.Image

from data.needle.render import FRAME_SIZE, ask, draw_video, encode, load_digits, plan_video

#: Clips of the test set of the same length begin with another number.
_STREAM = 2


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video with one question.

    Attributes:
      path: of the file, H.264 in mp4, one frame a second.
      frames: uint8[T, size, size, 3], as they were drawn.
      question, answer: about it.
    """

    path: Path
    frames: np.ndarray
    question: str
    answer: str


def make_clips(
    directory: Path, count: int, num_frames: int = 16, size: int = FRAME_SIZE
) -> list[Clip]:
    """Draws clips from the digits that no training clip shows, and writes their files."""
    directory.mkdir(parents=True, exist_ok=True)
    digits, labels = load_digits("test")
    clips = []
    for number in range(count):
        rng = np.random.default_rng([_STREAM, num_frames, number])
        plot = plan_video(len(labels), num_frames, rng)
        frames = draw_video(plot, digits, rng, size)
        path = directory / f"needle{number:03d}.mp4"
        path.write_bytes(encode(frames))
        question = ask(plot.asked, number, num_frames, "test")
        clips.append(Clip(path, frames, question, str(labels[plot.images[plot.needle]])))
    return clips


def as_png(frame: np.ndarray) -> bytes:
    """A frame, uint8[height, width, 3], as a picture that loses nothing."""
    target = io.BytesIO()
    PIL.Image.fromarray(frame).save(target, "png")
    return target.getvalue()
