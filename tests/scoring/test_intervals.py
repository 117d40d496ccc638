"""Intervals: they hold the truth as often as they say, and equal independent computations."""

import numpy as np
import pytest
from scipy import stats

from adacm2_jax.scoring import intervals
from adacm2_jax.scoring.intervals import (
    macro_interval,
    mean_interval,
    numbered,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize("videos", [25, 150])
def test_intervals_hold_the_truth_95_times_in_a_hundred(videos):
    """A thousand splits: videos of one to six clips, each with an accuracy of its own."""
    random = np.random.default_rng(videos)
    splits, clips = 1000, random.integers(1, 7, (1000, videos))
    skill = random.beta(1.5, 1.0, (splits, videos))  # its mean is 0.6, whatever the clips
    covered = 0
    for sizes, shares in zip(clips, skill, strict=True):
        groups = np.repeat(np.arange(videos), sizes)
        right = random.random(len(groups)) < shares[groups]
        low, high = mean_interval(right.astype(float), groups)
        covered += low <= 0.6 <= high
    # 2 % are three standard deviations of a thousand.
    assert abs(covered / splits - 0.95) <= 0.02


def test_as_if_clips_were_independent_intervals_would_be_too_short():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    values = (random.random(60) < 0.5).astype(float)[groups]  # a video is right or wrong throughout
    low, high = mean_interval(values, groups)
    naive_low, naive_high = mean_interval(values, np.arange(300))
    # Five clips that say the same are one observation: the spread is sqrt(5) times as large.
    assert (high - low) / (naive_high - naive_low) == pytest.approx(5**0.5, rel=0.1)


def test_the_interval_is_scipy_s_bootstrap_of_videos():
    random = np.random.default_rng(1)
    values = random.random(400)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, random_state=random, batch=500
    ).confidence_interval
    low, high = mean_interval(values, np.arange(400))
    # Quantiles of 2,000 and 5,000 draws, and a percentile 1/400 farther out.
    spread = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.06 * spread)
    assert high == pytest.approx(theirs.high, abs=0.06 * spread)


def test_blocks_of_draws_and_all_at_once_are_the_same(monkeypatch):
    values = np.random.default_rng(2).random(90)
    groups = np.repeat(np.arange(30), 3)
    whole = mean_interval(values, groups)
    monkeypatch.setattr(intervals, "_BLOCK", 30 * 7)
    assert mean_interval(values, groups) == pytest.approx(whole, abs=1e-12)
    assert mean_interval(values, groups, seed=1) != whole


def test_the_mean_of_categories_weighs_each_alike():
    values = np.array([1.0] * 90 + [0.0] * 10)
    kinds = np.array([0] * 90 + [1] * 10)
    low, high = macro_interval(values, np.arange(100), kinds)
    assert low == high == 0.5  # one category is all right, the other all wrong
    low, high = mean_interval(values, np.arange(100))
    assert 0.8 < low < 0.9 < high < 1.0


def test_where_videos_do_not_differ_the_interval_is_wilson_s_over_videos():
    groups = np.repeat(np.arange(12), 4)
    assert mean_interval(np.ones(48), groups) == pytest.approx(wilson_interval(12, 12))
    assert mean_interval(np.zeros(48), groups) == pytest.approx(wilson_interval(0, 12))
    low, high = mean_interval(np.array([1.0, 0.0]), np.array([0, 0]))  # a single video
    assert low < 0.1 and high > 0.9


@pytest.mark.parametrize(
    ("freedom", "tolerance"), [(1, 1e-9), (2, 1e-9), (3, 0.02), (9, 1e-3), (400, 1e-6)]
)
def test_student_s_quantile_is_scipy_s(freedom, tolerance):
    assert student_quantile(0.975, freedom) == pytest.approx(
        stats.t.ppf(0.975, freedom), rel=tolerance
    )


def test_names_are_numbered_in_order():
    numbers, count = numbered(["b", "a", "b", ""])
    assert numbers.tolist() == [0, 1, 0, 2] and count == 3
