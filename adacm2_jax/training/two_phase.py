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

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.models import before_last
from adacm2_jax.models.adacm2 import AdaCM2, Question, StreamState, call, state_specs
from adacm2_jax.models.before_last import BeforeLast, before_first
from adacm2_jax.models.params import replicated_parts
from adacm2_jax.sharding import ROWS, on_every_shard


class Renewable(struct.PyTreeNode):
    """What phase one leaves to phase two."""

    #: the last valid frame of each video.
    before: BeforeLast
    #: [L, B, S, V]: the ViT's feature of the token in each slot; [1, B, S, V] where all layers hold
    #: the same tokens; [0, B, 0, V] where the memory is not made of tokens (policy merge).
    slots: jax.Array


def read_all_but_last(
    model: AdaCM2,
    params: dict,
    frames: jax.Array,
    valid: jax.Array,
    question: Question,
    state: StreamState,
    chunk: int,
) -> Renewable:
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
    rows: Any = ROWS
    slots: Any = PartitionSpec(None, "data")
    run = on_every_shard(
        lambda *arrays: _read_all_but_last(model, chunk, *arrays),
        len(valid),
        (PartitionSpec(), ROWS, ROWS, ROWS, specs),
        Renewable(BeforeLast(specs, rows, rows), slots),
    )
    return jax.lax.stop_gradient(run(params, frames, valid, question, state))


def read_last(
    model: AdaCM2,
    params: dict,
    renewable: Renewable,
    question: Question,
    renew: bool = True,
    **options,
) -> StreamState:
    """Phase two: the step of the last valid frame, with its gradient.

    Args:
      model, params: of the step; ``params`` may be differentiated.
      renewable: of :func:`read_all_but_last`.
      question: one a video.
      renew: compute keys and values anew; if not, the memory is a constant.
      options: for ``AdaCM2.read``: ``deterministic``, and ``rngs`` for dropout.
    """
    before = renewable.before
    if renew:
        state = call(model, params, "renew", before.state, renewable.slots)
        before = before.replace(state=state)
    return before_last.read_last(model, params, before, question, **options)


def _read_all_but_last(
    model: AdaCM2,
    chunk: int,
    params: dict,
    frames: jax.Array,
    valid: jax.Array,
    question: Question,
    state: StreamState,
) -> Renewable:
    """:func:`read_all_but_last` on the rows of one device."""
    count = valid.shape[1]
    last = jnp.max(jnp.where(valid, jnp.arange(count), -1), axis=1)
    earlier = valid & (jnp.arange(count) != last[:, None])

    def read(old: Renewable, start: jax.Array | int, size: int) -> Renewable:
        def part(leaf):
            return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=1)

        before = old.before
        features = call(model, params, "encode_frames", part(frames))
        state = call(model, params, "read", features, part(earlier), question, before.state)
        here = (last >= start) & (last < start + size)
        place = jnp.clip(last - start, 0, size - 1)
        newest = jnp.take_along_axis(features, place[:, None, None, None], axis=1)[:, 0]
        return Renewable(
            before=BeforeLast(
                state=state.replace(queries=before.state.queries),  # nobody reads these
                newest=jnp.where(here[:, None, None], newest, before.newest),
                held=before.held,
            ),
            slots=_features_by_slot(model, old, features, part(earlier), state),
        )

    before = before_first(model.config, state).replace(held=valid.any(1))
    sources, _ = state.memory.sources(model.config)
    width = before.newest.shape[-1]
    found = Renewable(before, jnp.zeros((*sources.shape, width), before.newest.dtype))
    rest = count % chunk
    if rest:
        found = read(found, 0, rest)
    if count > rest:
        steps = jnp.arange(rest, count, chunk)
        found, _ = jax.lax.scan(lambda old, start: (read(old, start, chunk), None), found, steps)
    return found


def _features_by_slot(
    model: AdaCM2, old: Renewable, features: jax.Array, valid: jax.Array, state: StreamState
) -> jax.Array:
    """The features by slot after a chunk: tokens do not move, so only new ones are written.

    Args:
      model: of the step.
      old: before the chunk.
      features: [B, F, P, V], of the chunk.
      valid: bool[B, F], the frames that were read.
      state: after it.
    """
    if not len(old.slots):
        return old.slots
    tokens = features.shape[2]
    # Where the n-th frame that was read stands in the chunk.
    places = jnp.argsort(~valid, axis=1, stable=True)
    flat = features.reshape(len(features), -1, features.shape[-1])
    seen = old.before.state.frames_seen[:, None]

    def layer(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        slots, frame, patch = inputs
        number = frame - seen
        place = jnp.take_along_axis(places, jnp.clip(number, 0, places.shape[1] - 1), axis=1)
        new = jnp.take_along_axis(flat, (place * tokens + patch)[..., None], axis=1)
        return jnp.where((number >= 0)[..., None], new, slots)

    return jax.lax.map(layer, (old.slots, *state.memory.sources(model.config)))
