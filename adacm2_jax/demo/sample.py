"""A video that comes with the page: digits on coloured grounds, drawn from a seed."""

import os
from pathlib import Path

import numpy as np

#: What to ask about it. Exactly one frame is red.
QUESTION = "which digit was on the red ground?"
FRAMES, SIDE, SEED = 48, 256, 7
_COLOURS = {
    "red": (235, 60, 60),
    "orange": (255, 145, 20),
    "yellow": (245, 230, 60),
    "green": (60, 190, 80),
    "cyan": (80, 215, 225),
    "blue": (75, 110, 245),
    "purple": (180, 80, 230),
    "white": (240, 240, 240),
}
#: Digits of 8 x 8 pixels, a hexadecimal figure of ink each.
_DIGITS = """
0 0008c400 005ffd00 00df7e80 00fa0bb0 00f809c0 00fb1ea0 008fff40 0007da00
1 00009f20 0006ff20 007fff10 00bfff00 0005ff00 0006ff00 0009ff20 0009ff40
2 0008fb00 006fff40 008a6f70 00009f60 0001fd00 000cf700 007ffb84 009ffff9
3 000bffa0 00199ee0 0000bf80 0009ffc0 000359f2 000000f5 00644bf2 001dffa0
4 00009f00 0004fa00 001ed000 009f40a0 00fb06f2 02fffff0 00579f90 0000cf40
5 005ffff0 00bf8750 00fa0000 00fffc20 00367fb0 00000ae0 002039f0 006ffe40
6 0005f600 001ef100 007f7000 00bfda20 00efdfe0 00bf15f3 004f99f2 0006ef70
7 000dffd0 001afff2 00000eb0 0003dfc5 002fffd2 0007fa00 000bf200 000fd000
8 0006ed20 002ffdc0 002f55f2 000cfe80 000bfe20 004f6ba0 005f58e0 0009ffa0
9 0007ee50 003fbaf0 007f05f1 003fdef0 00059be0 000009e0 00403cd0 0009ff60
"""


def make_sample(path: str | os.PathLike) -> str:
    """Writes the video, H.264 in MP4 at one frame a second; returns the right answer.

    Which frame is red and which digit it shows follows from :data:`SEED`.
    """
    import av

    rng = np.random.default_rng(SEED)
    names = [name for name in _COLOURS if name != "red"]
    colours = [names[i] for i in rng.integers(len(names), size=FRAMES)]
    needle = int(rng.integers(FRAMES // 8, FRAMES // 3))
    colours[needle] = "red"
    digits = rng.integers(10, size=FRAMES)
    with av.open(os.fspath(Path(path)), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=1)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18", "threads": "1"}
        for digit, colour in zip(digits, colours, strict=True):
            frame = _draw(int(digit), _COLOURS[colour], rng)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return str(digits[needle])


def _draw(digit: int, colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A digit on a ground, placed and turned a little at random: uint8[SIDE, SIDE, 3]."""
    from PIL import Image

    _, *rows = _DIGITS.strip().split("\n")[digit].split()
    ink = np.array([[int(figure, 16) * 17 for figure in row] for row in rows], np.uint8)
    angle, zoom = np.deg2rad(rng.uniform(-6, 6)), SIDE / 64 * rng.uniform(6.2, 7.0)
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    x, y = SIDE / 2 + SIDE / 64 * rng.uniform(-3, 3, 2)
    inverse = (cos, sin, 4 - cos * x - sin * y, -sin, cos, 4 + sin * x - cos * y)
    placed = Image.fromarray(ink).transform(
        (SIDE, SIDE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC
    )
    left = 1 - np.asarray(placed, np.float32)[..., None] / 255
    return (np.asarray(colour, np.float32) * left).astype(np.uint8)
