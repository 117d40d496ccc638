"""Half precision: which matrix products are computed in it, and what stays float32."""

import dataclasses
import functools
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state
from adacm2_jax.models.params import abstract_params
from adacm2_jax.sharding import make_mesh

HALVES = ("bfloat16", "float16")
BASE = tiny()
ROWS, FRAMES, WORDS = 2, 3, 5


def as_lavis(half: str):
    """ViT and language model in half precision, Q-Former and memory in float32."""
    return dataclasses.replace(BASE, dtype=half, qformer_dtype="float32")


def params() -> dict:
    """By shape and dtype alone: nothing is computed here."""
    return jax.eval_shape(lambda: nn.unbox(init_params(BASE, jax.random.key(0))))


def question() -> Question:
    ids = jnp.asarray(np.random.default_rng(1).integers(1, 500, (ROWS, WORDS)), jnp.int32)
    mask = jnp.ones(ids.shape, bool)
    return Question(ids, mask, ids, mask)


def inputs(config, method: str) -> tuple:
    """What a method of the model is called with."""
    frames = np.zeros((ROWS, FRAMES, *(2 * [config.vision.image_size]), 3), np.uint8)
    shape = (ROWS, FRAMES, config.vision.tokens_per_frame, config.vision.width)
    features = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    state = init_state(config, jnp.full(ROWS, FRAMES))
    return {
        "encode_frames": (frames,),
        "read": (features, np.ones((ROWS, FRAMES), bool), question(), state),
        "visual_tokens": (state.queries,),
        "answer_loss": (state.queries, question(), np.ones((ROWS, WORDS), bool)),
        "prefill": (state.queries, question(), config.qformer.num_queries + WORDS),
    }[method]


def trace(config, method: str):
    """The program of a method, and the shapes and dtypes of its results."""
    model = AdaCM2(config)
    static = {"cache_length": inputs(config, method)[-1]} if method == "prefill" else {}
    arrays = inputs(config, method)[: -1 if static else None]
    run = functools.partial(model.apply, method=method, **static)
    return jax.make_jaxpr(run, return_shape=True)({"params": params()}, *arrays)


def operations(jaxpr, name: str) -> Iterator:
    """Everywhere in a program, loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from operations(getattr(value, "jaxpr", value), name)


def factors(jaxpr) -> set[str]:
    """The dtypes of the operands of all matrix products."""
    products = operations(jaxpr, "dot_general")
    return {operand.aval.dtype.name for product in products for operand in product.invars}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("method", ["encode_frames", "read", "answer_loss", "prefill"])
def test_a_half_precision_model_multiplies_in_half_precision(half, method):
    config = dataclasses.replace(BASE, dtype=half)
    jaxpr, _ = trace(config, method)
    assert factors(jaxpr.jaxpr) == {half}


@pytest.mark.parametrize("half", HALVES)
def test_the_vits_residual_stream_stays_float32(half):
    config = dataclasses.replace(BASE, dtype=half)
    jaxpr, features = trace(config, "encode_frames")
    assert features.dtype == config.feature_dtype
    (blocks,) = operations(jaxpr.jaxpr, "scan")
    (stream,) = blocks.outvars
    assert stream.aval.dtype == jnp.float32


def test_features_are_as_precise_as_what_reads_them():
    dtypes = [("float32", ""), ("bfloat16", ""), ("float16", ""), ("bfloat16", "float32")]
    found = [dataclasses.replace(BASE, dtype=d, qformer_dtype=q).feature_dtype for d, q in dtypes]
    assert found == ["float32", "bfloat16", "float32", "float32"]


@pytest.mark.parametrize("half", HALVES)
def test_the_qformer_is_an_island_where_it_is_asked_for(half):
    jaxpr, state = trace(as_lavis(half), "read")
    assert factors(jaxpr.jaxpr) == {"float32"}
    kept = state.memory.key, state.memory.value, state.queries
    assert {leaf.dtype.name for leaf in kept} == {"float32"}
    jaxpr, visual = trace(as_lavis(half), "visual_tokens")
    assert factors(jaxpr.jaxpr) == {"float32"}
    assert visual.dtype == half
    jaxpr, (logits, cache) = trace(as_lavis(half), "prefill")
    assert factors(jaxpr.jaxpr) == {"float32", half}  # the projection, and the language model
    assert {leaf.dtype.name for leaf in (*cache.key, *cache.value)} == {half}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("half", HALVES)
def test_without_the_island_memory_and_queries_are_half(half):
    _, state = trace(dataclasses.replace(BASE, dtype=half), "read")
    kept = state.memory.key, state.memory.value, state.queries
    assert {leaf.dtype.name for leaf in kept} == {half}
    assert state.memory.score.dtype == jnp.float32


@pytest.mark.parametrize("half", HALVES)
def test_what_the_island_computes_is_the_program_of_float32(half):
    def program(config) -> str:
        read = jax.jit(functools.partial(AdaCM2(config).apply, method="read"))
        return read.lower({"params": params()}, *inputs(config, "read")).as_text()

    assert program(as_lavis(half)) == program(BASE)


@pytest.mark.parametrize("half", HALVES)
def test_frozen_weights_are_kept_in_the_dtype_that_they_are_used_in(half):
    groups = (("temporal_embed", 1.0), (".*", None))
    abstract = abstract_params(as_lavis(half), groups, make_mesh((-1, 1)))
    llm, vision = abstract["llm"], abstract["vision"]["blocks"]
    weights = llm["token_embed"], llm["layers"]["out"]["kernel"], vision["mlp"]["up"]["kernel"]
    assert {leaf.dtype.name for leaf in weights} == {half}
    added = vision["query"]["bias"], vision["norm1"]["scale"], abstract["vision"]["cls_token"]
    assert {leaf.dtype.name for leaf in (*added, llm["norm"]["scale"])} == {"float32"}
    island = (abstract[name] for name in ("qformer", "ln_vision", "language_projection"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(list(island))} == {"float32"}

    everywhere = dataclasses.replace(BASE, dtype=half)
    abstract = abstract_params(everywhere, groups, make_mesh((-1, 1)))
    assert abstract["qformer"]["word_embed"].dtype == half
    assert abstract["language_projection"]["kernel"].dtype == half
    assert abstract["temporal_embed"].dtype == jnp.float32
