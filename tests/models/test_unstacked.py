"""A model whose layers have parameters of their own computes what one whose are stacked does."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.inference.generate import GenerationConfig, generate
from adacm2_jax.models.adacm2 import AdaCM2, Question, call, init_params, init_state
from adacm2_jax.models.params import unstacked
from tests.small import quick_compilation

CONFIG = tiny()


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def stacked(config=CONFIG) -> dict:
    return nn.unbox(jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))


def asked() -> tuple[jax.Array, Question]:
    rng = np.random.default_rng(1)
    shape = (2, CONFIG.qformer.num_queries, CONFIG.qformer.width)
    queries = jnp.asarray(rng.normal(size=shape), jnp.float32)
    ids = jnp.asarray(rng.integers(3, 500, (2, 6)), jnp.int32)
    mask = jnp.asarray([[False] * 2 + [True] * 4, [True] * 6])
    return queries, Question(ids, mask, ids, mask)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same_token_for_token(beams):
    options = GenerationConfig(max_new_tokens=6, num_beams=beams, num_return=beams)
    run = jax.jit(generate, static_argnums=(0, 4))
    one, other = (
        run(AdaCM2(CONFIG), params, *asked(), options)
        for params in (stacked(), unstacked(stacked()))
    )
    assert np.array_equal(one.ids, other.ids)
    # The same sums, in programs that may round them differently.
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)


def test_likelihoods_are_the_same():
    queries, question = asked()
    targets = jnp.asarray(question.llm_mask).at[:, :4].set(False)
    run = jax.jit(call, static_argnums=(0, 2))
    one, other = (
        run(AdaCM2(CONFIG), params, "log_likelihood", queries, question, targets)
        for params in (stacked(), unstacked(stacked()))
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_vit_is_the_same():
    frames = np.random.default_rng(2).integers(0, 256, (1, 2, 56, 56, 3), np.uint8)
    run = jax.jit(call, static_argnums=(0, 2))
    one, other = (
        run(AdaCM2(CONFIG), params, "encode_frames", frames)
        for params in (stacked(), unstacked(stacked()))
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("memory", "fused"),
    [
        (dict(novelty=0.5), False),
        (dict(), True),
        (dict(shared_choice=True), False),
        (dict(policy="uniform"), False),
        (dict(policy="merge", bank_frames=2), False),
    ],
    ids=str,
)
def test_the_q_former_is_the_same(memory, fused):
    """Also where all layers read one frame after the other."""
    memory = MemoryConfig(**memory)
    config = dataclasses.replace(CONFIG, dtype="float64", memory=memory, fused_memory=fused)
    rng = np.random.default_rng(2)
    tokens = config.vision.tokens_per_frame, config.vision.width
    _, question = asked()
    run = jax.jit(call, static_argnums=(0, 2))
    with jax.enable_x64(True):
        features = jnp.asarray(rng.normal(size=(2, 3, *tokens)))
        valid = jnp.asarray([[True] * 3, [True] * 2 + [False]])
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), stacked(config))

        def read(params):
            state = init_state(config, jnp.zeros(2, jnp.int32))
            return run(AdaCM2(config), params, "read", features, valid, question, state)

        one, other = read(params), read(unstacked(jax.tree.map(jnp.asarray, params)))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    # The same sums of at most some hundred terms, a few after one another, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), one, other)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_fingerprint_does_not_tell_them_apart(depth):
    config = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, depth=depth))
    params = stacked(config)
    blocks, layers = params["vision"]["blocks"], params["llm"]["layers"]
    whole = fingerprint(params)
    apart = unstacked(params)
    assert len(apart["llm"]["layers"]) == depth and fingerprint(apart) == whole
    changed = jax.tree.map(lambda leaf: leaf, apart)
    changed["llm"]["layers"][-1]["mlp_norm"]["scale"] += 1
    assert fingerprint(changed) != whole
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((blocks, layers)))  # never held twice
