"""One video of the suite by what determines it: its kind, split and number."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.video.room import check_room
from data.needle.render import FRAME_SIZE, load_digits
from data.suite.plan import TASKS, Plan, check, plan_video
from data.suite.styles import STYLES, draw_video
from data.suite.styles import check as check_style

SPLITS = ("train", "val", "test")
#: Least share of the frame's side at which a digit can still be read at 56 pixels.
_LEAST_SHARE = 0.3
_VAL_SHARE = 0.2


@functools.cache
def digits_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwritten digits of a split: no two splits share one.

    ``test`` has those of the needle task's ``test``; of its ``train``, one fifth is ``val``.

    Returns:
      float32[n, 8, 8] in [0, 1] and int64[n], the digit.
    """
    if split == "test":
        return load_digits("test")
    images, labels = load_digits("train")
    cut = int(len(labels) * _VAL_SHARE)
    chosen = slice(cut) if split == "val" else slice(cut, None)
    return images[chosen], labels[chosen]


def check_frames(num_frames: int, size: int) -> None:
    """Refuses a video whose frames this machine's memory does not hold.

    Args:
      num_frames: T.
      size: side of the frames, pixels.
    """
    # Its frames one by one and in one array; and what is planned of each.
    each = 2 * 3 * size * size + 64
    what = f"the {num_frames:,} frames of a video"
    check_room(num_frames * each, what, "lower num_frames or size", DataError)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What videos have in common.

    Attributes:
      task: one of ``plan.TASKS``.
      style: one of ``styles.STYLES``.
      num_frames: T.
      questions: about a video, at most.
      needle_frames: frames of a shot that is asked about; 0 for the style's own.
      ages: least and most frames after what is asked about; empty for any.
      share: of the frame's side that a digit takes; 0 for the style's own.
      seed: another one gives other videos.

    Raises:
      DataError: for a kind that no video can be of.
    """

    task: str
    style: str
    num_frames: int
    questions: int = 1
    needle_frames: int = 0
    ages: tuple[int, ...] = ()
    share: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check(self.task, self.num_frames, self.ages, self.needle_frames)
        check_style(self.style)
        check_frames(self.num_frames, FRAME_SIZE)
        for field in ("seed", "needle_frames"):
            if getattr(self, field) < 0:
                raise DataError(f"{field} = {getattr(self, field)} must be at least 0")
        if self.questions < 1:
            raise DataError(f"questions = {self.questions} must be at least 1")
        if self.share and not _LEAST_SHARE <= self.share <= 1:
            raise DataError(
                f"share = {self.share:g} must be {_LEAST_SHARE:g} to 1 (a smaller digit cannot be "
                "read), or 0 for the style's own"
            )

    def name(self, split: str) -> str:
        """What its files of a split are called, without a number."""
        seed = f"-s{self.seed}" if self.seed else ""
        return f"{split}-{self.task}-{self.style}-t{self.num_frames}{seed}"

    def _rng(self, split: str, number: int) -> np.random.Generator:
        places = SPLITS.index(split), TASKS.index(self.task), list(STYLES).index(self.style)
        return np.random.default_rng([self.seed, *places, self.num_frames, number])

    def plan(self, split: str, number: int) -> Plan:
        """What video ``number`` of a split shows."""
        return self._plan(split, number, self._rng(split, number))

    def _plan(self, split: str, number: int, rng: np.random.Generator) -> Plan:
        return plan_video(
            self.task,
            STYLES[self.style].pace,
            digits_of(split)[1],
            self.num_frames,
            rng,
            number=number,
            questions=self.questions,
            asked=self.needle_frames,
            ages=self.ages,
            repeat=split != "train",
        )

    def frames(self, split: str, number: int, size: int) -> np.ndarray:
        """Draws video ``number`` of a split, uint8[T, size, size, 3]."""
        rng = self._rng(split, number)
        plan = self._plan(split, number, rng)
        return draw_video(plan, self.style, digits_of(split)[0], rng, size, self.share)
