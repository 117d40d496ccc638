"""How videos of the suite look: one plan, drawn in one of several styles.

``grounds``: each frame is one coloured ground with a digit. ``film``: shots of several frames,
whose textured ground drifts and zooms. ``static``: a still and cluttered grey background, on which
small coloured tiles with a digit appear and move; ``traffic``: the same on a street, from a video
of the package mvtb-data. ``medical``: grey tissue; grounds are told apart by brightness and
pattern. ``sport``: a camera that pans fast over a wide field; the tile moves with it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import read_clip
from adacm2_jax.video.sampling import Sampling
from data.needle.render import COLOURS, draw_frame
from data.suite.plan import Pace, Plan

#: Brightnesses and patterns that tell grey grounds apart.
PATTERNS = ("dark", "bright", "plain", "striped", "dotted", "checked", "ringed")
#: Every word for a ground.
WORDS = (*COLOURS, *PATTERNS)
_WHITE = (255, 255, 255)
_TRAFFIC, _TRAFFIC_PACKAGES = "traffic_sequence.mp4", ("mvtbdata", "mvtb_data")

Draw = Callable[[Plan, np.ndarray, np.random.Generator, int, int], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Style:
    """One look.

    Attributes:
      draw: plan, digits, rng, side of the frames and of the tiles in pixels → every frame.
      pace: how it cuts.
      share: of the frame's side that a tile takes, unless another is asked for.
    """

    draw: Draw
    pace: Pace
    share: float = 1.0


def draw_video(
    plan: Plan,
    style: str,
    digits: np.ndarray,
    rng: np.random.Generator,
    size: int,
    share: float = 0.0,
) -> np.ndarray:
    """Draws what was planned.

    Args:
      plan: of ``plan.plan_video`` with this style's pace.
      style: one of :data:`STYLES`.
      digits: float32[n, 8, 8], the images that it chose from.
      rng: of everything that the plan leaves open.
      size: side of the frames, pixels.
      share: of that side that a digit's tile takes; 0 for the style's own.

    Returns:
      uint8[T, size, size, 3].

    Raises:
      DataError: for an unknown style, or one whose package is not installed.
    """
    check(style)
    look = STYLES[style]
    tile = max(8, round(size * (share or look.share)))
    return np.stack(list(look.draw(plan, digits, rng, size, tile)))


def check(style: str) -> None:
    """Raises ``DataError`` for an unknown style, or one whose package is not installed."""
    if style not in STYLES:
        raise DataError(f"style {style!r:.60} is unknown; there are {', '.join(STYLES)}")
    if style == "traffic":
        traffic_path()


def _ink(digit: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """float32[size, size, 1] in [0, 1]: how much of the ground a digit covers."""
    light = draw_frame(digit, _WHITE, rng, size)[..., :1].astype(np.float32)
    return 1 - light / max(float(light.max()), 1.0)


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise float32[height, width] in [-1, 1], with so many waves along the height."""
    across = max(2, round(cells * width / height))
    coarse = rng.uniform(-1, 1, (cells, across)).astype(np.float32)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(picture), -1, 1)


def _shots(plan: Plan) -> Iterator[tuple[int, bool]]:
    """Of every frame its number, and whether a shot begins there."""
    begins = np.diff(plan.shots, prepend=-1) != 0
    yield from enumerate(begins.tolist())


def _pixels(colour: np.ndarray | float) -> np.ndarray:
    return np.clip(colour, 0, 255).astype(np.uint8)


class _Path:
    """A place of a tile that moves on a straight line and stays within the frame."""

    def __init__(self, rng: np.random.Generator, room: int, speed: float):
        self.room = room
        self.place = rng.uniform(0, room, 2) if room > 0 else np.zeros(2)
        self.step = rng.uniform(-speed, speed, 2) * (room > 0)

    def move(self) -> tuple[int, int]:
        """Where it is; it then moves on, and turns at the frame's sides."""
        x, y = np.clip(np.rint(self.place), 0, max(self.room, 0)).astype(int)
        after = self.place + self.step
        self.step = np.where((after < 0) | (after > self.room), -self.step, self.step)
        self.place = np.clip(self.place + self.step, 0, max(self.room, 0))
        return int(x), int(y)


