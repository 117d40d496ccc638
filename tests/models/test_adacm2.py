"""The three networks joined: streaming in any chunking, at one compiled step, and the full size."""

import dataclasses
import itertools

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from adacm2_jax.config import LlamaConfig, MemoryConfig, instructblip_vicuna_7b, tiny
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.models.adacm2 import (
    AdaCM2,
    Question,
    init_params,
    init_state,
    temporal_position,
)
from adacm2_jax.models.llama import Llama

BATCH, WORDS, FRAMES = 2, 3, 8
CONFIG = tiny(memory=MemoryConfig(recent_ratio=("0.2", "0.1"), conserve_ratio=("0.1", "0.3")))
TOKENS, WIDTH = CONFIG.vision.tokens_per_frame, CONFIG.vision.width
#: Float32 rounding of a query row of size one. It passes 4 layers of at most 8 matrix products,
#: each a sum of at most 384 terms (whose roundings are as the square root), then normalised.
ROUNDING = 4 * 8 * 384**0.5 * 2.0**-24


def random_params(config, scale=0.2):
    """Parameters large enough that attention is far from even."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(config, jax.random.key(0))))
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def make_question(words=WORDS, seed=1, masked=0):
    """Random words; the last ``masked`` of them are padding."""
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(1, 500, (BATCH, words)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(words) < words - masked, (BATCH, words))
    return Question(ids, mask, ids, mask)


def reader(config):
    model = AdaCM2(config)

    @jax.jit
    def step(params, features, valid, question, state):
        return model.apply({"params": params}, features, valid, question, state, method="read")

    return step


def tokens_of(memory) -> list[list[list[tuple[int, int]]]]:
    """(frame, patch) by layer and video."""
    shown = jax.tree.map(np.asarray, memory.in_time_order())
    return [
        [
            [(int(f), int(p)) for f, p, live in zip(*rows, strict=True) if live]
            for rows in zip(*layer, strict=True)
        ]
        for layer in zip(shown["frame"], shown["patch"], shown["live"], strict=True)
    ]


@dataclasses.dataclass
class World:
    params: dict
    step: object
    features: np.ndarray


@pytest.fixture(scope="module")
def world():
    features = np.random.default_rng(12).normal(size=(BATCH, FRAMES, TOKENS, WIDTH))
    return World(random_params(CONFIG), reader(CONFIG), features.astype(np.float32))


@pytest.fixture(scope="module")
def one_by_one(world):
    """The state after every frame of the world's videos, one frame a step."""
    state = init_state(CONFIG, jnp.full(BATCH, FRAMES))
    states = [state]
    for t in range(FRAMES):
        valid = jnp.ones((BATCH, 1), bool)
        frame = world.features[:, t : t + 1]
        state = world.step(world.params, frame, valid, make_question(), state)
        states.append(jax.tree.map(np.asarray, state))
    return states


# Streaming --------------------------------------------------------------------------------------


def test_layers_that_choose_together_remember_the_same_whatever_the_chunks(world):
    memory = MemoryConfig(recent_ratio="0.1", conserve_ratio="0.3", shared_choice=True)
    config = dataclasses.replace(CONFIG, memory=memory)
    step, valid = reader(config), np.ones((BATCH, FRAMES), bool)
    valid[0, 3] = valid[1, :2] = False
    ends = []
    for size in (FRAMES, 1):
        state = init_state(config, jnp.full(BATCH, FRAMES))
        for first in range(0, FRAMES, size):
            part = slice(first, first + size)
            state = step(
                world.params, world.features[:, part], valid[:, part], make_question(), state
            )
        ends.append(state)
        first_layer, *others = tokens_of(state.memory)
        assert all(layer == first_layer for layer in others)
    assert tokens_of(ends[0].memory) == tokens_of(ends[1].memory)
    np.testing.assert_allclose(ends[0].queries, ends[1].queries, atol=ROUNDING)
    alone = step(
        world.params,
        world.features[:1],
        valid[:1],
        jax.tree.map(lambda leaf: leaf[:1], make_question()),
        init_state(config, jnp.full(1, FRAMES)),
    )
    assert tokens_of(alone.memory) == [layer[:1] for layer in tokens_of(ends[0].memory)]


