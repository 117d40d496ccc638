"""Windows of one video that have frames in common: each frame is decoded and computed once.

Where the instants of all windows of a video fall together, as those of every 20 s with a frame a
second do, its features are kept once, and the windows are lists of them. The frames of a video are
then read in *runs* of a clip's length, which the ViT is given as it is given clips.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from adacm2_jax.errors import DataError, printable
from adacm2_jax.video.frames import read_at, window_times
from adacm2_jax.video.info import TruncatedError
from data.feature_cache.shards import Windows
from data.jsonl import Example
from data.pipeline import LoadClip
from data.workers import decoder_threads

#: Instants that are closer are one, seconds: a rounding, far below any frame's length.
_SAME = 1e-6


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive instants of a video, no more than a clip has.

    Attributes:
      video: its path.
      times: float64[n], seconds.
    """

    video: str
    times: np.ndarray


class LoadRun(LoadClip):
    """Like :class:`LoadClip`, also of a :class:`Run`; what could be read of it is used.

    The row of a run has ``cut`` besides: whether the file is cut short where the frames end.
    """

    def random_map(self, element: tuple[int, Any], rng: np.random.Generator) -> dict[str, Any]:
        index, run = element
        if not isinstance(run, Run):
            return super().random_map(element, rng)
        frames = np.zeros((self.num_frames, self.size, self.size, 3), np.uint8)
        found, error = read_at(
            run.video,
            run.times,
            size=self.size,
            resize=self.resize,
            threads=decoder_threads(),
        )
        frames[: len(found)] = found
        if error:
            logging.warning("%s: %s", printable(run.video), error)
        return {
            "index": np.uint32(index),
            "frames": frames,
            "valid": np.arange(self.num_frames) < len(found),
            "cut": isinstance(error, TruncatedError),
            "question": "",
            "answer": "",
        }


class SharedVideo:
    """A video and the windows of it, opened to learn their instants.

    Attributes:
      runs: what is to be read.

    Args:
      clips: an example of each window.
      load: how clips are read.
    """

    def __init__(self, clips: Sequence[Example], load: LoadClip):
        video = clips[0].video
        windows = [(clip.start, clip.end) for clip in clips]
        try:
            found = window_times(video, load.sampling, windows, load.on_truncated)
        except DataError as error:
            found = [error] * len(clips)
        self._times, self._cut_is_error = [], load.on_truncated == "error"
        for clip, times in zip(clips, found, strict=True):
            if isinstance(times, DataError):
                logging.warning("skipped %s: %s", printable(clip.id), times)
                times = np.zeros(0)
            self._times.append(times[: load.num_frames])
        self._all = np.unique(np.concatenate(self._times))
        if len(self._all):
            self._all = self._all[np.diff(self._all, prepend=-np.inf) > _SAME]
        self._length = load.num_frames
        starts = range(0, len(self._all), self._length)
        self.runs = [Run(video, self._all[start : start + self._length]) for start in starts]

    def windows(self, computed: Iterator[tuple[np.ndarray, bool]]) -> Windows:
        """What ``write_shard`` takes.

        Args:
          computed: of each run, in order, the features of the frames that could be read, and
            whether the file is cut short after them.
        """
        # For each instant, the number of its frame among those computed, or -1.
        numbers = np.full(len(self._all), -1)
        cuts = np.zeros(len(self._all), bool)
        done = 0

        def parts() -> Iterator[np.ndarray]:
            nonlocal done
            for number, run in enumerate(self.runs):
                features, cut = next(computed)
                first = number * self._length
                numbers[first : first + len(features)] = done + np.arange(len(features))
                cuts[first : first + len(run.times)] = cut
                done += len(features)
                yield features

        def clips() -> list[np.ndarray]:
            return [self._clip(times, numbers, cuts) for times in self._times]

        return Windows(parts(), clips)

    def _clip(self, times: np.ndarray, numbers: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self._all, times + _SAME, side="right") - 1
        mine = numbers[places]
        missing = mine < 0
        if not missing.any():
            return mine
        first = int(np.argmax(missing))
        if self._cut_is_error or not cuts[places[first]]:
            return mine[:0]
        return mine[:first]
