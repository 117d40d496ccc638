"""Plans of the suite: what a video promises, checked against what it shows."""

import collections

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from data.suite.plan import CONTENT, TASKS, chance, chance_without_time, counts_of, most_questions
from data.suite.styles import STYLES, WORDS
from data.suite.video import Kind, digits_of

DRAWN_STYLES = [style for style in STYLES if style != "traffic"]


def named(text: str) -> list[str]:
    """The grounds that a question names, in its order."""
    return [word for word in text.rstrip("?").split() if word in WORDS]


def shown(plan, split: str) -> list[tuple[str, int]]:
    """The word and the digit of every frame; nothing is ("", -1)."""
    labels = digits_of(split)[1]
    return [
        (plan.words[ground], int(labels[image])) if image >= 0 else ("", -1)
        for ground, image in zip(plan.grounds, plan.images, strict=True)
    ]


def solve(text: str, frames: list[tuple[str, int]]) -> str:
    """The answer by the frames alone: what a perfect viewer says."""
    words = named(text)
    digits = [[digit for word, digit in frames if word == name] for name in words]
    if text.startswith("how many"):
        return str(len(digits[0]))
    if "came first" in text:
        first = next(word for word, _ in frames if word in words)
        return str(digits[words.index(first)][0])
    changes = len(set(digits[0]))
    if "changed" in text:
        assert changes == 2
        # It changes once: no digit comes back.
        assert digits[0] == sorted(digits[0], key=[digits[0][0], digits[0][-1]].index)
        return str(digits[0][0] if "before" in text else digits[0][-1])
    assert changes == 1
    return str(digits[0][0])


@pytest.mark.parametrize("style", DRAWN_STYLES)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("split", "length", "questions"), [("test", 40, 4), ("train", 16, 1)])
def test_the_frames_alone_give_every_answer(task, style, split, length, questions):
    kind = Kind(task, style, length, questions)
    for number in range(6):
        plan = kind.plan(split, number)
        frames = shown(plan, split)
        assert len(frames) == length and len(plan.questions) >= questions
        assert len({question.text for question in plan.questions}) == len(plan.questions)
        for question in plan.questions:
            assert solve(question.text, frames) == question.answer
            assert {frames[t][0] for t in question.frames} == set(named(question.text))


@pytest.mark.parametrize("length", [4, 5, 16, 64])
def test_exactly_one_frame_is_the_needle_and_other_grounds_repeat(length):
    kind = Kind("needle", "grounds", length, questions=2)
    for number in range(40):
        plan = kind.plan("val", number)
        counts = collections.Counter(plan.grounds.tolist())
        asked = [t for question in plan.questions for t in question.frames]
        assert len(asked) == len(plan.questions) == 2
        for t in asked:
            assert counts[int(plan.grounds[t])] == 1
        for ground, count in counts.items():
            if ground not in plan.grounds[asked]:
                assert count > 1 or length - len(asked) == 1


def test_a_clip_of_four_frames_has_as_many_grounds():
    kind = Kind("needle", "grounds", 4)
    assert all(len(set(kind.plan("train", n).grounds.tolist())) == 4 for n in range(30))


def test_the_needle_s_age_is_uniform():
    kind = Kind("needle", "grounds", 10)
    ages = [kind.plan("test", n).questions[0].age for n in range(1000)]
    counts = np.bincount(ages, minlength=10)
    # A uniform share of 1,000 has a standard deviation of 9.5.
    assert len(counts) == 10 and np.abs(counts - 100).max() < 5 * 9.5
    plan = kind.plan("test", 3)
    assert plan.questions[0].age == 9 - plan.questions[0].frames[0]


@pytest.mark.parametrize(("style", "frames"), [("grounds", 0), ("film", 2), ("static", 3)])
def test_a_given_range_of_ages_is_kept_and_its_ends_occur(style, frames):
    kind = Kind("needle", style, 64, questions=2, ages=(20, 26), needle_frames=frames)
    ages = [q.age for n in range(150) for q in kind.plan("test", n).questions]
    assert (min(ages), max(ages)) == (20, 26)
    for number in range(10):
        for question in kind.plan("test", number).questions:
            assert len(question.frames) == max(frames, 1)
            assert question.age == 63 - question.frames[-1]
    order = Kind("order", style, 64, questions=3, ages=(40, 63))
    assert all(q.age >= 40 for n in range(20) for q in order.plan("test", n).questions)


def test_answers_of_count_are_balanced_within_a_set():
    assert counts_of(16) == (1, 2, 3, 4, 5) and counts_of(4) == (1, 2, 3)
    kind = Kind("count", "grounds", 32, questions=4)
    answers = [q.answer for n in range(50) for q in kind.plan("test", n).questions]
    assert collections.Counter(answers) == dict.fromkeys("12345", 40)


@pytest.mark.parametrize("questions", [1, 2, 4])
def test_half_of_the_changes_are_asked_before_and_half_after(questions):
    kind = Kind("change", "grounds", 32, questions)
    texts = [q.text for n in range(20) for q in kind.plan("test", n).questions]
    assert len(texts) == 20 * questions
    assert sum("before" in text for text in texts) == sum("after" in text for text in texts)


def test_other_grounds_do_not_change_once_alone():
    """Some stay, some change at random: one change does not single out what is asked about."""
    kinds = collections.Counter()
    for number in range(60):
        kind = Kind("change", "grounds", 64)
        plan = kind.plan("test", number)
        (asked,) = named(plan.questions[0].text)
        frames = shown(plan, "test")
        for word in {word for word, _ in frames} - {asked}:
            digits = [digit for name, digit in frames if name == word]
            kinds["stays" if len(set(digits)) == 1 else "changes"] += len(digits) > 3
    assert min(kinds["stays"], kinds["changes"]) > 0.25 * sum(kinds.values())