def test_an_answer_from_recent_frames_knows_nothing_older(world):
    memory = MemoryConfig(policy="recent_frames", recent_frames=3)
    step = reader(dataclasses.replace(CONFIG, memory=memory))
    every = reader(dataclasses.replace(CONFIG, memory=MemoryConfig("full", max_frames=3)))
    config = dataclasses.replace(CONFIG, memory=memory)
    valid = jnp.ones((BATCH, FRAMES), bool)
    state = step(
        world.params,
        world.features,
        valid,
        make_question(),
        init_state(config, jnp.full(BATCH, FRAMES)),
    )
    assert [{frame for frame, _ in video} for video in tokens_of(state.memory)[0]] == [{6, 7}] * 2
    # Reading the last three frames alone, at their places, gives the same.
    short = init_state(
        dataclasses.replace(CONFIG, memory=MemoryConfig("full", max_frames=3)),
        jnp.full(BATCH, FRAMES),
    )
    short = short.replace(frames_seen=jnp.full(BATCH, FRAMES - 3))
    short = every(world.params, world.features[:, -3:], valid[:, -3:], make_question(), short)
    np.testing.assert_allclose(state.queries, short.queries, atol=ROUNDING)


def test_selections_in_these_tests_are_clear(one_by_one):
    """No score at the cut is so close to its neighbour that rounding might swap the two."""
    plan = plan_for(CONFIG)
    for before, after in itertools.pairwise(one_by_one):
        for layer, b in itertools.product(range(2), range(BATCH)):
            n = int(before.memory.length[layer, b]) + TOKENS
            older = int(plan.older[layer, n])
            in_order = np.asarray(before.memory.slots)[layer, b, : n - plan.recent[layer, n]]
            score = np.sort(after.memory.score[layer, b, in_order])[::-1]
            if older:
                assert score[older - 1] > score[older] * (1 + 10 * ROUNDING)


@settings(max_examples=25)
@given(chunks=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), max_size=FRAMES))
def test_any_chunking_of_the_frames_is_the_loop_over_frames(world, one_by_one, chunks):
    """Chunks of four places, some of them padding: in front, in the middle, behind, all of them."""
    state, seen = init_state(CONFIG, jnp.full(BATCH, FRAMES)), 0
    for places in chunks:
        taken = [i for i, real in enumerate(places) if real][: FRAMES - seen]
        chunk = np.full((BATCH, 4, TOKENS, WIDTH), np.nan, np.float32)
        chunk[:, taken] = world.features[:, seen : seen + len(taken)]
        valid = np.zeros((BATCH, 4), bool)
        valid[:, taken] = True
        before = state
        state = world.step(world.params, chunk, valid, make_question(), state)
        seen += len(taken)
        if not taken:
            assert jax.tree.all(jax.tree.map(np.array_equal, before, state))
    expected = one_by_one[seen]
    assert state.frames_seen.tolist() == [seen] * BATCH
    assert tokens_of(state.memory) == tokens_of(expected.memory)
    assert np.abs(state.queries - expected.queries).max() <= ROUNDING * max(
        1, np.abs(expected.queries).max()
    )


def test_videos_of_a_batch_go_on_at_their_own_pace(world, one_by_one):
    """One video is padded in front, the other behind and in the middle; neither notices."""
    masks = np.array([[0, 0, 1, 1, 1, 1, 1, 0], [1, 0, 0, 1, 1, 0, 0, 0]], bool)
    chunks = np.full((BATCH, 8, TOKENS, WIDTH), np.nan, np.float32)
    for b, mask in enumerate(masks):
        chunks[b, mask] = world.features[b, : mask.sum()]
    state = init_state(CONFIG, jnp.full(BATCH, FRAMES))
    for start in (0, 4):
        part = slice(start, start + 4)
        state = world.step(world.params, chunks[:, part], masks[:, part], make_question(), state)
    assert state.frames_seen.tolist() == [5, 3]
    for b, seen in enumerate((5, 3)):
        expected = one_by_one[seen]
        for mine, theirs in zip(tokens_of(state.memory), tokens_of(expected.memory), strict=True):
            assert mine[b] == theirs[b]
        assert (
            np.abs(state.queries[b] - expected.queries[b]).max()
            <= ROUNDING * np.abs(expected.queries[b]).max()
        )


