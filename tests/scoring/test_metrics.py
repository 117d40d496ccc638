"""Metrics of benchmarks, against independent computations and values worked out by hand."""

import numpy as np
import pytest
import sklearn.metrics

from adacm2_jax.errors import UserError
from adacm2_jax.scoring.choices import DIGITS, chosen
from adacm2_jax.scoring.report import score, table

LABELS = ("friend", "husband wife", "ex")


def rows_of(answers, predictions, /, **fields):
    columns = {name: list(values) for name, values in fields.items()}
    return [
        {
            "id": str(i),
            "video": f"v{i}",
            "question": "?",
            "policy": "adacm2",
            "prediction": prediction,
            "answer": answer,
        }
        | {name: values[i] for name, values in columns.items()}
        for i, (answer, prediction) in enumerate(zip(answers, predictions, strict=True))
    ]


def figure(rows, name, **options):
    return score(rows, [name], **options)["adacm2"]["metrics"][name]


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(0)


def test_top1_is_exact_but_for_white_space_around_it():
    rows = rows_of(["friend"] * 5, ["friend", " friend\n", "Friend", "friend.", "a friend"])
    assert figure(rows, "top1")["value"] == 0.4


def test_top1_and_top5_are_scikit_learn_s(random):
    truth = random.integers(0, 8, 200)
    # Five different labels each, best first.
    beams = np.array([random.permutation(8)[:5] for _ in truth])
    n_best = [[{"text": str(label), "score": -1.0} for label in row] for row in beams]
    rows = rows_of(map(str, truth), [str(row[0]) for row in beams], n_best=n_best)
    ranks = np.zeros((200, 8))
    np.put_along_axis(ranks, beams, np.arange(5, 0, -1.0)[None], axis=1)
    assert figure(rows, "top1")["value"] == sklearn.metrics.accuracy_score(truth, beams[:, 0])
    assert figure(rows, "top5")["value"] == pytest.approx(
        sklearn.metrics.top_k_accuracy_score(truth, ranks, k=5, labels=range(8)), abs=1e-12
    )


def test_the_first_word_is_what_counts_of_short_answers():
    rows = rows_of(["man"] * 5, ["man", "man walking", " man\twalks", "a man", ""])
    assert figure(rows, "first_word")["value"] == 0.6
    beams = [[{"text": "a man"}, {"text": "man is"}]] * 5
    rows = rows_of(["man"] * 5, ["a man"] * 5, n_best=beams)
    assert figure(rows, "first_word_top5")["value"] == 1 and figure(rows, "top5")["value"] == 0


def test_ranking_takes_the_most_probable_choice_in_sum_or_per_token(random):
    log_probs, tokens = -random.random((300, 3)) * 9, random.integers(1, 9, (300, 3))
    truth = random.integers(0, 3, 300)
    rows = rows_of(
        [LABELS[i] for i in truth],
        [""] * 300,
        choices=[LABELS] * 300,
        choice_log_probs=log_probs.tolist(),
        choice_tokens=tokens.tolist(),
    )
    right = sklearn.metrics.accuracy_score(truth, log_probs.argmax(1))
    assert figure(rows, "ranked")["value"] == pytest.approx(right)
    right = sklearn.metrics.accuracy_score(truth, (log_probs / tokens).argmax(1))
    assert figure(rows, "ranked_per_token")["value"] == pytest.approx(right)
    with pytest.raises(
        UserError, match=r"prediction 0 has no choice_log_probs: .* answer the split"
    ):
        figure(rows_of(["ex"], ["ex"], choices=[LABELS]), "ranked")


def test_windows_of_a_video_vote():
    rows = rows_of(
        ["a"] * 3 + ["b"] * 3 + ["c"],
        ["a", "x", "a"] + ["y", "b", "z"] + ["c"],
        video=["1"] * 3 + ["2"] * 3 + ["3"],
    )
    assert figure(rows, "top1")["value"] == pytest.approx(4 / 7)
    voted = figure(rows, "top1_by_video")  # of three different answers the first counts
    assert voted["value"] == pytest.approx(2 / 3) and voted["units"] == voted["videos"] == 3
    two = rows_of(["a", "b"], ["a", "b"], video=["1", "1"], question=["?", "!"])
    assert figure(two, "top1_by_video")["units"] == 2  # two questions are not two windows
    probable = rows_of(
        ["friend"] * 2,
        [""] * 2,
        video=["1"] * 2,
        choices=[LABELS] * 2,
        choice_log_probs=[[-5.0, -1.0, -9.0], [-1.0, -4.0, -9.0]],
    )
    assert figure(probable, "ranked")["value"] == 0.5
    assert figure(probable, "ranked_by_video")["value"] == 0  # -3 and -2.5 on average


