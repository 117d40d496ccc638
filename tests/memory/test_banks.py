"""Policy ``merge``: a bank against plain lists, and the model that reads the banks."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from adacm2_jax.config import MemoryConfig, QFormerConfig
from adacm2_jax.errors import UserError
from adacm2_jax.memory.banks import append, init_bank, live, shrink
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.models.adacm2 import (
    AdaCM2,
    Question,
    check_memory,
    init_params,
    init_state,
)
from tests.oracle import U
from tests.small import quick_compilation, small_model

BATCH, FRAMES, ROWS, WIDTH = 2, 9, 3, 4


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


# One bank -----------------------------------------------------------------------------------------


@jax.jit
def remember(bank, rows, valid):
    return shrink(append(bank, rows, valid))


def merge_lists(vectors: list, sizes: list) -> tuple[list, list, float]:
    """Makes the most similar neighbours one; also by how much they were the most similar."""

    def cosine(x, y):
        return x @ y / (max(np.linalg.norm(x), 1e-8) * max(np.linalg.norm(y), 1e-8))

    alike = [cosine(x, y) for x, y in itertools.pairwise(vectors)]
    k = alike.index(max(alike))
    total = sizes[k] + sizes[k + 1]
    mean = (sizes[k] * vectors[k] + sizes[k + 1] * vectors[k + 1]) / total
    lead = alike[k] - max(alike[:k] + alike[k + 1 :], default=-2)
    return [*vectors[:k], mean, *vectors[k + 2 :]], [*sizes[:k], total, *sizes[k + 2 :]], lead


@settings(max_examples=25)
@given(
    frames=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32),
    masks=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12),
)
def test_a_bank_holds_what_plain_lists_hold(frames, seed, masks):
    """After every frame, for videos of different lengths; padding changes no bit."""
    inputs = np.random.default_rng(seed).normal(size=(len(masks), BATCH, ROWS, WIDTH))
    inputs = inputs.astype(np.float32)
    bank = init_bank((BATCH,), frames, ROWS, WIDTH)
    lists = {(b, r): ([], []) for b in range(BATCH) for r in range(ROWS)}
    for rows, valid in zip(inputs, np.array(masks), strict=True):
        before = bank
        bank = remember(bank, np.where(valid[:, None, None], rows, np.nan), valid)
        for b in range(BATCH):
            if not valid[b]:
                pairs = zip(jax.tree.leaves(before), jax.tree.leaves(bank), strict=True)
                assert all(np.array_equal(old[b], new[b]) for old, new in pairs)
                continue
            for r in range(ROWS):
                vectors, sizes = lists[b, r]
                vectors, sizes = [*vectors, rows[b, r].astype(np.float64)], [*sizes, 1]
                if len(vectors) > frames:
                    vectors, sizes, lead = merge_lists(vectors, sizes)
                    assume(lead > 1e-5)  # else rounding may choose another pair
                lists[b, r] = vectors, sizes
                held = len(sizes)
                assert bank.count[b] == held
                assert live(bank)[b].tolist() == [i < held for i in range(frames + 1)]
                assert bank.sizes[b, :held, r].tolist() == sizes
                # Two products, a sum, a quotient for every frame that an entry is the mean of.
                error = 4 * max(sizes) * U * np.abs(inputs).max()
                assert np.abs(bank.entries[b, :held, r] - np.stack(vectors)).max() <= error


def fill(frames: int, vectors: list) -> tuple[list, list]:
    """Entries and sizes of a bank of one row position after these vectors."""
    bank = init_bank((1,), frames, 1, len(vectors[0]))
    for vector in vectors:
        bank = remember(bank, jnp.asarray(vector, jnp.float32)[None, None], jnp.ones(1, bool))
    held = int(bank.count[0])
    return bank.entries[0, :held, 0].tolist(), bank.sizes[0, :held, 0].tolist()


def test_of_equal_pairs_the_oldest_merges():
    assert fill(3, [[3, 4]] * 4) == ([[3, 4]] * 3, [2, 1, 1])
    assert fill(2, [[1, 0], [0, 1], [1, 0]]) == ([[0.5, 0.5], [1, 0]], [2, 1])


def test_a_mean_weighs_its_parts_by_the_frames_they_stand_for():
    assert fill(1, [[3, 0], [0, 3], [6, 6], [3, 3]]) == ([[3, 3]], [4])
    assert fill(2, [[4, 0], [8, 0], [0, 1], [0, 3]]) == ([[6, 0], [0, 2]], [2, 2])


def test_a_vector_of_almost_no_length_is_similar_to_nothing():
    tiny = [1e-9, 0]  # shorter than 1e-8, which PyTorch divides by
    assert fill(2, [tiny, tiny, [1, 0.5]])[1] == [1, 2]
    assert fill(2, [[0, 0], [1, 0], [1, 1]])[1] == [1, 2]
    assert fill(2, [[1, 0], [0, 0], [-1, 0]])[1] == [2, 1]


# The model ----------------------------------------------------------------------------------------


def model_config(policy="merge", **overrides):
    qformer = QFormerConfig(
        vocab_size=160,
        width=16,
        depth=2,
        cross_attention_every=1,
        num_heads=2,
        mlp_width=32,
        num_queries=2,
        max_positions=32,
        dropout=0.0,
    )
    memory = MemoryConfig(policy, bank_frames=2)
    return small_model(**({"qformer": qformer, "memory": memory, "max_text_len": 5} | overrides))


CONFIG = model_config()
TOKENS, VISION = CONFIG.vision.tokens_per_frame, CONFIG.vision.width
#: Float32 rounding of values of about one: 4 layers of at most 8 matrix products, each a sum of at
#: most 3 · 7 · 16 terms (whose roundings are as the square root).
ROUNDING = 4 * 8 * 336**0.5 * 2.0**-24


def ask(words: int, rows: int = BATCH) -> Question:
    ids = jnp.asarray(np.random.default_rng(1).integers(1, 150, (rows, words)), jnp.int32)
    return Question(ids, jnp.ones(ids.shape, bool), ids, jnp.ones(ids.shape, bool))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(CONFIG, jax.random.key(0))))
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


@pytest.fixture(scope="module")
def features():
    shape = (BATCH, FRAMES, TOKENS, VISION)
    return np.random.default_rng(12).normal(size=shape).astype(np.float32)


TRACES = []


def start(config=CONFIG, rows=BATCH):
    return init_state(config, jnp.zeros(rows, jnp.int32))


def step_of(config):
    @jax.jit
    def step(params, features, valid, question, state):
        TRACES.append((config, features.shape, question.qformer_ids.shape))
        return AdaCM2(config).apply(
            {"params": params}, features, valid, question, state, method="read"
        )

    return step


STEP = step_of(CONFIG)


def read(params, features, valid, question, state, chunk=4):
    """Feeds frames in chunks; what is not valid is NaN."""
    features = np.where(valid[..., None, None], features, np.nan)
    for begin in range(0, valid.shape[1], chunk):
        part = slice(begin, begin + chunk)
        state = STEP(params, features[:, part], valid[:, part], question, state)
    return state


def assert_close(mine, other):
    assert np.abs(mine - other).max() <= ROUNDING * np.abs(other).max()


def test_every_policy_has_the_same_parameters():
    trees = [
        jax.eval_shape(lambda policy=policy: init_params(model_config(policy), jax.random.key(0)))
        for policy in ("adacm2", "merge")
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])  # with the axes' names
    assert jax.tree.leaves(trees[0]) == jax.tree.leaves(trees[1])


def test_one_frame_is_read_as_every_policy_reads_it(params, features):
    frame, valid, config = features[:, :1], np.ones((BATCH, 1), bool), model_config("adacm2")
    found = STEP(params, frame, valid, ask(3), start()).queries
    assert_close(found, step_of(config)(params, frame, valid, ask(3), start(config)).queries)


def test_neither_chunks_nor_padding_nor_other_videos_matter_and_one_trace_serves_all(
    params, features
):
    after = [start()]
    for t in range(6):
        frame = features[:, t : t + 1]
        after.append(STEP(params, frame, np.ones((BATCH, 1), bool), ask(3), after[-1]))
    masks = np.array([[0, 1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 1]], bool)
    padded = np.zeros((BATCH, 8, TOKENS, VISION), np.float32)
    for b, mask in enumerate(masks):
        padded[b, mask] = features[b, : mask.sum()]
    state = read(params, padded, masks, ask(3), start())
    assert state.frames_seen.tolist() == [6, 3]
    assert state.memory.tokens_kept.tolist() == [2 * TOKENS] * 2
    for b, seen in enumerate((6, 3)):
        mine, other = state.memory, after[seen].memory
        assert np.array_equal(mine.visual.sizes[b, :2], other.visual.sizes[b, :2])
        assert_close(mine.visual.entries[b, :2], other.visual.entries[b, :2])
        assert_close(mine.hidden.entries[:, :, b, :2], other.hidden.entries[:, :, b, :2])
        assert_close(state.queries[b], after[seen].queries[b])
    nothing = read(params, padded[:, :4], np.zeros((BATCH, 4), bool), ask(3), state)
    assert jax.tree.all(jax.tree.map(np.array_equal, nothing, state))
    long = np.tile(features, (1, 4, 1, 1))
    state = read(params, long, np.ones(long.shape[:2], bool), ask(3), start())
    assert state.frames_seen.tolist() == [4 * FRAMES] * BATCH
    assert (state.memory.visual.sizes[:, :2].sum(1) == 4 * FRAMES).all()
    assert np.isfinite(state.queries).all()
    assert len(TRACES) == len(set(TRACES))


def test_questions_share_a_video_as_if_each_had_its_own(params, features):
    question, valid = ask(3, rows=2 * BATCH), np.ones((BATCH, 8), bool)
    features = features[:, :8]
    shared = read(params, features, valid, question, start(rows=2 * BATCH))
    for video in range(BATCH):
        rows = slice(2 * video, 2 * video + 2)
        own = jax.tree.map(lambda leaf, rows=rows: leaf[rows], question)
        frames = np.repeat(features[video : video + 1], 2, axis=0)
        apart = read(params, frames, valid, own, start())
        assert_close(shared.queries[rows], apart.queries)
        assert_close(shared.memory.visual.entries[rows], apart.memory.visual.entries)
        assert np.array_equal(shared.memory.visual.sizes[rows], apart.memory.visual.sizes)
        assert not np.allclose(apart.queries[0], apart.queries[1])


def test_the_words_that_a_question_lacks_are_padding(params, features):
    valid, frames, question = np.ones((BATCH, 4), bool), features[:, :4], ask(5)
    mask = jnp.arange(5) < jnp.full((BATCH, 1), 3)
    padded = dataclasses.replace(question, qformer_mask=mask)
    short = dataclasses.replace(
        question, qformer_ids=question.qformer_ids[:, :3], qformer_mask=mask[:, :3]
    )
    other = dataclasses.replace(padded, qformer_ids=jnp.where(mask, question.qformer_ids, 1))
    found = [read(params, frames, valid, asked, start()).queries for asked in (padded, other)]
    assert np.array_equal(*found)
    # Another program, as it pads by itself: other roundings.
    assert_close(read(params, frames, valid, short, start()).queries, found[0])
    with pytest.raises(UserError, match=r"question of 6 tokens .* hold 5 .*max_text_len.*shorten"):
        read(params, frames, valid, ask(6), start())


def scans_in(jaxpr) -> Iterator:
    """All loops of a program, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scans_in(inner)