def test_layers_keep_tokens_of_their_own(one_by_one):
    first, second = tokens_of(one_by_one[-1].memory)
    plan = plan_for(CONFIG)
    for tokens in (*first, *second):
        assert 0 < len(tokens) <= plan.capacity
        assert tokens == sorted(set(tokens)) and tokens[-1] == (FRAMES - 1, TOKENS - 1)
    assert len(first[0]) != len(second[0]), "each layer has its ratios"


# The question -----------------------------------------------------------------------------------


def test_a_question_is_independent_of_its_neighbours(world, one_by_one):
    asked = make_question()
    others = make_question(seed=2)
    mixed = jax.tree.map(lambda mine, other: mine.at[1].set(other[1]), asked, others)
    features = world.features.copy()
    features[1] = features[1, ::-1]
    state = init_state(CONFIG, jnp.full(BATCH, FRAMES))
    for t in range(FRAMES):
        valid = np.ones((BATCH, 1), bool)
        state = world.step(world.params, features[:, t : t + 1], valid, mixed, state)
    same = jax.tree.map(
        lambda x, y: np.array_equal(x[:, 0], y[:, 0]), state.memory, one_by_one[-1].memory
    )
    assert jax.tree.all(same)
    assert np.array_equal(state.queries[0], one_by_one[-1].queries[0])
    assert not np.array_equal(state.queries[1], one_by_one[-1].queries[1])


def test_the_question_matters_and_its_padding_does_not(world):
    asked = make_question(masked=1)
    garbled = dataclasses.replace(asked, qformer_ids=asked.qformer_ids.at[:, -1].set(499))
    other = dataclasses.replace(asked, qformer_ids=asked.qformer_ids.at[:, 0].set(499))
    valid = np.ones((BATCH, 1), bool)
    state = init_state(CONFIG, jnp.full(BATCH, FRAMES))
    results = [
        np.asarray(world.step(world.params, world.features[:, :1], valid, q, state).queries)
        for q in (asked, garbled, other)
    ]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_an_empty_question_is_a_question_whose_words_are_all_padding(world):
    """No words at all and only padded words give the same, finite answer."""
    states = []
    for question in (make_question(masked=WORDS), make_question(words=0)):
        state = init_state(CONFIG, jnp.zeros(BATCH, jnp.int32))
        for t in range(3):
            valid = np.ones((BATCH, 1), bool)
            state = world.step(world.params, world.features[:, t : t + 1], valid, question, state)
        states.append(state)
    padded, empty = states
    assert tokens_of(padded.memory) == tokens_of(empty.memory)
    assert np.isfinite(empty.queries).all() and np.abs(empty.queries).max() > 0
    assert np.abs(padded.queries - empty.queries).max() <= ROUNDING * np.abs(empty.queries).max()


@pytest.mark.parametrize("rows", ["text", "query+text"])
def test_text_rows_may_score_and_be_absent(world, rows):
    """Traced, not compiled: shapes and types are those of scoring by the queries."""
    config = dataclasses.replace(CONFIG, memory=dataclasses.replace(CONFIG.memory, score_rows=rows))
    state = init_state(config, jnp.zeros(BATCH, jnp.int32))
    valid = np.ones((BATCH, 1), bool)
    for words in (0, WORDS):
        question = make_question(words)
        after = jax.eval_shape(
            reader(config), world.params, world.features[:, :1], valid, question, state
        )
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


# Memory does not depend on the length -------------------------------------------------------------