@pytest.mark.parametrize("task", TASKS)
def test_chance_is_what_the_most_frequent_answer_reaches(task):
    length = 8 if task == "count" else 16
    kind = Kind(task, "grounds", length, questions=4)
    answers = [q.answer for n in range(400) for q in kind.plan("test", n).questions]
    counts = collections.Counter(answers)
    level = chance(task, length)
    assert len(counts) == round(1 / level)
    # Answers about one video are not independent: as many videos as there are bound the deviation.
    assert abs(max(counts.values()) / len(answers) - level) < 5 * np.sqrt(level / 400)


@pytest.mark.parametrize("task", ["order", "change", "needle"])
def test_chance_without_time_is_that_of_shuffled_frames(task):
    """A perfect viewer of frames in any order; with one digit more than one, it guesses."""
    kind, rng, right = Kind(task, "grounds", 16), np.random.default_rng(0), []
    for number in range(300):
        plan = kind.plan("test", number)
        (question,) = plan.questions
        frames = shown(plan, "test")
        words = named(question.text)
        digits = sorted({digit for word, digit in frames if word in words})
        right.append(str(rng.choice(digits)) == question.answer)
    assert abs(np.mean(right) - chance_without_time(task)) < 5 * 0.5 / np.sqrt(300)


def test_several_questions_where_the_task_allows_them():
    assert [most_questions(task, 64) for task in TASKS] == [4, 6, 4, 4, 4, 4, 4]
    assert most_questions("count", 16) == 2 and most_questions("order", 4) == 1
    assert len(Kind("two_questions", "grounds", 16).plan("test", 0).questions) == 2
    assert len(Kind("order", "grounds", 16, 9).plan("test", 0).questions) == 6


def test_a_plan_depends_on_its_kind_split_and_number_alone():
    kind = Kind("order", "film", 24, 3)

    def same(one, other) -> bool:
        arrays = ("grounds", "images", "shots")
        alike = all((getattr(one, name) == getattr(other, name)).all() for name in arrays)
        return alike and one.questions == other.questions

    assert same(kind.plan("test", 5), Kind("order", "film", 24, 3).plan("test", 5))
    others = [
        kind.plan("test", 6),
        kind.plan("val", 5),
        Kind("order", "film", 24, 3, seed=1).plan("test", 5),
        Kind("order", "grounds", 24, 3).plan("test", 5),
    ]
    assert not any(same(kind.plan("test", 5), other) for other in others)


def test_films_have_shots_and_other_styles_empty_frames():
    longest = collections.Counter()
    for style in DRAWN_STYLES:
        for number in range(10):
            plan = Kind("needle", style, 64).plan("test", number)
            longest[style] = max(longest[style], *np.bincount(plan.shots))
            for shot in range(plan.shots.max() + 1):
                assert len(set(plan.images[plan.shots == shot].tolist())) == 1
            assert ((plan.images < 0).sum() > 5) == (style in ("static", "sport"))
    assert longest["grounds"] == 1 and longest["film"] == 6


def test_splits_share_no_digit():
    parts = {split: digits_of(split) for split in ("train", "val", "test")}
    seen = [image.tobytes() for images, _ in parts.values() for image in images]
    assert len(seen) == len(set(seen)) == 1797
    assert len(parts["test"][0]) == 359 and len(parts["val"][0]) == 287
    assert all(set(labels.tolist()) == set(range(10)) for _, labels in parts.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sing"}, "task 'sing' is unknown; there are needle, order"),
        ({"style": "opera"}, "style 'opera' is unknown; there are grounds, film"),
        ({"num_frames": 3}, "num_frames = 3: needle needs videos of 4 frames or more"),
        ({"task": "two_questions", "num_frames": 5}, "two_questions needs videos of 6 frames"),
        ({"needle_frames": 9}, "needle_frames = 9 must be at most a quarter of num_frames = 32"),
        ({"ages": (3,)}, r"ages = \(3,\) must be two numbers"),
        ({"ages": (3, 32)}, "below num_frames = 32"),
        ({"task": "count", "ages": (1, 2)}, "count rests on frames of the whole video"),
        ({"task": "generic", "ages": (1, 2)}, "generic rests on frames of the whole video"),
        ({"questions": 0}, "questions = 0 must be at least 1"),
        ({"share": 0.1}, "share = 0.1 must be 0.3 to 1"),
        ({"seed": -1}, "seed = -1 must be at least 0"),
        ({"needle_frames": -1}, "needle_frames = -1 must be at least 0"),
        ({"num_frames": 10**12}, "1,000,000,000,000 frames of a video need .* GB of memory"),
    ],
)
def test_kinds_that_cannot_be_are_refused(changes, message):
    given = {"task": "needle", "style": "grounds", "num_frames": 32}
    with pytest.raises(DataError, match=message):
        Kind(**(given | changes))


def test_ages_without_room_for_all_shots_are_refused():
    kind = Kind("needle", "grounds", 32, questions=4, ages=(5, 6))
    with pytest.raises(DataError, match=r"ages = \(5, 6\): 4 shots of 1 frames have no room"):
        kind.plan("test", 0)


@pytest.mark.parametrize("style", ["static", "film"])
def test_shots_are_short_where_a_video_has_no_room_for_the_style_s(style):
    for task in TASKS:
        for length in (6, 7):
            plans = [Kind(task, style, length, 4).plan("test", number) for number in range(20)]
            assert all(plan.questions for plan in plans)


def test_every_task_has_content():
    assert set().union(*CONTENT.values()) == {"needle", "order", "count", "change"}
