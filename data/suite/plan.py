"""What a video of the suite shows, and what is asked about it: numpy, and nothing is drawn.

A video is a row of shots: some frames with one ground and one digit, or with nothing. A task
places the shots that count; the rest is filled with shots that distract, on other grounds. What
the grounds are called (colours, or patterns), how long shots are and how many are empty, a style
says.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from adacm2_jax.errors import DataError

#: Tasks by name → what a task of that name shows (``generic`` alternates between two).
CONTENT = {
    "needle": ("needle",),
    "order": ("order",),
    "count": ("count",),
    "change": ("change",),
    "two_questions": ("needle",),
    "late": ("needle",),
    "generic": ("needle", "change"),
}
TASKS = tuple(CONTENT)
#: Task → when the reader knows the question; else ``before`` the first frame.
WHEN = {"late": "late", "generic": "generic"}
#: What is read beside the video as long as the question is not known.
READING = {"late": "", "generic": "describe the video"}
#: What is asked, by content.
QUESTIONS = {
    "needle": "which digit was on the {} ground?",
    "order": "which digit came first, on the {} or on the {} ground?",
    "count": "how many frames were on the {} ground?",
    "before": "which digit was on the {} ground before it changed?",
    "after": "which digit was on the {} ground after it changed?",
}
#: The contents of which every answer rests on frames of one time, which can be chosen.
_AGED = ("needle", "order")
_MOST_COUNTED, _MOST_BEFORE = 5, 4


@dataclasses.dataclass(frozen=True)
class Pace:
    """How a style cuts its videos.

    Attributes:
      words: what its grounds are called.
      longest: frames of a shot that distracts, at most.
      asked: the fewest and the most frames of a shot that is asked about.
      blank: share of the distracting shots that show no digit.
    """

    words: tuple[str, ...]
    longest: int = 1
    asked: tuple[int, int] = (1, 1)
    blank: float = 0.0


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about a video.

    Attributes:
      text: what is asked.
      answer: one word.
      frames: the frames that it rests on.
      age: frames between the newest that must be known and the video's end. Of ``change`` that is
        the newest frame with the digit that is asked for, of ``count`` the oldest frame.
    """

    text: str
    answer: str
    frames: tuple[int, ...]
    age: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a video shows.

    Attributes:
      words: names of the grounds.
      grounds: int[T], places in ``words``; -1 where nothing is shown.
      images: int[T], the digit image of each frame; -1 where nothing is shown.
      shots: int[T], rising: frames of one number are one shot.
      questions: about it.
    """

    words: tuple[str, ...]
    grounds: np.ndarray
    images: np.ndarray
    shots: np.ndarray
    questions: tuple[Question, ...]


@dataclasses.dataclass
class _Shot:
    """Frames ``start`` to ``start + length`` with one ground and one image."""

    start: int
    length: int
    ground: int
    image: int


def counts_of(num_frames: int) -> tuple[int, ...]:
    """The answers of ``count`` in a video of so many frames: one frame is left to distract."""
    return tuple(range(1, min(_MOST_COUNTED, num_frames - 1) + 1))


def chance(task: str, num_frames: int) -> float:
    """The accuracy of one answer to everything, for all answers of a task are equally frequent."""
    return 1 / len(counts_of(num_frames)) if task == "count" else 0.1


def chance_without_time(task: str) -> float:
    """The best accuracy of who sees all frames, but not in which order they came."""
    return {"order": 0.5, "change": 0.5, "generic": 0.75}.get(task, 1.0)


def most_questions(task: str, num_frames: int) -> int:
    """How many questions about one video of a task there can be."""
    found = {
        "needle": min(4, num_frames // 2),
        "order": 6 if num_frames >= 6 else 1,
        "count": min(4, num_frames // (_MOST_COUNTED + 1)),
        "change": 2 * min(2, num_frames // 4),
    }
    return max(1, min(found[content] for content in CONTENT[task]))


def check(task: str, num_frames: int, ages: Sequence[int] = (), asked: int = 0) -> None:
    """Refuses what no video of a task can be.

    Args:
      task: its name.
      num_frames: T.
      ages: the least and the most frames after the one that is asked about; empty for any.
      asked: frames of a shot that is asked about; 0 for the style's own.

    Raises:
      DataError: naming the value and what it may be.
    """
    if task not in CONTENT:
        raise DataError(f"task {task!r:.60} is unknown; there are {', '.join(TASKS)}")
    least = 6 if task == "two_questions" else 4
    if num_frames < least:
        raise DataError(f"num_frames = {num_frames}: {task} needs videos of {least} frames or more")
    if asked and 4 * asked > num_frames:
        raise DataError(
            f"needle_frames = {asked} must be at most a quarter of num_frames = {num_frames}"
        )
    if not ages:
        return
    if not set(CONTENT[task]) <= set(_AGED):
        raise DataError(
            f"ages = {tuple(ages)}: {task} rests on frames of the whole video; leave it empty"
        )
    if len(ages) != 2 or not 0 <= ages[0] <= ages[1] < num_frames:
        raise DataError(
            f"ages = {tuple(ages)} must be two numbers of frames, the least and the most, below "
            f"num_frames = {num_frames}"
        )


def plan_video(
    task: str,
    pace: Pace,
    labels: np.ndarray,
    num_frames: int,
    rng: np.random.Generator,
    *,
    number: int = 0,
    questions: int = 1,
    asked: int = 0,
    ages: Sequence[int] = (),
    repeat: bool = True,
) -> Plan:
    """Plans a video.

    Args:
      task: one of :data:`TASKS`.
      pace: the style's.
      labels: int[n], the digit of every image that there is to choose from.
      num_frames: T.
      rng: everything random is drawn from it.
      number: of the video in its set: over a set, answers of ``count`` and the two questions of
        ``change`` are equally frequent.
      questions: about the video; fewer where the task has not so many.
      asked: frames of a shot that is asked about; 0 for the style's own.
      ages: the least and the most age of what is asked about; empty for any.
      repeat: whether every ground that distracts is in two shots or more, where there is room; if
        not (short training clips), they all differ as far as there are grounds.

    Raises:
      DataError: for a plan that cannot be, see :func:`check`; or too many shots for ``ages``.
    """
    check(task, num_frames, ages, asked)
    contents = CONTENT[task]
    content = contents[number % len(contents)]
    number //= len(contents)
    count = min(
        max(questions, 2 if task == "two_questions" else 1), most_questions(task, num_frames)
    )
    draft = _Draft(pace, labels, num_frames, rng, number, count, asked, tuple(ages))
    made = {"order": draft.order, "count": draft.count, "change": draft.change}
    found = made.get(content, draft.needle)()
    draft.fill(repeat)
    return draft.plan(found)


class _Draft:
    """A plan in the making; see :func:`plan_video` for the arguments."""

    def __init__(self, pace, labels, num_frames, rng, number, questions, asked, ages):
        self.pace, self.labels, self.total, self.rng = pace, labels, num_frames, rng
        self.number, self.questions = number, questions
        self.grounds = rng.permutation(len(pace.words)).tolist()  # those not yet used
        self.shots: list[_Shot] = []
        self.digits_change = True
        low, high = (asked, asked) if asked else pace.asked
        self.lengths = low, high
        first, last = (0, num_frames - 1) if not ages else ages
        self.ages = first, last

    # --- The contents --------------------------------------------------------------------------

    def needle(self) -> list[Question]:
        shots = self._asked_shots([self._image() for _ in range(self.questions)])
        return [self._ask("needle", [shot], shot) for shot in shots]

    def order(self) -> list[Question]:
        count = next(n for n in itertools.count(2) if n * (n - 1) // 2 >= self.questions)
        digits = self.rng.permutation(10)[:count]
        shots = self._asked_shots([self._image(digit) for digit in digits])
        pairs = list(itertools.combinations(shots, 2))
        found = []
        for place in self.rng.permutation(len(pairs))[: self.questions]:
            pair = pairs[place]
            first = min(pair, key=lambda shot: shot.start)
            named = pair if self.rng.integers(2) else pair[::-1]
            found.append(self._ask("order", named, first))
        return found

    def count(self) -> list[Question]:
        answers = counts_of(self.total)
        place = self.number * self.questions
        wanted = [answers[(place + i) % len(answers)] for i in range(self.questions)]
        frames = self.rng.permutation(self.total)[: sum(wanted)].tolist()
        found = []
        for count in wanted:
            ground = self.grounds.pop()
            mine, frames = sorted(frames[:count]), frames[count:]
            shots = [_Shot(frame, 1, ground, self._image()) for frame in mine]
            self.shots += shots
            text = QUESTIONS["count"].format(self.pace.words[ground])
            found.append(Question(text, str(count), tuple(mine), self.total - 1 - mine[0]))
        return found

    def change(self) -> list[Question]:
        self.digits_change = False  # of every ground that distracts: some stay, some do not
        things = -(-self.questions // 2)
        most = int(np.clip(self.total // (4 * things), 1, _MOST_BEFORE))
        free, found = list(range(self.total)), []
        for thing in range(things):
            ground, digits = self.grounds.pop(), self.rng.permutation(10)[:2]
            before, after = self.rng.integers(min(2, most), most + 1, 2)
            cut = int(self.rng.integers(before, len(free) - after + 1))
            parts = (
                sorted(self.rng.permutation(free[:cut])[:before].tolist()),
                sorted(self.rng.permutation(free[cut:])[:after].tolist()),
            )
            free = sorted(set(free) - set(parts[0]) - set(parts[1]))
            for frames, digit in zip(parts, digits, strict=True):
                self.shots += [_Shot(t, 1, ground, self._image(digit)) for t in frames]
            sides = (0, 1) if self.questions > 1 else (self.number % 2,)
            for side in sides[: self.questions - 2 * thing]:
                text = QUESTIONS[("before", "after")[side]].format(self.pace.words[ground])
                shown = tuple(parts[side])
                age = self.total - 1 - shown[-1]
                found.append(Question(text, str(digits[side]), shown, age))
        return found

    def _ask(self, content: str, named: Sequence[_Shot], right: _Shot) -> Question:
        words = [self.pace.words[shot.ground] for shot in named]
        frames = [t for shot in named for t in range(shot.start, shot.start + shot.length)]
        return Question(
            QUESTIONS[content].format(*words),
            str(self.labels[right.image]),
            tuple(sorted(frames)),
            self.total - (right.start + right.length),
        )

    def _asked_shots(self, images: Sequence[int]) -> list[_Shot]:
        """A shot for each image, each on a ground of its own, at random places."""
        count = len(images)
        low, high = self.lengths
        low = min(low, max(1, self.total // count))  # in a short video
        most = max(low, min(high, self.total // (4 * count)))
        length = int(self.rng.integers(low, most + 1))
        # Frames from which all may be taken; of each shot the last frame has the age.
        begin = max(self.total - self.ages[1] - length, 0)
        room = self.total - self.ages[0] - begin - count * (length - 1)
        if room < count:
            raise DataError(
                f"ages = {self.ages}: {count} shots of {length} frames have no room there; widen "
                "it, or ask fewer questions"
            )
        starts = np.sort(self.rng.permutation(room)[:count]) + np.arange(count) * (length - 1)
        places = self.rng.permutation(starts + begin).tolist()
        made = [
            _Shot(start, length, self.grounds.pop(), image)
            for start, image in zip(places, images, strict=True)
        ]
        self.shots += made
        return made

    def _image(self, digit: int | None = None) -> int:
        """A random image of a digit; by default any digit, all equally often."""
        wanted = self.rng.integers(10) if digit is None else digit
        return int(self.rng.choice(np.flatnonzero(self.labels == wanted)))

    # --- What distracts ------------------------------------------------------------------------

    def fill(self, repeat: bool) -> None:
        """Fills all frames that are free with shots on the grounds that are not used."""
        taken = {t for shot in self.shots for t in range(shot.start, shot.start + shot.length)}
        gaps, start = [], None
        for t in range(self.total + 1):
            free = t < self.total and t not in taken
            if free and start is None:
                start = t
            elif not free and start is not None:
                gaps += self._cut(start, t)
                start = None
        blank = self.rng.random(len(gaps)) < self.pace.blank
        shown = [gap for gap, empty in zip(gaps, blank, strict=True) if not empty]
        grounds = self._others(len(shown), repeat)
        images = self.rng.integers(len(self.labels), size=len(shown)).tolist()
        if not self.digits_change:
            images = self._staying(grounds, images)
        self.shots += [
            _Shot(start, length, ground, image)
            for (start, length), ground, image in zip(shown, grounds, images, strict=True)
        ]
        self.shots += [_Shot(*gap, -1, -1) for gap, empty in zip(gaps, blank, strict=True) if empty]

    def _cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Cuts frames into shots: start and length of each."""
        found = []
        most = min(self.pace.longest, max(1, self.total // 4))
        while start < end:
            length = min(int(self.rng.integers(1, most + 1)), end - start)
            found.append((start, length))
            start += length
        return found

    def _others(self, count: int, repeat: bool) -> list[int]:
        others = self.grounds
        if repeat and count > 1:
            kinds = int(self.rng.integers(1, min(len(others), count // 2) + 1))
            others = others[:kinds] * 2
        more = self.rng.integers(len(others), size=max(count - len(others), 0))
        chosen = (others + [others[i] for i in more])[:count]
        return [chosen[i] for i in self.rng.permutation(count)]

    def _staying(self, grounds: list[int], images: list[int]) -> list[int]:
        """Of every other ground the digit stays as it is; of the others it is any."""
        stays = {ground: self._image() for ground in sorted(set(grounds)) if self.rng.integers(2)}
        return [
            self._image(self.labels[stays[ground]]) if ground in stays else image
            for ground, image in zip(grounds, images, strict=True)
        ]

    def plan(self, questions: list[Question]) -> Plan:
        grounds, images = np.full(self.total, -1), np.full(self.total, -1)
        shots = np.zeros(self.total, int)
        for place, shot in enumerate(sorted(self.shots, key=lambda shot: shot.start)):
            part = slice(shot.start, shot.start + shot.length)
            grounds[part], images[part], shots[part] = shot.ground, shot.image, place
        return Plan(self.pace.words, grounds, images, shots, tuple(questions))
