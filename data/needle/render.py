"""Pictures and videos of the needle task: handwritten digits on coloured grounds.

Each frame shows one digit on a coloured ground. Exactly one frame, the needle, has the colour that
the question asks about; every other colour that occurs, occurs more than once (only in the training
clips, which are too short for that, may it occur once). The digits are the
1,797 handwritten ones that ship with scikit-learn; train and test never share a digit image.
"""

import functools
import io
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

#: Ground colours, RGB; the ink is black on all of them.
COLOURS = {
    "red": (235, 60, 60),
    "orange": (255, 145, 20),
    "yellow": (245, 230, 60),
    "green": (60, 190, 80),
    "cyan": (80, 215, 225),
    "blue": (75, 110, 245),
    "purple": (180, 80, 230),
    "white": (240, 240, 240),
}
FRAME_SIZE = 64
#: What is asked, in several wordings, for it is the colour that counts.
QUESTIONS = (
    "which digit was on the {} ground?",
    "which digit was shown on the {} ground in this video?",
    "what number is on the {} background?",
    "what was the digit in the {} frame?",
    "what digit do you see on {}?",
)
_TEST_SHARE = 0.2


def ask(colour: str, number: int, num_frames: int, split: str) -> str:
    """The question about video ``number`` of a split.

    Tests ask in the first wording. So do most training clips, and nearly all of a single frame,
    where nothing is looked for: the more wordings, the longer it takes until anything is learned.
    """
    every = 16 if num_frames == 1 else 4
    other = split == "train" and number % every == 0
    wording = 1 + number // every % (len(QUESTIONS) - 1) if other else 0
    return QUESTIONS[wording].format(colour)


@functools.cache
def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of a split: one fifth of them, drawn once and for all, is ``test``.

    Returns:
      float32[n, 8, 8] in [0, 1] and int64[n], the digit.
    """
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = int(len(labels) * _TEST_SHARE)
    chosen = order[:cut] if split == "test" else order[cut:]
    return (images[chosen].reshape(-1, 8, 8) / 16).astype(np.float32), labels[chosen]


def draw_frame(
    digit: np.ndarray,
    colour: tuple[int, int, int],
    rng: np.random.Generator,
    size: int = FRAME_SIZE,
) -> np.ndarray:
    """One digit on one ground, placed, sized and turned a little at random.

    Args:
      digit: float32[8, 8] in [0, 1].
      colour: of the ground, RGB.
      rng: source of the variation.
      size: side of the frame, pixels.

    Returns:
      uint8[size, size, 3].
    """
    unit = size / FRAME_SIZE
    zoom = unit * rng.uniform(6.2, 7.0)  # pixels of the frame for a pixel of the digit
    angle = np.deg2rad(rng.uniform(-6, 6))
    shift = unit * rng.uniform(-3, 3, 2)
    # the inverse map that PIL wants: frame pixel → digit pixel
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = size / 2 + shift
    inverse = (cos, sin, 4 - cos * x - sin * y, -sin, cos, 4 + sin * x - cos * y)
    picture = Image.fromarray((digit * 255).astype(np.uint8))
    ink = np.asarray(
        picture.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    )
    ground = np.clip(np.asarray(colour, np.float32) + rng.uniform(-12, 12), 0, 255)
    # By a table: what each of the 256 depths of ink leaves of the ground.
    return (ground * (1 - np.arange(256, dtype=np.float32)[:, None] / 255)).astype(np.uint8)[ink]


class Plot(NamedTuple):
    """What a video shows, before anything is drawn."""

    #: T names of :data:`COLOURS`, the ground of each frame.
    colours: list[str]
    #: int[T]: the digit image of each frame.
    images: np.ndarray
    #: The number of the frame that answers.
    needle: int

    @property
    def asked(self) -> str:
        """The colour that only the needle has."""
        return self.colours[self.needle]


def plan_video(
    num_images: int, num_frames: int, rng: np.random.Generator, repeat: bool = True
) -> Plot:
    """What a video with one needle shows.

    Args:
      num_images: the digit images that there are to choose from.
      num_frames: T, not 2 if ``repeat``.
      rng: everything random is drawn from it.
      repeat: whether every colour but the needle's occurs at least twice; if not (short training
        clips), the other frames all differ in colour as far as there are colours.
    """
    needle = int(rng.integers(num_frames))
    asked, *others = rng.permutation(len(COLOURS))
    count = num_frames - 1
    if repeat and count:
        others = others[: rng.integers(1, min(len(others), count // 2) + 1)] * 2
    more = rng.integers(len(others), size=max(count - len(others), 0))
    chosen = rng.permutation((others + [others[i] for i in more])[:count]).astype(int).tolist()
    chosen.insert(needle, asked)
    names = tuple(COLOURS)
    images = rng.integers(num_images, size=num_frames)
    return Plot([names[i] for i in chosen], images, needle)


def draw_video(
    plot: Plot, digits: np.ndarray, rng: np.random.Generator, size: int = FRAME_SIZE
) -> np.ndarray:
    """Draws what was planned.

    Args:
      plot: of :func:`plan_video`.
      digits: float32[n, 8, 8], the images that it chose from.
      rng: how the digits are placed.
      size: side of the frames, pixels.

    Returns:
      uint8[T, size, size, 3].
    """
    return np.stack(
        [
            draw_frame(digits[image], COLOURS[colour], rng, size)
            for image, colour in zip(plot.images, plot.colours, strict=True)
        ]
    )


def encode(frames: np.ndarray) -> bytes:
    """H.264 in mp4 at one frame a second.

    Args:
      frames: uint8[T, height, width, 3], even height and width.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
