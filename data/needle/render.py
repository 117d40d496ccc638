"""Pictures and videos of the needle task: handwritten digits on coloured grounds.

Each frame shows one digit on a coloured ground. Exactly one frame, the needle, has the colour that
the question asks about; every other colour that occurs, occurs more than once (only in the training
clips, which are too short for that, may it occur once). The digits are the
1,797 handwritten ones that ship with scikit-learn; train and test never share a digit image.
"""

import io

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
QUESTION = "which digit was on the {} ground?"
_TEST_SHARE = 0.2


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
    digit: np.ndarray, colour: tuple[int, int, int], rng: np.random.Generator
) -> np.ndarray:
    """One digit on one ground, placed, sized and turned a little at random.

    Args:
      digit: float32[8, 8] in [0, 1].
      colour: of the ground, RGB.
      rng: source of the variation.

    Returns:
      uint8[64, 64, 3].
    """
    size = FRAME_SIZE
    zoom = rng.uniform(6.2, 7.0)  # pixels of the frame for a pixel of the digit
    angle = np.deg2rad(rng.uniform(-6, 6))
    shift = rng.uniform(-3, 3, 2)
    # the inverse map that PIL wants: frame pixel → digit pixel
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = size / 2 + shift
    inverse = (cos, sin, 4 - cos * x - sin * y, -sin, cos, 4 + sin * x - cos * y)
    picture = Image.fromarray((digit * 255).astype(np.uint8))
    ink = np.asarray(
        picture.transform((size, size), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC),
        np.float32,
    )[..., None]
    ground = np.asarray(colour, np.float32) + rng.uniform(-12, 12)
    frame = ground * (1 - ink / 255)
    return np.clip(frame, 0, 255).astype(np.uint8)


def draw_video(
    digits: np.ndarray,
    labels: np.ndarray,
    num_frames: int,
    rng: np.random.Generator,
    repeat: bool = True,
) -> tuple[np.ndarray, str, int, int]:
    """A video with one needle.

    Args:
      digits: float32[n, 8, 8], a split's digits.
      labels: int[n].
      num_frames: T, not 2 if ``repeat``.
      rng: everything random is drawn from it.
      repeat: whether every colour but the needle's occurs at least twice; if not (short training
        clips), the other frames all differ in colour as far as there are colours.

    Returns:
      Frames uint8[T, 64, 64, 3], the needle's colour, its digit and its frame number.
    """
    needle = int(rng.integers(num_frames))
    asked, *names = rng.permutation(list(COLOURS)).tolist()
    others = num_frames - 1
    if repeat and others:
        names = names[: rng.integers(1, min(len(names), others // 2) + 1)] * 2
    colours = (names + rng.choice(names, num_frames).tolist())[:others]
    colours = rng.permutation(colours).tolist()
    colours.insert(needle, asked)
    chosen = rng.integers(len(labels), size=num_frames)
    frames = [
        draw_frame(digits[i], COLOURS[name], rng) for i, name in zip(chosen, colours, strict=True)
    ]
    return np.stack(frames), asked, int(labels[chosen[needle]]), needle


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