def test_beside_every_figure_stands_the_constant_answer():
    rows = rows_of(list("aabbbc"), list("aaaaaa"))
    found = figure(rows, "top1", train=["c", "c", "a"])
    assert found["value"] == pytest.approx(2 / 6)
    assert found["constant"] == [0.5, "b"] and found["train_constant"] == [
        pytest.approx(1 / 6),
        "c",
    ]
    several = rows_of([None] * 3, "abc", answers=[["a", "b"], ["b"], ["c"]])
    assert figure(several, "top1")["constant"] == [pytest.approx(2 / 3), "b"]
    placed = rows_of(["x", "z", "w"], ["B", "B", "B"], choices=[("w", "x"), ("y", "z"), ("w", "v")])
    found = figure(placed, "multiple_choice")
    assert found["value"] == pytest.approx(2 / 3) and found["constant"] == [
        pytest.approx(2 / 3),
        "B",
    ]


def test_categories_and_their_mean_and_what_is_not_known():
    rows = rows_of(list("aaaab") + [None], list("aaaac") + ["a"], category=["p"] * 4 + ["q", "q"])
    found = score(rows, ["top1"])["adacm2"]
    assert (found["questions"], found["scored"]) == (6, 5)
    entry = found["metrics"]["top1"]
    assert entry["value"] == 0.8 and entry["macro"] == 0.5
    assert entry["categories"]["p"]["value"] == 1 and entry["categories"]["q"]["value"] == 0
    text = table({"adacm2": found})
    assert "mean of categories" in text and "5 of 6 answers are known" in text
    assert text.splitlines()[1].split()[:3] == ["adacm2", "top1", "80.0%"]


def test_policies_are_scored_each_for_itself():
    rows = rows_of("ab", "ab") + [row | {"policy": "full"} for row in rows_of("ab", "aa")]
    found = score(rows, ["top1"])
    assert found["adacm2"]["metrics"]["top1"]["value"] == 1
    assert found["full"]["metrics"]["top1"]["value"] == 0.5
    with pytest.raises(UserError, match="metric 'top2' is unknown; there are captions, first_word"):
        score(rows, ["top2"])
    assert score(rows_of([None], "a"), ["top1"])["adacm2"]["metrics"] == {}


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("3", "3", True),
        ("3", "They did it 3 times.", True),
        ("3", "13", False),
        ("3", "3 or 4", False),
        ("0", "none", False),
        ("Yes", "Yes.", True),
        ("Yes", "Y", True),
        ("Yes", "No", False),
        ("No", "No, not yet", True),
    ],
)
def test_a_number_or_yes_is_stated(answer, text, right):
    assert figure(rows_of([answer], [text]), "stated")["value"] == right


FRUIT = ("a pear", "a plum", "figs", "Apples and pears")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" b ", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B) a plum", 1),
        ("B: because", 1),
        ("(c) figs", 2),
        ("A plum", 1),  # the text of a choice, not the letter A
        ("a plum.", 1),
        ("The answer is D", 3),
        ("The correct answer is (D) figs", 3),
        ("Answer: C", 2),
        ("option B", 1),
        ("I think (C)", 2),
        ("It must be figs!", 2),
        ("The man eats B", 1),
        ("A man eats something", None),  # an article
        ("E", None),
        ("", None),
        ("Abe ate", None),
    ],
)
def test_a_letter_is_found_in_free_text(text, place):
    assert chosen(text, FRUIT) == place


@pytest.mark.parametrize(
    ("text", "place"),
    [("2", 1), ("(3)", 2), ("2. a plum", 1), ("The answer is 4", 3), ("figs", 2), ("9", None)],
)
def test_so_is_a_digit(text, place):
    assert chosen(text, FRUIT, DIGITS) == place


def test_choices_that_are_numbers_are_texts_first():
    assert chosen("4", ("3", "4", "5", "6"), DIGITS) == 1
    assert chosen("(4)", ("3", "4", "5", "6"), DIGITS) == 3
    assert chosen("3", ("3", "3"), DIGITS) is None  # alike, and there is no third
