"""The measurement of late questions: sizes that are equal, figures that add up, runs that go on."""

import json

import pytest

import adacm2_jax
from adacm2_jax.config import tiny
from adacm2_jax.memory.policies import plan_for
from benchmarks import _late_report as report
from benchmarks import late_questions
from benchmarks._late_report import KNOWN, LATE, Cell
from data.needle.builder import make_record
from tests.small import quick_compilation


@pytest.mark.parametrize("tokens", [17, 34, 68, 272])
@pytest.mark.parametrize("policy", [*LATE, KNOWN])
def test_every_memory_comes_to_keep_as_many_tokens_and_never_more(policy, tokens):
    plan = plan_for(tiny(memory=late_questions.memory_of(Cell(policy, tokens), 17)))
    kept, most = 0, 0
    for _ in range(2000):
        live = kept + 17
        kept = int(plan.recent[0, live] + plan.older[0, live])
        most = max(most, kept)
    assert kept == most == tokens


def line(needle: int, frames: int = 16, **given: str) -> dict:
    keys = {name.replace("_", " "): answer for name, answer in given.items()}
    return {
        "frames": frames,
        "needle": needle,
        "answer": "3",
        "given": keys,
        "kept": dict.fromkeys(keys, 17),
    }


def test_the_curve_counts_the_frames_after_the_needle():
    lines = [line(needle, open_17="3" if needle >= 8 else "4") for needle in range(16)]
    (row,) = report.summarise(lines, [Cell("open", 17)], 17)
    assert (row["correct"], row["questions"], row["total_tokens"]) == (8, 16, 272)
    parts = [(part["from"], part["to"], part["accuracy"]) for part in row["curve"]]
    assert parts[0] == (0, 1, 1.0) and parts[3] == (6, 7, 1.0) and parts[4] == (8, 9, 0.0)
    assert parts[-1][1] == 15 and sum(part["questions"] for part in row["curve"]) == 16


def row(policy: str, accuracy: float, spread: float = 0.01, kept: int = 68) -> dict:
    interval = [accuracy - spread, accuracy + spread]
    return {"T": 64, "policy": policy, "tokens": kept, "kept_tokens": kept,
            "total_tokens": 1088, "accuracy": accuracy, "interval": interval}  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "best_other", "spread", "kept", "holds"),
    [
        (0.9, 0.7, 0.05, 68, True),
        (0.79, 0.3, 0.05, 68, False),  # not right often enough
        (0.9, 0.85, 0.05, 68, False),  # the intervals overlap
        (0.9, 0.3, 0.05, 69, False),  # more than a sixteenth
    ],
)
def test_the_goal_is_what_the_docs_say(mine, best_other, spread, kept, holds):
    rows = [row("open", mine, spread, kept), row("uniform", best_other, spread, kept)]
    rows += [row(name, 0.1, spread, kept) for name in ("random", "recent")]
    assert report.goal_holds(rows) is holds


def test_a_line_that_was_cut_short_is_asked_again(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert late_questions.read_lines(path) == []
    path.write_text('{"number": 1}\n{"number": 2}\n{"num')
    assert [each["number"] for each in late_questions.read_lines(path)] == [1, 2]


@pytest.fixture(scope="module")
def measured(small_run, tmp_path_factory):
    """Five late questions about videos of four frames, in batches of four."""
    place = tmp_path_factory.mktemp("late")
    with pytest.MonkeyPatch.context() as patch, quick_compilation():
        patch.setattr(late_questions, "SIZES", {4: (1,)})
        patch.setattr(late_questions, "ROWS", 4)
        words = ["--model", small_run, "--cache", place / "cache", "--output", place / "docs"]
        words = [*map(str, words), "--questions"]
        late_questions.main([*words, "2"])
        first = {path: path.read_text() for path in (place / "cache").iterdir()}
        assert late_questions.main([*words, "5"]) == 1  # there are no videos of 64 frames
    return place, first


def test_a_run_goes_on_where_the_one_before_stopped(measured):
    _, first = measured
    assert len(first) == 1
    for path, text in first.items():
        lines = path.read_text().splitlines()
        assert path.read_text().startswith(text) and len(text.splitlines()) == 2
        numbers = [json.loads(each)["number"] for each in lines]
        assert numbers == list(range(late_questions.FIRST, late_questions.FIRST + 5))


def test_the_answers_are_those_of_a_session(measured, small_run, tmp_path):
    """Rows of one state answer as a session of the same file does, late and known before."""
    place, _ = measured
    (path,) = (place / "cache").glob("t4-*")
    model = adacm2_jax.load(small_run, memory=_known_memory())
    with quick_compilation():
        for each in late_questions.read_lines(path):
            record = make_record("test", 4, each["number"])
            video = tmp_path / "video.mp4"
            video.write_bytes(record["video"])
            session = model.session(each["question"], open_tokens=5)
            session.push(video)
            assert session.ask(each["question"]).answer == each["given"]["known 5"]
            late = model.session((), open_tokens=5)
            late.push(video)
            reply = late.ask(each["question"])
            assert reply.answer == each["given"]["open 5"]
            assert (record["answer"], int(record["start"])) == (each["answer"], each["needle"])


def _known_memory() -> dict:
    memory = late_questions.memory_of(Cell(KNOWN, 5), 5)
    return {"recent_ratio": memory.recent_ratio, "conserve_ratio": memory.conserve_ratio}


def test_the_page_and_the_picture_are_what_was_measured(measured):
    place, _ = measured
    results = json.loads((place / "docs" / "late_questions.json").read_text())
    assert len(results["cells"]) == len(LATE) + 1
    # So short a video does not fill those that drop by a share of what has been seen.
    assert all(4 <= cell["kept_tokens"] <= 5 for cell in results["cells"])
    text = (place / "docs" / "late_questions.md").read_text()
    assert report.table(results["cells"]) in text and "1,000 to 1,004" in text
    assert (place / "docs" / "late_questions.png").stat().st_size > 10_000
