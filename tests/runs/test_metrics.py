"""Scores of predictions and the numbers that a run leaves."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacm2_jax.runs.metrics import MetricWriter
from adacm2_jax.scoring.intervals import wilson_interval
from adacm2_jax.scoring.metrics import exact_match


def rows_in(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_answers_are_equal_but_for_case_and_white_space():
    assert exact_match(" Seven\n", "seven") and exact_match("", "")
    assert not exact_match("seven", "seven.") and not exact_match("se ven", "seven")


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29 by the score method.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilson_s(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(0, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_is_within_bounds(counts):
    correct, total = counts
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= high <= 1
    if total:
        assert low - 1e-12 <= correct / total <= high + 1e-12
    else:
        assert (low, high) == (0, 1)


def test_rows_are_on_disk_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 2.5})
    assert rows_in(tmp_path) == [{"step": 1, "loss": 2.5}]
    writer.close()


def test_a_resumed_run_removes_what_it_will_write_again(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 7):
        writer.write(step, {"loss": float(step)})
        if step in (2, 4):
            writer.write(step, {"eval/adacm2/accuracy": step / 10})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    writer = MetricWriter(tmp_path, 4)
    writer.write(4, {"eval/adacm2/accuracy": 0.4})
    writer.write(5, {"loss": 5.0})
    writer.close()
    rows = rows_in(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]
    assert rows[-2] == {"step": 4, "eval/adacm2/accuracy": 0.4}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_run_from_the_start_keeps_nothing(tmp_path):
    for _ in range(2):
        writer = MetricWriter(tmp_path, 0)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert rows_in(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_scalars_reach_tensorboard(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(3, {"eval/full/accuracy": 0.25})
    writer.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"eval/full/accuracy" in events.read_bytes()
