"""The cross-modality memory: a static-shape cache of visual tokens in each cross-attention layer.

This file is the method (AdaCM², arXiv 2411.12593, Sec. 3). For every frame, in every layer:

1. :func:`insert` the frame's P tokens, already projected to keys and values;
2. :func:`attend` to everything that is live, the new frame included (attend first, prune after);
3. :func:`retain` the newest tokens and those older ones that the queries attended to most.

:func:`read_frame` joins the three, :func:`read_frames` scans it over the frames of a chunk.

Keys and values are written once and never moved. A memory of capacity C for frames of P tokens has
``S = C + P`` slots, and one small permutation, ``slots``, says where each token is: its first
``length`` entries are the slots of the live tokens, oldest first, the others are free. A new frame
goes to the first P free slots; dropping a token means moving its slot number behind the live ones.
So a step writes P rows instead of copying C of them twice (concatenate, then gather), shapes never
change, and the time order is always at hand.

Axes: B videos, F frames of a chunk, P tokens a frame, H heads, D head width, N queries, S slots.
"""

import jax
import jax.numpy as jnp
from flax import struct

from adacm2_jax.memory.policies import ATTENTION, arrival_rank


class VideoMemory(struct.PyTreeNode):
    """What one cross-attention layer remembers of B videos.

    In a Q-Former the leaves are stacked over its L cross-attention layers: ``[L, B, …]``.
    """

    #: [B, H, S, D]: projected keys, by slot.
    key: jax.Array
    #: [B, H, S, D]: projected values, by slot.
    value: jax.Array
    #: float32[B, S]: what the token was ranked by after the last frame, by slot.
    score: jax.Array
    #: int32[B, S]: the frame that the token comes from, by slot.
    frame: jax.Array
    #: int32[B, S]: its place in that frame: 0 is CLS, then the patches row by row; by slot.
    patch: jax.Array
    #: int32[B, S]: a permutation of the slots: the live ones, oldest token first, then the free.
    slots: jax.Array
    #: int32[B]: how many tokens are live.
    length: jax.Array


class Retention(struct.PyTreeNode):
    """One layer's counts: a row of ``policies.RetentionPlan``, ready to be scanned over layers."""

    #: int32[C + P + 1]: newest tokens kept whole, indexed by the number of live tokens.
    recent: jax.Array
    #: int32[C + P + 1]: older tokens kept by rank, likewise.
    older: jax.Array
    #: uint32[B]: the videos' seeds in this layer, for the random policy.
    seed: jax.Array
    #: The most older tokens kept at any length.
    max_older: int = struct.field(pytree_node=False)
    #: ``attention``, ``stride`` or ``random``; see policies.py.
    ranking: str = struct.field(pytree_node=False)

    @property
    def reads_attention(self) -> bool:
        """Whether what is kept depends on attention at all."""
        return self.ranking == ATTENTION and self.max_older > 0


def init_memory(
    batch: int, num_heads: int, head_dim: int, capacity: int, tokens_per_frame: int, dtype
) -> VideoMemory:
    """An empty memory of one layer."""
    slots = capacity + tokens_per_frame
    buffer = jnp.zeros((batch, num_heads, slots, head_dim), dtype)
    numbers = jnp.zeros((batch, slots), jnp.int32)
    return VideoMemory(
        key=buffer,
        value=buffer,
        score=jnp.zeros((batch, slots), jnp.float32),
        frame=numbers,
        patch=numbers,
        slots=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)),
        length=jnp.zeros((batch,), jnp.int32),
    )


def insert(
    memory: VideoMemory,
    key: jax.Array,
    value: jax.Array,
    frame: jax.Array,
    valid: jax.Array,
    score: jax.Array,
) -> VideoMemory:
    """Writes a frame into the first free slots. ``length`` still counts the tokens before it.

    Args:
      memory: of one layer.
      key: [B, H, P, D], the frame's keys.
      value: [B, H, P, D], its values.
      frame: int32[B], its number in each video.
      valid: bool[B]; where false the frame is padding and nothing is written.
      score: float32[B, P], rank on arrival (zeros if the ranking is by attention).
    """
    tokens, total = key.shape[2], memory.slots.shape[1]
    patch = jnp.arange(tokens, dtype=jnp.int32)
    free = jnp.take_along_axis(memory.slots, memory.length[:, None] + patch, axis=1)
    free = jnp.where(valid[:, None], free, total + patch)  # out of range: not written

    def put(buffer, slot, new):
        return buffer.at[..., slot, :].set(new, mode="drop", unique_indices=True)

    def put_scalars(buffer, slot, new):
        return buffer.at[slot].set(new, mode="drop", unique_indices=True)

    return memory.replace(
        key=jax.vmap(put)(memory.key, free, key),
        value=jax.vmap(put)(memory.value, free, value),
        score=jax.vmap(put_scalars)(memory.score, free, score),
        frame=jax.vmap(put_scalars)(
            memory.frame, free, jnp.broadcast_to(frame[:, None], free.shape)
        ),
        patch=jax.vmap(put_scalars)(memory.patch, free, jnp.broadcast_to(patch, free.shape)),
    )


