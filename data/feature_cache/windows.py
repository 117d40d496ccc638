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
      example: of the video, by its number in the source.
      times: float64[n], seconds.
      video: its path, or its bytes; None where it is only named.
    """

    example: int
    times: np.ndarray
    video: str | bytes | None = None


class Parts(Sequence[Example | Run]):
    """What is decoded one after the other: examples of a source, by number, and runs."""

    def __init__(self, source: Sequence[Example], parts: Sequence[int | Run]):
        self._source, self._parts = source, parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        part = self._parts[index]
        if isinstance(part, Run):
            return dataclasses.replace(part, video=self._source[part.example].video)
        return self._source[part]


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
            logging.warning("%s", error)
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
      shared: whether windows have instants in common; else they are better read as they are.

    Args:
      source: of the clips, with a ``clip(index)``.
      examples: one of each window, by their numbers.
      load: how clips are read.
    """

    def __init__(self, source: Any, examples: Sequence[int], load: LoadClip):
        windows = [source.clip(number)[1:] for number in examples]
        try:
            video = source[examples[0]].video
            found = window_times(video, load.sampling, windows, load.on_truncated)
        except DataError as error:
            found = [error] * len(examples)
        self._times, self._cut_is_error = [], load.on_truncated == "error"
        errors = {}
        for number, times in zip(examples, found, strict=True):
            if isinstance(times, DataError):
                errors[number], times = times, np.zeros(0)
            self._times.append(times[: load.num_frames])
        every = np.concatenate(self._times)
        self._all = np.unique(every)
        if len(self._all):
            self._all = self._all[np.diff(self._all, prepend=-np.inf) > _SAME]
        self.shared = len(self._all) < len(every) or len(errors) == len(examples)
        for number, error in errors.items() if self.shared else ():
            logging.warning("skipped %s: %s", printable(source[number].id), error)
        self._length = load.num_frames
        starts = range(0, len(self._all), self._length)
        self.runs = [Run(examples[0], self._all[start : start + self._length]) for start in starts]

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
