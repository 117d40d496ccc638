"""What a split's answers are summarised to."""

import pytest

from adacm2_jax.inference.evaluate import summarise, table


def line(answer: str, prediction: str, policy: str = "adacm2") -> dict:
    return {
        "policy": policy,
        "prediction": prediction,
        "answer": answer,
        "correct": answer.lower() == prediction.lower(),
        "kept_tokens": 3,
        "total_tokens": 20,
    }


def test_beside_every_accuracy_stands_that_of_the_most_frequent_answer():
    rows = [line("a", "a"), line("A ", "b"), line("b", "b"), line("c", "b")]
    result = summarise(rows, ["adacm2"])["adacm2"]
    assert result["accuracy"] == 0.5 and result["majority"] == 0.5 and not result["alike"]
    text = table({"policies": {"adacm2": result}, "failed": []})
    assert text.splitlines()[1].split()[:2] == ["adacm2", "50.0%"]
    assert "majority" in text.splitlines()[0] and "warning" not in text


@pytest.mark.parametrize(
    ("answers", "predictions", "alike"),
    [
        ("ab" * 5, "a" * 10, True),
        ("ab" * 5, "a" * 9 + "b", False),
        ("a" * 10, "a" * 10, False),  # there is but one answer
        ("ab" * 4, "a" * 8, False),  # too few to say so
    ],
)
def test_a_model_that_answers_alike_to_everything_is_flagged(answers, predictions, alike):
    rows = [line(a, p) for a, p in zip(answers, predictions, strict=True)]
    result = summarise(rows, ["adacm2"])["adacm2"]
    assert result["alike"] is alike
    text = table({"policies": {"adacm2": result}, "failed": []})
    assert ("one and the same answer to every question under adacm2" in text) is alike


def test_without_known_answers_there_is_no_accuracy():
    row = line("a", "a")
    del row["answer"], row["correct"]
    result = summarise([row], ["adacm2"])["adacm2"]
    assert result["accuracy"] is None and result["majority"] is None and not result["alike"]
    both = summarise([row, line("a", "a")], ["adacm2"])["adacm2"]
    assert (both["questions"], both["scored"], both["accuracy"]) == (2, 1, 1.0)
    assert "1 of 2" in table({"policies": {"adacm2": both}, "failed": []})
    failed = [{"id": "7", "error": "x.mp4: no such file"}]
    text = table({"policies": {"adacm2": result}, "failed": failed})
    assert "1 video(s) could not be read" in text and "  7: x.mp4: no such file" in text