def attention_probs(query: jax.Array, memory: VideoMemory, live: jax.Array) -> jax.Array:
    """Softmax over the live slots, in float32.

    Args:
      query: [B, H, N, D].
      memory: of one layer.
      live: bool[B, S].

    Returns:
      float32[B, H, N, S], zero where a slot is not live.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bhnd,bhsd->bhns", query, memory.key, preferred_element_type=wide)
    logits = logits * query.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(live[:, None, None], logits, jnp.finfo(wide).min))


def live_slots(memory: VideoMemory, count: jax.Array) -> jax.Array:
    """bool[B, S]: the slots of the ``count`` (int32[B]) first tokens in time order."""
    first = jnp.arange(memory.slots.shape[1]) < count[:, None]
    return jax.vmap(lambda slots, flag: jnp.zeros_like(flag).at[slots].set(flag))(
        memory.slots, first
    )


def retain(
    memory: VideoMemory, count: jax.Array, retention: Retention, valid: jax.Array
) -> VideoMemory:
    """Keeps the newest tokens and the older ones that rank highest; frees all other slots.

    Of equal scores the older token stays (``lax.top_k`` takes the lowest index, and the scores are
    put in time order first).

    Args:
      memory: of one layer, with ``score`` up to date.
      count: int32[B], live tokens, the current frame included.
      retention: the layer's counts.
      valid: bool[B]; where false the frame is padding and nothing changes.
    """
    total = memory.slots.shape[1]
    order = jnp.arange(total)
    recent, older = retention.recent[count], retention.older[count]
    first_recent = (count - recent)[:, None]
    keep = (order >= first_recent) & (order < count[:, None])
    if retention.max_older:
        score = jnp.take_along_axis(memory.score, memory.slots, axis=1)
        score = jnp.where(order < first_recent, score, jnp.finfo(jnp.float32).min)
        best = jax.lax.top_k(score, retention.max_older)[1]
        among = jnp.arange(retention.max_older) < older[:, None]
        keep = jax.vmap(lambda keep, best, among: keep.at[best].max(among))(keep, best, among)

    length = recent + older
    behind = length[:, None] + jnp.cumsum(~keep, axis=1) - 1
    place = jnp.where(keep, jnp.cumsum(keep, axis=1) - 1, behind)
    slots = jax.vmap(lambda slots, place: jnp.zeros_like(slots).at[place].set(slots))(
        memory.slots, place
    )
    return memory.replace(
        slots=jnp.where(valid[:, None], slots, memory.slots),
        length=jnp.where(valid, length, memory.length),
    )


def read_frame(
    memory: VideoMemory,
    retention: Retention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    frame: jax.Array,
    valid: jax.Array,
    *,
    score_query: jax.Array | None = None,
    score_mask: jax.Array | None = None,
    score_output_rows: bool = True,
    dropout=None,
) -> tuple[jax.Array, VideoMemory]:
    """One frame in one cross-attention layer: insert, attend and score, retain.

    Args:
      memory: the layer's memory before the frame.
      retention: the layer's counts.
      query: [B, H, N, D], the rows whose output is wanted.
      key: [B, H, P, D], the frame's keys.
      value: [B, H, P, D], its values.
      frame: int32[B], the frame's number in each video.
      valid: bool[B]; a padded frame leaves the memory bit-identical.
      score_query: [B, H, R, D], further rows that score tokens but have no output (text rows).
      score_mask: bool[B, R], which of those rows are real.
      score_output_rows: whether the rows of ``query`` score too; they always do where no row of
        ``score_query`` is real.
      dropout: None, or a function of the probabilities (training); scores never see it.

    Returns:
      The attended values [B, H, N, D] (of no meaning where the frame is padding), and the memory.
    """
    memory, count = _arrive(memory, retention, key, value, frame, valid)
    live = live_slots(memory, count)
    probs = attention_probs(query, memory, live)
    if retention.ranking == ATTENTION:
        score = probs.sum((1, 2))
        if score_query is not None and score_mask is not None:
            text = attention_probs(score_query, memory, live)
            text = jnp.einsum("bhrs,br->bs", text, score_mask.astype(text.dtype))
            # Where nothing is asked no text row can score: the query rows do.
            counts = score_output_rows | ~score_mask.any(1, keepdims=True)
            score = text + jnp.where(counts, score, 0)
        score = jax.lax.stop_gradient(score).astype(memory.score.dtype)
        memory = memory.replace(score=jnp.where(valid[:, None], score, memory.score))
    if dropout is not None:
        probs = dropout(probs)
    output = jnp.einsum("bhns,bhsd->bhnd", probs.astype(value.dtype), memory.value)
    return output, retain(memory, count, retention, valid)


def read_frames(
    memory: VideoMemory,
    retention: Retention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    frame: jax.Array,
    valid: jax.Array,
    *,
    score_query: jax.Array | None = None,
    score_mask: jax.Array | None = None,
    score_output_rows: bool = True,
    dropout=None,
) -> tuple[jax.Array, VideoMemory]:
    """:func:`read_frame` for the frames of a chunk, one after the other, by ``lax.scan``.

    The arguments are those of :func:`read_frame` with a leading frame axis F on ``query``, ``key``,
    ``value``, ``frame``, ``valid`` and ``score_query``; ``dropout`` also takes the frame's place in
    the chunk. Returns the attended values [F, B, H, N, D] and the memory after the last frame.
    """

    def step(memory, inputs):
        index, query, key, value, frame, valid, score_query = inputs
        output, memory = read_frame(
            memory,
            retention,
            query,
            key,
            value,
            frame,
            valid,
            score_query=score_query,
            score_mask=score_mask,
            score_output_rows=score_output_rows,
            dropout=None if dropout is None else lambda probs: dropout(probs, index),
        )
        return memory, output

    index = jnp.arange(query.shape[0])
    memory, output = jax.lax.scan(
        step, memory, (index, query, key, value, frame, valid, score_query)
    )
    return output, memory


def store_frames(
    memory: VideoMemory,
    retention: Retention,
    key: jax.Array,
    value: jax.Array,
    frame: jax.Array,
    valid: jax.Array,
) -> VideoMemory:
    """:func:`read_frames` where nobody wants the output and the policy reads no attention.

    Leaves the same tokens in the memory, without a query. The arguments are those of
    :func:`read_frames`; raises ``ValueError`` if ``retention.reads_attention``.
    """
    if retention.reads_attention:
        raise ValueError("this policy keeps tokens by attention: queries must read its frames")

    def step(memory, inputs):
        memory, count = _arrive(memory, retention, *inputs)
        return retain(memory, count, retention, inputs[-1]), None

    return jax.lax.scan(step, memory, (key, value, frame, valid))[0]


def _arrive(
    memory: VideoMemory,
    retention: Retention,
    key: jax.Array,
    value: jax.Array,
    frame: jax.Array,
    valid: jax.Array,
) -> tuple[VideoMemory, jax.Array]:
    """A frame comes in: the memory that holds it, and the live tokens, int32[B]."""
    tokens = key.shape[2]
    if retention.ranking == ATTENTION:
        score = jnp.zeros((key.shape[0], tokens), jnp.float32)
    else:
        score = arrival_rank(retention.ranking, frame, tokens, retention.seed)
    return insert(memory, key, value, frame, valid, score), memory.length + tokens


def in_time_order(memory: VideoMemory) -> dict[str, jax.Array]:
    """Which part of the video is remembered: the live tokens, oldest first.

    Works on the memory of one layer or on the stacked memory of a whole Q-Former.

    Returns:
      ``frame`` and ``patch`` (int32[…, B, S], -1 behind the live tokens), ``score`` (float32[…, B,
      S], zero there) and ``live`` (bool[…, B, S]).
    """
    live = jnp.arange(memory.slots.shape[-1]) < memory.length[..., None]

    def ordered(values, empty):
        return jnp.where(live, jnp.take_along_axis(values, memory.slots, axis=-1), empty)

    return dict(
        frame=ordered(memory.frame, -1),
        patch=ordered(memory.patch, -1),
        score=ordered(memory.score, 0.0),
        live=live,
    )