def _paste(frame: np.ndarray, tile: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    x, y = place
    frame[y : y + len(tile), x : x + len(tile)] = tile
    return frame


# --- The styles ----------------------------------------------------------------------------------


def _draw_grounds(plan, digits, rng, size, tile):
    for ground, image in zip(plan.grounds, plan.images, strict=True):
        made = draw_frame(digits[image], COLOURS[plan.words[ground]], rng, tile)
        if tile < size:
            frame = np.full((size, size, 3), made.max((0, 1)), np.uint8)
            made = _paste(frame, made, tuple(rng.integers(size - tile + 1, size=2)))
        yield made


def _draw_film(plan, digits, rng, size, tile):
    for t, begins in _shots(plan):
        if begins:
            wide = 2 * size
            noise = 0.7 * _noise(rng, wide, wide, 6) + 0.3 * _noise(rng, wide, wide, 24)
            texture = Image.fromarray(noise)
            zoom, corner = rng.uniform(1.0, 1.5), rng.uniform(0, wide - 1.6 * size, 2)
            growth, drift = rng.uniform(0.94, 1.06), rng.uniform(-size / 20, size / 20, 2)
            path = _Path(rng, size - tile, size / 20)
        zoom = float(np.clip(zoom * growth, 0.7, 1.6))
        corner = np.clip(corner + drift, 0, wide - zoom * size)
        box = (*corner, *(corner + zoom * size))
        field = np.asarray(texture.resize((size, size), Image.Resampling.BILINEAR, box))
        ink = np.zeros((size, size, 1), np.float32)
        _paste(ink, _ink(digits[plan.images[t]], rng, tile), path.move())
        colour = np.asarray(COLOURS[plan.words[plan.grounds[t]]], np.float32)
        yield _pixels(colour * (0.88 + 0.14 * field[..., None]) * (1 - ink))


def _tiles_on(plan, digits, rng, size, tile, background, speed):
    """Coloured tiles that appear and move before ``background``, which gives every frame's."""
    path = None
    for t, begins in _shots(plan):
        frame = background(t)
        if plan.images[t] >= 0:
            if begins or path is None:
                path = _Path(rng, size - tile, speed)
            colour = COLOURS[plan.words[plan.grounds[t]]]
            made = draw_frame(digits[plan.images[t]], colour, rng, tile)
            _paste(frame, made, path.move())
        yield frame


def _clutter(rng: np.random.Generator, size: int) -> np.ndarray:
    """A still, grey background of many things, float32[size, size]."""
    canvas = Image.new("L", (4 * size, 4 * size), int(rng.integers(100, 150)))
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(25, 40))):
        x, y = rng.uniform(-0.2, 1, 2) * 4 * size
        width, height = rng.uniform(0.05, 0.35, 2) * 4 * size
        shade = int(rng.integers(40, 200))
        shape = pen.rectangle if rng.integers(2) else pen.ellipse
        shape((x, y, x + width, y + height), fill=shade)
    small = canvas.filter(ImageFilter.GaussianBlur(2)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def _draw_static(plan, digits, rng, size, tile):
    still = _clutter(rng, size)

    def background(_: int) -> np.ndarray:
        grey = still + rng.normal(0, 3, still.shape).astype(np.float32)
        return np.repeat(_pixels(grey)[..., None], 3, axis=2)

    return _tiles_on(plan, digits, rng, size, tile, background, size / 14)


def _draw_traffic(plan, digits, rng, size, tile):
    frames = _traffic(size)
    start = int(rng.integers(len(frames)))

    def background(t: int) -> np.ndarray:
        return frames[(start + t) % len(frames)].copy()

    return _tiles_on(plan, digits, rng, size, tile, background, size / 14)


def traffic_path() -> pathlib.Path:
    """The street's video.

    Raises:
      DataError: if the package that has it is not installed.
    """
    for name in _TRAFFIC_PACKAGES:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(pathlib.Path(place).rglob(_TRAFFIC)):
                return path
    raise DataError(
        f"style 'traffic' needs {_TRAFFIC} of the package mvtb-data, which is not installed: "
        "pip install mvtb-data, or take the style 'static'"
    )


@functools.cache
def _traffic(size: int) -> np.ndarray:
    """The street, uint8[n, size, size, 3], nearly grey: colours are the tiles'."""
    clip = read_clip(str(traffic_path()), Sampling("fps", fps=5.0), size=size).astype(np.float32)
    grey = clip.mean(-1, keepdims=True)
    return _pixels(grey + 0.25 * (clip - grey))


def _pattern(word: str, size: int, shift: np.ndarray) -> np.ndarray:
    """Brightness of a grey ground without its tissue, float32[size, size], moved by ``shift``."""
    unit = size / 56
    x, y = np.meshgrid(np.arange(size, dtype=np.float32) / unit, np.arange(size) / unit)
    x, y = x + shift[0], y + shift[1]
    wave = {
        "striped": np.sign(np.sin(2 * np.pi * x / 9)),
        "dotted": 1 - 2.0 * ((x % 9 - 4.5) ** 2 + (y % 9 - 4.5) ** 2 < 6),
        "checked": np.sign(np.sin(2 * np.pi * x / 18) * np.sin(2 * np.pi * y / 18)),
        "ringed": np.sign(np.sin(2 * np.pi * np.hypot(x - 28, y - 28) / 10)),
    }
    level = {"dark": 62.0, "bright": 228.0}.get(word, 150.0)
    return level + 38 * wave[word] if word in wave else np.full((size, size), level)


def _draw_medical(plan, digits, rng, size, tile):
    tissue = 16 * _noise(rng, 2 * size, 2 * size, 9) + 8 * _noise(rng, 2 * size, 2 * size, 30)
    place = rng.uniform(0, size, 2)
    for t, begins in _shots(plan):
        if begins:
            shift, path = rng.uniform(0, 4, 2), _Path(rng, size - tile, size / 40)
        place = np.clip(place + rng.normal(0, size / 40, 2), 0, size)
        x, y = place.astype(int)
        ground = tissue[y : y + size, x : x + size]
        word = plan.words[plan.grounds[t]]
        ink = np.zeros((size, size), np.float32)
        _paste(ink, _ink(digits[plan.images[t]], rng, tile)[..., 0], path.move())
        pattern = _pattern(word, size, shift + rng.normal(0, 0.4, 2))
        level = float(pattern.mean())
        # Around its strokes a digit stands on an even ground, or rings would hide it.
        ground = ground + level + (pattern - level) * (1 - _halo(ink, size))
        pen = 235.0 if word == "dark" else 8.0
        grey = ground * (1 - ink) + pen * ink
        grey += rng.normal(0, 4, grey.shape)
        yield np.repeat(_pixels(grey)[..., None], 3, axis=2)


def _halo(ink: np.ndarray, size: int) -> np.ndarray:
    """float32[size, size] in [0, 1]: what lies on or beside the ink."""
    picture = Image.fromarray(_pixels(255 * np.minimum(2 * ink, 1)))
    wide = picture.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(size / 40))
    return np.asarray(wide, np.float32) / 255


