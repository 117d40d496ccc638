"""Counts, bounds and rankings of the retention policies."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from adacm2_jax.config import MemoryConfig, instructblip_vicuna_7b, memory_preset
from adacm2_jax.errors import UserError
from adacm2_jax.memory.policies import (
    RANDOM,
    STRIDE,
    arrival_rank,
    bound_of,
    capacity_bound,
    plan_for,
    retention_counts,
    retention_plan,
    share_for,
)
from adacm2_jax.memory.slots import Frames, Queries, Retention, init_memory, read_frame
from adacm2_jax.models.adacm2 import init_state
from tests.oracle import kept_counts, radical_inverse

STEP = jax.jit(read_frame)
RATIOED = ("adacm2", "recent", "uniform", "random")
ratios = st.fractions(0, 1, max_denominator=1000)


def lengths(plan, layer: int, tokens: int, frames: int) -> list[int]:
    """Live tokens after each frame, as the plan's table has it."""
    counts, length = [], 0
    for _ in range(frames):
        n = length + tokens
        length = int(plan.recent[layer, n] + plan.older[layer, n])
        counts.append(length)
    return counts


def run(config: MemoryConfig, tokens: int, frames: int, seeds) -> list[np.ndarray]:
    """Token numbers (frame · P + patch) kept after each frame, oldest first, [videos, length]."""
    plan, batch = retention_plan(config, tokens, 1), len(seeds)
    retention = Retention(
        recent=jnp.asarray(plan.recent[0]),
        older=jnp.asarray(plan.older[0]),
        seed=jnp.asarray(seeds, jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
    )
    memory = init_memory(batch, 1, 1, plan.capacity, tokens, jnp.float32)
    ones = jnp.ones((batch, 1, tokens, 1))
    kept = []
    for t in range(frames):
        frame = Frames(ones, ones, jnp.full(batch, t, jnp.int32), jnp.ones(batch, bool))
        _, memory = STEP(memory, retention, frame, Queries(ones[:, :, :1]))
        live = np.asarray(memory.slots)[:, : int(memory.length[0])]
        number = np.asarray(memory.frame * tokens + memory.patch)
        kept.append(np.take_along_axis(number, live, axis=1))
    return kept


# Counts and bounds ------------------------------------------------------------------------------


def test_counts_are_exact_where_floats_are_not():
    assert int(0.29 * 100) == 28
    config = MemoryConfig(policy="adacm2", recent_ratio=0.29, conserve_ratio=0)
    plan = retention_plan(config, 200, 1)
    assert plan.recent[0, 100] == 29
    assert retention_counts(100, Fraction(29, 100), Fraction(58, 100)) == (29, 41)


@given(n=st.integers(0, 3000), rho=ratios, beta=ratios)
def test_counts_are_floors_of_exact_products(n, rho, beta):
    recent, older = retention_counts(n, rho, beta)
    assert (recent, older) == kept_counts("adacm2", n, rho, beta, 0)
    assert recent <= rho * n < recent + 1
    assert older <= beta * (n - recent) < older + 1
    assert recent + older <= n


@pytest.mark.parametrize(
    ("preset", "capacity", "settled", "attending"),
    [("eq8", 60, 59, 317), ("eq6", 2598, 2584, 2855)],
)
def test_the_presets_have_the_figures_of_the_paper(preset, capacity, settled, attending):
    config = instructblip_vicuna_7b(memory=memory_preset(preset))
    plan = plan_for(config)
    assert plan.capacity == capacity
    assert plan.recent.shape == plan.older.shape == (6, attending + 1)
    counts = lengths(plan, 0, 257, 400)
    assert set(counts[-100:]) == {settled} and max(counts) == settled
    state = jax.eval_shape(lambda: init_state(config, jnp.zeros(2, jnp.int32)))
    assert state.memory.key.shape == (6, 2, 12, attending, 64)


@given(tokens=st.integers(1, 20), rho=ratios, beta=ratios)
def test_the_bound_holds_at_every_time(tokens, rho, beta):
    share = rho + (1 - rho) * beta
    assume(share <= Fraction(9, 10))
    capacity = capacity_bound(tokens, rho, beta)
    assert capacity == math.floor(tokens * share / (1 - share))
    length, seen = 0, set()
    while (
        length not in seen
    ):  # the count depends on the length alone: a repeated one closes the cycle
        seen.add(length)
        length = sum(retention_counts(length + tokens, rho, beta))
        assert length <= capacity


@settings(max_examples=30)
@given(tokens=st.integers(1, 20), rho=ratios, beta=ratios)
def test_policies_keep_as_many_tokens_as_adacm2(tokens, rho, beta):
    assume(rho + (1 - rho) * beta <= Fraction(4, 5))
    plans = [
        retention_plan(MemoryConfig(policy, recent_ratio=rho, conserve_ratio=beta), tokens, 1)
        for policy in RATIOED
    ]
    for plan in plans:
        assert plan.capacity == plans[0].capacity
        assert np.array_equal(plan.recent + plan.older, plans[0].recent + plans[0].older)
    assert not plans[1].older.any()
    assert not plans[2].recent.any() and not plans[3].recent.any()


@given(tokens=st.integers(1, 20), rho=ratios, beta=ratios)
def test_a_share_is_found_for_every_number_of_tokens_that_one_settles_at(tokens, rho, beta):
    assume(rho + (1 - rho) * beta <= Fraction(9, 10))
    config = MemoryConfig(recent_ratio=rho, conserve_ratio=beta)
    wanted = lengths(retention_plan(config, tokens, 1), 0, tokens, 400)[-1]
    share = share_for(wanted, tokens, rho)
    found = MemoryConfig(recent_ratio=rho, conserve_ratio=share)
    assert lengths(retention_plan(found, tokens, 1), 0, tokens, 400)[-1] == wanted


def test_a_number_of_tokens_that_no_share_settles_at_is_refused():
    with pytest.raises(UserError, match=r"settles at 3 tokens; the nearest is 16"):
        share_for(3, 17, Fraction(1, 2))


def test_layers_may_have_ratios_of_their_own():
    config = MemoryConfig(recent_ratio=("0.1", "0.5"), conserve_ratio=("0.2", 0))
    plan = retention_plan(config, 17, 2)
    singles = [
        retention_plan(MemoryConfig(recent_ratio=rho, conserve_ratio=beta), 17, 1)
        for rho, beta in (("0.1", "0.2"), ("0.5", 0))
    ]
    assert plan.capacity == max(single.capacity for single in singles) == 17
    for layer, single in enumerate(singles):
        entries = single.capacity + 17 + 1
        assert np.array_equal(plan.recent[layer, :entries], single.recent[0])
        assert np.array_equal(plan.older[layer, :entries], single.older[0])
        assert max(lengths(plan, layer, 17, 100)) <= single.capacity


@given(
    capacity=st.integers(1, 60), tokens=st.integers(1, 20), rho=st.fractions(0, 1), n=st.integers(0)
)
def test_a_budget_drops_nothing_before_it_is_spent_and_fills_it_ever_after(
    capacity, tokens, rho, n
):
    plan = retention_plan(MemoryConfig("budget", rho, capacity=capacity), tokens, 1)
    assert plan.capacity == capacity
    n %= capacity + tokens + 1
    assert (plan.recent[0, n], plan.older[0, n]) == kept_counts("budget", n, rho, 0, capacity)
    assert plan.recent[0, n] + plan.older[0, n] == min(n, capacity)


def test_full_keeps_every_token_of_its_frames():
    plan = retention_plan(MemoryConfig("full", max_frames=6), 5, 2)
    assert plan.capacity == 30 and not plan.older.any()
    assert lengths(plan, 1, 5, 8) == [5, 10, 15, 20, 25, 30, 30, 30]


@pytest.mark.parametrize(
    ("memory", "frames"),
    [
        (MemoryConfig(policy="recent_frames", recent_frames=1), 0),  # it has just come
        (MemoryConfig(policy="recent_frames", recent_frames=3), 2),
        (MemoryConfig(policy="full", max_frames=7), 7),
        (MemoryConfig(policy="merge", bank_frames=5), 5),
    ],
)
def test_what_holds_whole_frames_is_bound_by_their_number(memory, frames):
    config = instructblip_vicuna_7b(memory=memory)
    assert bound_of(config) == frames * config.vision.tokens_per_frame


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MemoryConfig(recent_ratio=1), r"memory\.recent_ratio = 1 .*\(r = 1\).*'full'"),
        (MemoryConfig(conserve_ratio="1.0"), r"memory\.conserve_ratio = 1 .*lower one"),
        (MemoryConfig(recent_ratio=("0.1",) * 3), r"memory\.recent_ratio has 3 values.* 2 cross"),
        (MemoryConfig(conserve_ratio=()), r"memory\.conserve_ratio has 0 values.* 2 cross"),
    ],
)
def test_plans_without_a_bound_or_a_ratio_a_layer_are_refused(config, message):
    with pytest.raises(UserError, match=message) as caught:
        retention_plan(config, 5, 2)
    assert "\n" not in str(caught.value)


