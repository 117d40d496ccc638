"""Training on videos of any length: the exact gradient, with activations of one frame alone.

The loss sees what the *last* frame leaves of the queries. Of the frames before it, it sees the
tokens that are still in the memory; which ones these are is a discrete choice by scores that carry
no gradient. So the gradient of the whole streaming computation is that of its last step, provided
that the keys and values of the retained tokens are functions of the parameters there:

1. :func:`read_all_but_last` reads all frames but the last without a gradient, a chunk at a time
   (ViT, then Q-Former and memory), and keeps the ViT's feature of the token in every slot.
2. :func:`read_last` computes keys and values of those features anew and takes the last frame's
   step, with a gradient.

Nothing of phase one is stored for the backward pass: activation memory does not depend on the
number of frames. It is exact as long as the ViT is frozen. Dropout acts in phase two alone, so that
the choice of tokens is deterministic. Under policy ``merge`` the banks are constants, as in MA-LMM:
a mean over frames has no finite set of features that it could be computed from again.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.memory.slots import VideoMemory
from adacm2_jax.models.adacm2 import (
    AdaCM2,
    Question,
    StreamState,
    call,
    layers_alike,
    state_specs,
)
from adacm2_jax.models.params import replicated_parts
from adacm2_jax.sharding import ROWS, on_every_shard


class BeforeLast(struct.PyTreeNode):
    """What phase one leaves to phase two."""

    #: after all valid frames but the last.
    state: StreamState
    #: [L, B, S, V]: the ViT's feature of the token in each slot; [1, B, S, V] where all layers hold
    #: the same tokens; [0, B, 0, V] under policy merge.
    slots: jax.Array
    #: [B, P, V]: the features of the last valid frame.
    newest: jax.Array


def read_all_but_last(
    model: AdaCM2,
    params: dict,
    frames: jax.Array,
    valid: jax.Array,
    question: Question,
    state: StreamState,
    chunk: int,
) -> BeforeLast:
    """Phase one: reads all valid frames but the last of each video, ``chunk`` at a time.

    Args:
      model, params: of the step.
      frames: uint8[B, T, height, width, 3], or features [B, T, P, V].
      valid: bool[B, T].
      question: one a video.
      state: before the first frame.
      chunk: frames that pass through the networks together; less memory if it is small, and larger
        matrix products if it is not.

    Returns:
      What :func:`read_last` goes on from; it has no gradient.
    """
    params = jax.lax.stop_gradient(replicated_parts(params))
    specs = state_specs(state)
    slots: Any = PartitionSpec(None, "data")
    rows: Any = ROWS
    run = on_every_shard(
        lambda *arrays: _read_all_but_last(model, chunk, *arrays),
        len(valid),
        (PartitionSpec(), ROWS, ROWS, ROWS, specs),
        BeforeLast(specs, slots, rows),
    )
    return jax.lax.stop_gradient(run(params, frames, valid, question, state))


def read_last(
    model: AdaCM2,
    params: dict,
    before_last: BeforeLast,
    valid: jax.Array,
    question: Question,
    **options,
) -> StreamState:
    """Phase two: the step of the last valid frame, with its gradient.

    Args:
      model, params: of the step; ``params`` may be differentiated.
      before_last: of :func:`read_all_but_last`.
      valid: bool[B, T], of the clip; a video without a valid frame leaves the state as it is.
      question: one a video.
      options: for ``AdaCM2.read``: ``deterministic``, and ``rngs`` for dropout.
    """
    state = before_last.state
    if len(before_last.slots):
        state = call(model, params, "renew", state, before_last.slots)
    chunk = before_last.newest[:, None], valid.any(1, keepdims=True)
    return call(model, params, "read", *chunk, question, state, **options)


def _read_all_but_last(
    model: AdaCM2,
    chunk: int,
    params: dict,
    frames: jax.Array,
    valid: jax.Array,
    question: Question,
    state: StreamState,
) -> BeforeLast:
    """:func:`read_all_but_last` on the rows of one device."""
    count = valid.shape[1]
    last = jnp.max(jnp.where(valid, jnp.arange(count), -1), axis=1)
    before = valid & (jnp.arange(count) != last[:, None])

    def read(before_last: BeforeLast, start: jax.Array | int, size: int) -> BeforeLast:
        def part(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1)

        features = call(model, params, "encode_frames", part(frames))
        state = call(model, params, "read", features, part(before), question, before_last.state)
        here = (last >= start) & (last < start + size)
        place = jnp.clip(last - start, 0, size - 1)
        newest = jnp.take_along_axis(features, place[:, None, None, None], axis=1)[:, 0]
        return BeforeLast(
            state=state.replace(queries=before_last.state.queries),  # nobody reads these
            slots=_features_by_slot(before_last, features, part(before), state),
            newest=jnp.where(here[:, None, None], newest, before_last.newest),
        )

    before_last = _before_first(model, state)
    rest = count % chunk
    if rest:
        before_last = read(before_last, 0, rest)
    if count > rest:
        steps = jnp.arange(rest, count, chunk)
        before_last, _ = jax.lax.scan(
            lambda old, start: (read(old, start, chunk), None), before_last, steps
        )
    return before_last


def _before_first(model: AdaCM2, state: StreamState) -> BeforeLast:
    """Before the first frame."""
    c = model.config
    batch, width, dtype = len(state.frames_seen), c.vision.width, jnp.dtype(c.feature_dtype)
    layers, slots = 0, 0
    if c.memory.policy != "merge":
        layers, _, slots = cast(VideoMemory, state.memory).slots.shape
        layers = 1 if layers_alike(c) else layers
    return BeforeLast(
        state=state,
        slots=jnp.zeros((layers, batch, slots, width), dtype),
        newest=jnp.zeros((batch, c.vision.tokens_per_frame, width), dtype),
    )


def _features_by_slot(
    before_last: BeforeLast, features: jax.Array, valid: jax.Array, state: StreamState
) -> jax.Array:
    """The features by slot after a chunk: tokens do not move, so only new ones are written.

    Args:
      before_last: before the chunk.
      features: [B, F, P, V], of the chunk.
      valid: bool[B, F], the frames that were read.
      state: after it.
    """
    if not len(before_last.slots):
        return before_last.slots
    tokens = features.shape[2]
    # Where the n-th frame that was read stands in the chunk.
    places = jnp.argsort(~valid, axis=1, stable=True)
    flat = features.reshape(len(features), -1, features.shape[-1])
    seen = before_last.state.frames_seen[:, None]

    def layer(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        slots, frame, patch = inputs
        number = frame - seen
        place = jnp.take_along_axis(places, jnp.clip(number, 0, places.shape[1] - 1), axis=1)
        new = jnp.take_along_axis(flat, (place * tokens + patch)[..., None], axis=1)
        return jnp.where((number >= 0)[..., None], new, slots)

    memory = cast(VideoMemory, state.memory)
    layers = len(before_last.slots)
    return jax.lax.map(layer, (before_last.slots, memory.frame[:layers], memory.patch[:layers]))
