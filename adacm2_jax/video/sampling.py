"""Which instants of a video are looked at; knows neither files nor codecs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.video.room import check_room

#: How frames can be made square, see resize.py.
RESIZE_NAMES = ("clean", "ma_lmm")
# Annotations give whole seconds: an end this far past the video's is taken as the video's end.
_END_SLACK = 1.0
# Of a frame that is read: its instant, float64, among those chosen and among those handed out.
_INSTANT_BYTES = 16
# Frames beyond any memory; a larger number has too many digits to be told.
_MOST = 1e18
#: What to do about too many frames.
FEWER = "lower --fps or --num-frames (sampling.fps, sampling.num_frames)"


@dataclass(frozen=True)
class Sampling:
    """How frames are chosen, by time stamps.

    Attributes:
        mode: "fps" takes a frame every 1 / `fps` seconds; "uniform" spreads `num_frames` evenly.
            More than the video has repeat those that it has, each for as long as it is shown.
        fps: frames per second (mode "fps").
        num_frames: frames of a video (mode "uniform").
        max_frames: None, or a cap (mode "fps"): a video that would have more frames than that is
            sampled uniformly with so many.
        grid: 0, or of mode "uniform": choose among frames so many a second, the first and the last
            always among them, as MA-LMM chooses among its extracted frames (ten a second): numbers
            rint(linspace(first, last, num_frames)).
    Raises:
        DataError: a field is out of range.
    """

    mode: Literal["fps", "uniform"] = "fps"
    fps: float = 1.0
    num_frames: int = 0
    max_frames: int | None = None
    grid: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("fps", "uniform"):
            raise DataError(f"sampling.mode={self.mode!r}: must be 'fps' or 'uniform'")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise DataError(
                f"sampling.fps={self.fps!r}: must be a positive number of frames a second"
            )
        if self.mode == "uniform" and self.num_frames < 1:
            raise DataError(
                f"sampling.num_frames={self.num_frames!r}: mode 'uniform' needs 1 or more"
            )
        if self.num_frames < 0:
            raise DataError(f"sampling.num_frames={self.num_frames!r}: must be 0 or more")
        if not (math.isfinite(self.grid) and self.grid >= 0):
            raise DataError(f"sampling.grid={self.grid!r}: must be frames a second, or 0 for none")
        if self.grid and self.mode != "uniform":
            raise DataError(f"sampling.grid={self.grid:g} is for mode 'uniform'; set it to 0")
        if self.max_frames is not None and self.max_frames < 1:
            raise DataError(f"sampling.max_frames={self.max_frames!r}: must be 1 or more, or None")


#: How a single video is read, unless told otherwise.
ONE_A_SECOND = Sampling("fps", 1.0)


def sample_times(
    duration: float,
    sampling: Sampling,
    start: float | None = None,
    end: float | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Chooses the instants whose frames are taken.

    Args:
        duration: of the video, seconds from its start.
        sampling: mode "fps" gives start + k / fps below end, and at least one instant. Mode
            "uniform" cuts [start, end) into equal segments and gives their midpoints.
        start, end: the part of the video that counts, seconds; None for the video's own.
        rng: with it, mode "uniform" draws an instant uniformly inside each segment (for training).
    Returns:
        float64[T], seconds, increasing.
    Raises:
        DataError: `start` or `end` is outside the video, or they are reversed; or the instants
            are more than the machine's memory holds.
    """
    start, end = _window(duration, start, end)
    count = sampling.num_frames
    if sampling.mode == "fps":
        # A billionth of a frame keeps rounding from adding one at `end` itself.
        count = max(1, math.ceil(min((end - start) * sampling.fps, _MOST) - 1e-9))
        if sampling.max_frames is None or count <= sampling.max_frames:
            _check_count(count)
            return start + np.arange(count) / sampling.fps
        count = sampling.max_frames
    _check_count(count)
    if sampling.grid:
        # Half a frame's length after it begins: whatever a clock rounds, it is that frame.
        return (_numbers(start, end, count, sampling.grid, rng) + 0.5) / sampling.grid
    within = np.full(count, 0.5) if rng is None else rng.random(count)
    return start + (np.arange(count) + within) * ((end - start) / count)


def _numbers(
    start: float, end: float, count: int, grid: float, rng: np.random.Generator | None
) -> np.ndarray:
    """Numbers of ``count`` frames of ``grid`` a second that begin in [start, end)."""
    first = math.ceil(start * grid - 1e-6)
    last = max(first, math.ceil(end * grid - 1e-6) - 1)
    if rng is None:
        return np.rint(np.linspace(first, last, count))
    # MA-LMM's training: a frame drawn from each of as many equal segments.
    ends = np.linspace(first, last + 1, count + 1).astype(np.int64)
    return rng.integers(ends[:-1], np.maximum(ends[1:], ends[:-1] + 1)).astype(np.float64)


def _check_count(count: int) -> None:
    what = f"the times of {count:,} frames alone"
    check_room(count * _INSTANT_BYTES, what, FEWER, DataError)


def _window(duration: float, start: float | None, end: float | None) -> tuple[float, float]:
    lasts = f"the video lasts {duration:.2f} s"
    first = 0.0 if start is None else start
    last = duration if end is None else end
    if not (math.isfinite(first) and 0 <= first < duration):
        raise DataError(f"start={first:g} s is outside: {lasts}; give a start inside it")
    if not (math.isfinite(last) and 0 < last <= duration + _END_SLACK):
        raise DataError(f"end={last:g} s is outside: {lasts}; give an end inside it")
    if first == last:
        raise DataError(
            f"start={first:g} s and end={last:g} s leave nothing to read: give an end after the "
            f"start ({lasts})"
        )
    if first > last:
        raise DataError(f"start={first:g} s is not before end={last:g} s: swap them ({lasts})")
    return float(first), float(min(last, duration))