def test_the_gradient_is_that_of_the_last_frame_with_constant_banks(params, features):
    """And the frames before it leave nothing behind for the backward pass."""
    upstream = np.random.default_rng(3).normal(size=start().queries.shape).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params, features, valid, state):
        apply = functools.partial(AdaCM2(CONFIG).apply, method="read")
        state = apply({"params": params}, features, valid, ask(3), state)
        return (state.queries * upstream).sum()

    valid = np.ones((BATCH, FRAMES), bool)
    traced = gradient.trace(params, features, valid, start())
    loops = [loop for loop in scans_in(traced.jaxpr) if loop.params["length"] == FRAMES - 1]
    assert len(loops) == 1
    # What a loop hands to the backward pass is stacked over its steps; a bank is not.
    assert not [out for out in loops[0].outvars if out.aval.shape[:1] == (FRAMES - 1,)]
    whole = traced.lower().compile()(params, features, valid, start())
    state = read(params, features[:, :-1], valid[:, :-1], ask(3), start())
    last = gradient(params, features[:, -1:], valid[:, -1:], state)
    for part in ("ln_vision", "temporal_embed", "qformer"):
        pairs = list(zip(jax.tree.leaves(whole[part]), jax.tree.leaves(last[part]), strict=True))
        largest = max(np.abs(other).max() for _, other in pairs)
        assert np.isfinite(largest) and largest > 0
        for mine, other in pairs:
            # The way back is as long as the way there, and starts from what that has rounded.
            assert np.abs(mine - other).max() <= 3 * ROUNDING * largest
    assert np.flatnonzero(np.abs(whole["temporal_embed"]).max(1)).tolist() == [FRAMES - 1]


def test_dropout_acts_and_is_given_by_its_key(params, features):
    config = model_config(qformer=dataclasses.replace(CONFIG.qformer, dropout=0.3))
    valid = np.ones((BATCH, 2), bool)

    @jax.jit
    def step(seed):
        rngs = {"dropout": jax.random.key(seed)}
        arguments = features[:, :2], valid, ask(3), start(config), False
        apply = AdaCM2(config).apply
        return apply({"params": params}, *arguments, method="read", rngs=rngs).queries

    found = [step(seed) for seed in (1, 1, 2)]
    assert np.array_equal(found[0], found[1]) and not np.allclose(found[0], found[2])
    assert np.isfinite(found[0]).all()


def test_a_bank_without_a_size_is_refused_and_ratios_do_not_count():
    with pytest.raises(UserError, match=r"memory\.bank_frames is 0: policy 'merge' .*10 or 20"):
        MemoryConfig("merge")
    endless = MemoryConfig("merge", recent_ratio=1, bank_frames=2)
    check_memory(model_config(memory=endless))
    with pytest.raises(UserError, match="no bound"):
        check_memory(model_config(memory=dataclasses.replace(endless, policy="adacm2")))
    with pytest.raises(ValueError, match="merge"):
        plan_for(CONFIG)