# Rankings ---------------------------------------------------------------------------------------


@given(frame=st.integers(0, 60_000), seed=st.integers(0, 2**32 - 1))
def test_stride_ranks_by_the_mirrored_digits_of_the_token_number(frame, seed):
    frames, seeds = jnp.array([frame], jnp.int32), jnp.array([seed], jnp.uint32)
    rank = np.asarray(arrival_rank(STRIDE, frames, 257, seeds))[0]
    exact = [1 - radical_inverse(frame * 257 + patch) for patch in range(257)]
    assert [Fraction(float(value)) for value in rank] == exact


def test_uniform_spreads_over_the_whole_video():
    """No gap is as wide as two ideal strides, after any frame."""
    config = MemoryConfig("uniform", recent_ratio="0.1", conserve_ratio="0.1")
    for t, kept in enumerate(run(config, 257, 40, [0])):
        seen, row = (t + 1) * 257, kept[0]
        assert np.diff(np.append(row, seen)).max() < 2 * seen / len(row)
        best = sorted(range(seen), key=radical_inverse)[: len(row)]
        assert row.tolist() == sorted(best)


def test_recent_keeps_the_newest():
    config = MemoryConfig("recent", recent_ratio="0.2", conserve_ratio="0.3")
    for t, kept in enumerate(run(config, 5, 12, [0])):
        assert kept[0].tolist() == list(range((t + 1) * 5 - kept.shape[1], (t + 1) * 5))


