"""The memory's kernels, interpreted, against the memory as XLA compiles it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import MemoryConfig, memory_preset, tiny
from adacm2_jax.memory.fused import _nth_largest, by_kernels, fits
from adacm2_jax.memory.policies import retention_plan
from adacm2_jax.memory.slots import Frames, Queries, Retention, init_memory, read_frames
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_params, init_state
from tests.small import quick_compilation

VIDEOS, FRAMES, HEADS, WIDTH, ROWS, TEXT = 2, 4, 3, 16, 5, 3
KERNELS = jax.jit(by_kernels, static_argnames=("layer", "interpret"))
PLAIN = jax.jit(read_frames)


def start(memory: MemoryConfig, tokens: int, dtype=jnp.float32):
    plan = retention_plan(memory, tokens, 1)
    retention = Retention(
        recent=jnp.asarray(plan.recent[0]),
        older=jnp.asarray(plan.older[0]),
        seed=jnp.zeros(VIDEOS, jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
        novelty=plan.novelty,
    )
    return init_memory(VIDEOS, HEADS, WIDTH, plan.capacity, tokens, dtype), retention


def chunk(rng: np.random.Generator, tokens: int, first: int, text: bool, dtype=jnp.float32):
    def normal(count, scale=1.0):
        return jnp.asarray(scale * rng.normal(size=(FRAMES, VIDEOS, HEADS, count, WIDTH)), dtype)

    valid = rng.random((FRAMES, VIDEOS)) < 0.8
    index = np.broadcast_to(first + np.arange(FRAMES)[:, None], valid.shape).astype(np.int32)
    frames = Frames(normal(tokens), normal(tokens), jnp.asarray(index), jnp.asarray(valid))
    if not text:
        return frames, Queries(normal(ROWS, 2))
    asked = jnp.asarray([[True, True, False], [False] * 3])
    return frames, Queries(normal(ROWS, 2), normal(TEXT, 2), asked, rows_score=False)


@pytest.mark.parametrize(
    ("memory", "tokens", "text"),
    (
        (memory_preset("eq8"), 70, False),  # frames of more than one tile
        (memory_preset("eq6"), 7, True),
        (MemoryConfig(policy="budget", capacity=130, recent_ratio="0.5"), 9, True),
        (MemoryConfig(policy="full", max_frames=16), 9, False),
        (MemoryConfig(policy="full", max_frames=120), 9, False),  # over 1,024 slots
    ),
    ids=lambda given: getattr(given, "policy", None),
)
def test_kernels_leave_what_the_plain_memory_leaves(memory, tokens, text):
    rng = np.random.default_rng(3)
    expected, retention = start(memory, tokens)
    found = expected
    for part in range(3):
        frames, rows = chunk(rng, tokens, part * FRAMES, text)
        wanted, expected = PLAIN(expected, retention, frames, rows)
        attended, found = KERNELS(found, retention, frames, rows, interpret=True)
        for name in ("key", "value", "frame", "patch", "slots", "length"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
        # A score is a sum of at most (rows + text) · heads probabilities, each rounded once or
        # twice: far less than that many units in the last place of their sum.
        np.testing.assert_allclose(found.score, expected.score, rtol=1e-5, atol=1e-7)
        real = np.asarray(frames.valid)
        np.testing.assert_allclose(attended[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_half_precision_is_rounded_where_the_plain_memory_rounds():
    rng = np.random.default_rng(5)
    expected, retention = start(memory_preset("eq6"), 7, jnp.bfloat16)
    frames, rows = chunk(rng, 7, 0, True, jnp.bfloat16)
    wanted, after = PLAIN(expected, retention, frames, rows)
    attended, found = KERNELS(expected, retention, frames, rows, interpret=True)
    assert attended.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.slots, after.slots)
    real = np.asarray(frames.valid)
    # Results that are the same but for the order of a float32 sum: one step of bfloat16 apart.
    np.testing.assert_allclose(
        attended[real].astype(np.float32), wanted[real].astype(np.float32), rtol=2**-7, atol=2**-10
    )


def test_of_equal_scores_the_older_token_stays():
    tokens = 8
    memory, retention = start(
        MemoryConfig(policy="budget", capacity=12, recent_ratio="0.25"), tokens
    )
    frames, rows = chunk(np.random.default_rng(0), tokens, 0, False)
    # Keys of zero: every token gets just the same attention.
    frames = frames.replace(key=frames.key * 0, valid=jnp.ones((FRAMES, VIDEOS), bool))
    _, after = KERNELS(memory, retention, frames, rows, interpret=True)
    kept = after.in_time_order()
    tokens_kept = np.asarray(kept["frame"] * tokens + kept["patch"])[:, :12]
    last = FRAMES * tokens
    np.testing.assert_array_equal(tokens_kept, [[*range(9), last - 3, last - 2, last - 1]] * 2)


def test_a_padded_frame_may_hold_anything():
    memory, retention = start(memory_preset("eq6"), 7)
    frames, rows = chunk(np.random.default_rng(1), 7, 0, False)
    _, before = KERNELS(memory, retention, frames, rows, interpret=True)
    nothing = frames.replace(key=frames.key * jnp.nan, valid=jnp.zeros((FRAMES, VIDEOS), bool))
    _, after = KERNELS(before, retention, nothing, rows, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("size", [16, 512, 1024])
def test_the_number_that_so_many_reach(size):
    """Of scores' bits, with equal ones and with some that do not count, against a sort."""
    scores = np.random.default_rng(size).exponential(size=size).astype(np.float32).round(1)
    values = np.where(np.arange(size) < size - 5, scores.view(np.int32), -1)
    ordered = np.sort(values)[::-1]
    counts = np.asarray([1, 2, size // 2, size - 5])
    found = jax.vmap(_nth_largest, (None, 0))(jnp.asarray(values), jnp.asarray(counts))
    np.testing.assert_array_equal(found, ordered[counts - 1])
    largest = np.iinfo(np.int32).max  # none is wanted: none reaches it
    assert _nth_largest(jnp.asarray(values), jnp.int32(0)) == largest


def test_of_all_layers_one_is_changed_where_it_lies():
    """Layers that differ in what they hold and in what they may hold."""
    rng, tokens = np.random.default_rng(2), 7
    config = MemoryConfig(recent_ratio="0.1,0.3,0.2", conserve_ratio="0.2,0.1,0.4")
    plan = retention_plan(config, tokens, 3)
    counts = Retention(
        recent=jnp.asarray(plan.recent),
        older=jnp.asarray(plan.older),
        seed=jnp.zeros((3, VIDEOS), jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
    )
    one = init_memory(VIDEOS, HEADS, WIDTH, plan.capacity, tokens, jnp.float32)
    memory = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
    expected = [one] * 3
    for part in range(2):
        for layer in (0, 2, 1, 2):
            frames, rows = chunk(rng, tokens, part * FRAMES, False)
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], counts)
            wanted, expected[layer] = KERNELS(expected[layer], own, frames, rows, interpret=True)
            noise = jnp.full_like(frames.key, jnp.nan)
            whole = frames.replace(
                key=jnp.stack([noise] * layer + [frames.key] + [noise] * (2 - layer)),
                value=jnp.stack([noise] * layer + [frames.value] + [noise] * (2 - layer)),
            )
            given = memory, counts, whole, rows
            attended, memory = KERNELS(*given, layer=layer, interpret=True)
            np.testing.assert_array_equal(attended, wanted)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    jax.tree.map(np.testing.assert_array_equal, memory, together)


def test_what_the_kernels_cannot_do_is_left_to_xla():
    memory, retention = start(memory_preset("eq8"), 7)
    assert fits(memory, retention)
    for other in (dict(novelty=0.5), dict(decay=0.5), dict(shared=True)):
        assert not fits(memory, dataclasses.replace(retention, **other))
    assert not fits(memory, dataclasses.replace(retention, ranking="random"))
    assert not fits(memory.replace(key=memory.key[..., :12]), retention)


@pytest.mark.parametrize("policy", ("adacm2", "merge"))
def test_a_model_with_fused_memory_reads_alike_where_there_is_no_nvidia_gpu(policy):
    plain = tiny(memory=MemoryConfig(policy=policy, bank_frames=2))
    frames = np.random.default_rng(0).integers(0, 256, (1, 3, 56, 56, 3), np.uint8)
    ids, mask = jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    question = Question(ids, mask, ids, mask)
    with quick_compilation():
        params = jax.jit(init_params, static_argnums=0)(plain, jax.random.key(0))
    state = init_state(plain, jnp.zeros(1, jnp.int32))

    def read(config):
        model = AdaCM2(config)
        features = call(model, params, "encode_frames", frames)
        return call(model, params, "read", features, jnp.ones((1, 3), bool), question, state)

    fused = dataclasses.replace(plain, fused_memory=True)
    step = jax.jit(read, static_argnums=0)
    jax.tree.map(np.testing.assert_array_equal, step(fused), step(plain))
