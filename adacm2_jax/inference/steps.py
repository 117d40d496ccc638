"""The two compiled steps that read a video, on one device or on a mesh of them.

Every device reads its own videos (:func:`~adacm2_jax.sharding.on_every_shard`); where the videos do
not divide over the mesh axis ``data``, all devices read all of them.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, call, state_specs
from adacm2_jax.models.params import replicated_parts
from adacm2_jax.sharding import ROWS, on_every_shard


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
        len(valid),
        (PartitionSpec(), ROWS, ROWS, ROWS, specs),
        specs,
    )
    return run(replicated_parts(params), features, valid, question, state)