def test_random_keeps_a_uniform_sample_of_all_tokens_seen():
    """Every frame and every patch of 4,096 videos is kept about as often as any other.

    Of 160 tokens 6 stay. What a video adds to the count of one frame has mean 6/20, at most the
    variance 6/20 · 19/20 (it is hypergeometric) and is at most 6 off its mean: by Bernstein's
    inequality the sum over N videos is further than d from its mean with a probability of at most
    2 exp(−d² / (2Nσ² + 4d)), here 1e-6. Likewise for the 8 patches.
    """
    videos, frames, patches, stay = 4096, 20, 8, 6
    config = MemoryConfig("random", recent_ratio="0.25", conserve_ratio="1/3")
    kept = run(config, patches, frames, np.arange(videos))[-1]
    assert kept.shape == (videos, stay)
    tail = math.log(2 / 1e-6)
    for groups, which in ((frames, kept // patches), (patches, kept % patches)):
        mean = videos * stay / groups
        variance = mean * (1 - 1 / groups)
        allowed = 2 * tail + math.sqrt(4 * tail**2 + 2 * variance * tail)
        counts = np.bincount(which.ravel(), minlength=groups)
        assert np.abs(counts - mean).max() <= allowed < mean / 5
    ranks = arrival_rank(
        RANDOM,
        jnp.tile(jnp.arange(frames), videos),
        patches,
        jnp.repeat(jnp.arange(videos, dtype=jnp.uint32), frames),
    )
    best = np.argsort(-np.asarray(ranks).reshape(videos, -1), axis=1, kind="stable")[:, :stay]
    assert np.array_equal(np.sort(best, axis=1), kept), "the highest of all numbers ever drawn"


def test_random_depends_on_the_seed_alone_and_not_on_the_batch():
    config = MemoryConfig("random", recent_ratio="0.25", conserve_ratio="1/3")
    seeds = np.array([7, 8, 7, 2**32 - 1], np.uint32)
    together = run(config, 8, 10, seeds)
    reversed_batch = run(config, 8, 10, seeds[::-1])
    for kept, mirrored in zip(together, reversed_batch, strict=True):
        assert np.array_equal(kept, mirrored[::-1])
        assert np.array_equal(kept[0], kept[2])
    assert not np.array_equal(together[-1][0], together[-1][1])
    frames = jnp.arange(4)
    drawn = arrival_rank(RANDOM, frames, 8, jnp.asarray(seeds))
    for b in range(4):
        alone = arrival_rank(RANDOM, frames[b : b + 1], 8, jnp.asarray(seeds[b : b + 1]))
        assert np.array_equal(alone[0], drawn[b])