def test_one_compiled_step_of_one_size_serves_sixteen_frames_and_four_thousand(world):
    chunk, valid, question = world.features[:, :4], np.ones((BATCH, 4), bool), make_question()
    programs, figures, sizes = [], [], []
    for length in (16, 4096):
        state = init_state(CONFIG, jnp.full(BATCH, length))
        lowered = world.step.lower(world.params, chunk, valid, question, state)
        compiled = lowered.compile()
        analysis = compiled.memory_analysis()
        figures.append(
            (
                analysis.argument_size_in_bytes,
                analysis.output_size_in_bytes,
                analysis.temp_size_in_bytes,
                analysis.generated_code_size_in_bytes,
            )
        )
        programs.append(lowered.as_text())
        for _ in range(length // 4):
            state = compiled(world.params, chunk, valid, question, state)
        assert state.frames_seen.tolist() == [length] * BATCH
        assert state.memory.length.max() <= plan_for(CONFIG).capacity
        assert np.isfinite(state.queries).all()
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    assert programs[0] == programs[1]
    assert figures[0] == figures[1] and figures[0][2] > 0
    assert sizes[0] == sizes[1]
    # What persists is L layers of keys and values for C + P slots, and little beside them.
    slots = plan_for(CONFIG).capacity + TOKENS
    keys_and_values = 2 * 2 * BATCH * slots * CONFIG.qformer.width * 4
    assert keys_and_values < sizes[0] < 1.2 * keys_and_values


# The temporal embedding ---------------------------------------------------------------------------


@given(rows=st.integers(1, 200), total=st.integers(1, 80_000))
def test_a_video_begins_at_the_first_row_and_a_long_one_ends_at_the_last(rows, total):
    index = np.linspace(0, total - 1, 50).astype(np.int32)
    place = np.asarray(temporal_position(jnp.asarray(index), jnp.int32(total), rows))
    assert place[0] == 0 and (np.diff(place) >= 0).all() and place.max() <= rows - 1
    if total <= rows:
        assert place.tolist() == index.tolist()
    else:
        # A product and a division, which XLA may turn into a reciprocal and a product: 3 roundings.
        exact = index.astype(np.float64) * (rows - 1) / (total - 1)
        assert exact[-1] == rows - 1
        assert (np.abs(place - exact) <= 3 * 2.0**-24 * exact).all()


@given(rows=st.integers(1, 200), index=st.integers(0, 2**22))
def test_an_open_stream_stays_at_the_last_row(rows, index):
    assert temporal_position(jnp.int32(index), jnp.int32(0), rows) == min(index, rows - 1)


@given(rows=st.integers(1, 200), total=st.integers(1, 400), more=st.integers(0, 1000))
def test_a_video_longer_than_announced_stays_within_the_table(rows, total, more):
    place = temporal_position(jnp.int32(total + more), jnp.int32(total), rows)
    assert 0 <= place <= rows - 1


def test_between_two_rows_the_temporal_embedding_is_their_mix():
    config = tiny(temporal_positions=3)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3, WIDTH)), jnp.float32)
    place = jnp.array([0.0, 0.25, 1.0, 1.5, 2.0], jnp.float32)
    found = AdaCM2(config).apply(
        {"params": {"temporal_embed": table}}, place, method=lambda model, at: model._temporal(at)
    )
    expected = [
        table[0],
        0.75 * table[0] + 0.25 * table[1],
        table[1],
        0.5 * table[1] + 0.5 * table[2],
        table[2],
    ]
    # Two products and a sum, each right to half a unit in the last place.
    assert np.abs(found - np.stack(expected)).max() <= 4 * 2.0**-24 * np.abs(table).max()
    assert np.array_equal(found[jnp.array([0, 2, 4])], table)


# The full size ------------------------------------------------------------------------------------


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_full_model_has_the_parameters_of_the_published_one():
    config = instructblip_vicuna_7b()
    params = jax.eval_shape(lambda: nn.unbox(init_params(config, jax.random.key(0))))
    queries = params["qformer"].pop("query_tokens")
    assert queries.shape == (1, 32, 768)
    assert {name: count(part) for name, part in params.items()} == {
        "vision": 985_894_528,
        "ln_vision": 2_816,
        "temporal_embed": 120 * 1408,
        "qformer": 185_660_160,
        "language_projection": 3_149_824,
        "llm": 6_738_423_808,
    }
    assert params["temporal_embed"].shape == (120, 1408)
    assert params["llm"]["token_embed"].shape == (32_001, 4096)
    trained = ("ln_vision", "temporal_embed", "qformer", "language_projection")
    assert sum(count(params[name]) for name in trained) + queries.size == 189_006_336


@pytest.mark.parametrize(("rows", "total"), [(32_000, 6_738_415_616), (32_064, 6_738_939_904)])
def test_other_vocabularies_add_two_rows_of_width_a_token(rows, total):
    config = LlamaConfig(vocab_size=rows)
    embeddings, mask = jnp.zeros((1, 1, 4096)), jnp.ones((1, 1), bool)

    def run(llama):
        hidden, _ = llama(embeddings, mask, jnp.zeros((1, 1), jnp.int32))
        return llama.logits(hidden)

    init = nn.init(run, Llama(config))
    assert count(jax.eval_shape(lambda: init(jax.random.key(0)))) == total
