"""The compiled steps of inference, on one device or on a mesh of them: pure functions.

To read, every device reads its own videos (:func:`~adacm2_jax.sharding.on_every_shard`); where the
videos do not divide over the mesh axis ``data``, all devices read all of them.

What comes after the last frame sees the query rows alone. So :func:`answer` and
:func:`log_likelihood` do not depend on the memory policy: given one model for all policies (see
:func:`any_policy`), each is one program for them all.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.inference.generate import Generated, GenerationConfig, generate
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, call, state_specs
from adacm2_jax.models.cuda import EPILOGUES
from adacm2_jax.models.params import replicated_parts
from adacm2_jax.sharding import ROWS, on_every_shard


def any_policy(config: AdaCM2Config) -> AdaCM2:
    """The model without its memory policy, for the steps that do not depend on it."""
    return AdaCM2(dataclasses.replace(config, memory=MemoryConfig()))


@functools.partial(jax.jit, static_argnums=0)
def encode(model: AdaCM2, params: dict, frames: jax.Array) -> jax.Array:
    """The ViT on a chunk: uint8[B, F, height, width, 3] → [B, F, P, V]."""
    run = on_every_shard(
        lambda params, frames: call(model, params, "encode_frames", frames),
        len(frames),
        (PartitionSpec(), ROWS),
        ROWS,
    )
    return run(replicated_parts(params), frames)


_encode_with_epilogues = jax.jit(
    inspect.unwrap(encode), static_argnums=0, compiler_options=EPILOGUES
)


def encoder(config: AdaCM2Config) -> Callable[..., jax.Array]:
    """:func:`encode`, with ``model.fused_epilogues`` by a program that is compiled for them."""
    return _encode_with_epilogues if config.fused_epilogues else encode


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def read(
    model: AdaCM2,
    params: dict,
    features: jax.Array,
    valid: jax.Array,
    question: Question,
    state: StreamState,
) -> StreamState:
    """A chunk into the memory; see ``AdaCM2.read``. The state is donated."""
    specs = state_specs(state)
    run = on_every_shard(
        lambda *arrays: call(model, arrays[0], "read", *arrays[1:]),
        len(features),
        (PartitionSpec(), ROWS, ROWS, ROWS, specs),
        specs,
    )
    return run(replicated_parts(params), features, valid, question, state)


@functools.partial(jax.jit, static_argnums=(0, 4))
def answer(
    model: AdaCM2,
    params: dict,
    queries: jax.Array,
    question: Question,
    config: GenerationConfig,
    rng: jax.Array,
    rows: jax.Array,
) -> Generated:
    """Answers to B questions; see ``generate.generate``.

    Args:
      model, params: of the language model.
      queries: [B, N, E], of a state after the last frame.
      question: one a row.
      config: how to decode.
      rng: one key.
      rows: int32[B]: row i samples with ``fold_in(rng, rows[i])``.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)
    return generate(model, params, queries, question, config, keys)


@functools.partial(jax.jit, static_argnums=0)
def log_likelihood(
    model: AdaCM2,
    params: dict,
    queries: jax.Array,
    rows: jax.Array,
    question: Question,
    targets: jax.Array,
) -> jax.Array:
    """The summed log-probability of given answers; see ``AdaCM2.log_likelihood``.

    Args:
      model, params: of the language model.
      queries: [B, N, E], of a state after the last frame.
      rows: int32[n]: whose answer each one is.
      question: of n rows, prompt and answer.
      targets: bool[n, S].

    Returns:
      float32[n].
    """
    return call(model, params, "log_likelihood", queries[rows], question, targets)


@jax.jit
def sums(leaves: list[jax.Array]) -> jax.Array:
    """Of each of n arrays its sum and that of its squares, float32[n, 2]."""
    wide = [jnp.asarray(leaf, jnp.float32) for leaf in leaves]
    return jnp.stack([jnp.stack([leaf.sum(), jnp.square(leaf).sum()]) for leaf in wide])