def _field(rng: np.random.Generator, size: int) -> np.ndarray:
    """A wide field with mown stripes and white lines, float32[size, 8 · size, 3]; it ends as it
    begins, for the camera goes round it."""
    width = 8 * size
    grey = 14 * _noise(rng, size, width, 8) + 10 * _noise(rng, size, width, 28)
    grey += 12 * np.sign(np.sin(2 * np.pi * np.arange(width) / (width / 16)))
    picture = Image.fromarray(_pixels(118 + grey))
    pen = ImageDraw.Draw(picture)
    for x in rng.uniform(0, width, 10):
        lean = rng.uniform(-0.3, 0.3) * size
        pen.line((x, 0, x + lean, size), fill=215, width=max(1, size // 28))
    for x in rng.uniform(0, width, 4):
        radius = rng.uniform(0.2, 0.4) * size
        box = (x - radius, size / 2 - radius, x + radius, size / 2 + radius)
        pen.ellipse(box, outline=215, width=max(1, size // 28))
    tint = np.asarray((0.97, 1.04, 0.90), np.float32)
    return np.asarray(picture, np.float32)[..., None] * tint


def _draw_sport(plan, digits, rng, size, tile):
    field = _field(rng, size)
    camera = {"x": rng.uniform(0, field.shape[1]), "speed": 0.0}
    turns = {t for t, begins in _shots(plan) if begins}

    def background(t: int) -> np.ndarray:
        if t in turns:
            camera["speed"] = rng.uniform(0.12, 0.4) * size * rng.choice((-1, 1))
        camera["x"] += camera["speed"]
        # What passes within the time of an exposure is blurred.
        columns = int(camera["x"]) + np.arange(size)[:, None] + np.arange(3)
        return _pixels(field[:, columns % field.shape[1]].mean(2))

    return _tiles_on(plan, digits, rng, size, tile, background, size / 6)


_SMALL = Pace(tuple(COLOURS), longest=4, asked=(2, 4), blank=0.5)
#: Every style by its name.
STYLES = {
    "grounds": Style(_draw_grounds, Pace(tuple(COLOURS))),
    "film": Style(_draw_film, Pace(tuple(COLOURS), longest=6, asked=(1, 2))),
    "static": Style(_draw_static, _SMALL, 0.45),
    "traffic": Style(_draw_traffic, _SMALL, 0.45),
    "medical": Style(_draw_medical, Pace(PATTERNS, longest=4, asked=(1, 2))),
    "sport": Style(_draw_sport, dataclasses.replace(_SMALL, blank=0.3), 0.5),
}
