"""The cross-modality memory: a static-shape cache of visual tokens in each cross-attention layer.

This file is the method (AdaCM², arXiv 2411.12593, Sec. 3). For every frame, in every layer:

1. :func:`insert` the frame's P tokens, already projected to keys and values;
2. :func:`attend` to everything that is live, the new frame included (attend first, prune after);
3. :func:`retain` the newest tokens and those older ones that the queries attended to most.

:func:`read_frame` joins the three, :func:`read_frames` scans it over the frames of a chunk. Where
all layers are to keep the same tokens, :func:`retain_together` takes the place of the third.

Keys and values are written once and never moved. A memory of capacity C for frames of P tokens has
``S = C + P`` slots, and one small permutation, ``slots``, says where each token is: its first
``length`` entries are the slots of the live tokens, oldest first, the others are free. A new frame
goes to the first P free slots; dropping a token means moving its slot number behind the live ones.
So a step writes P rows instead of copying C of them twice (concatenate, then gather), shapes never
change, and the time order is always at hand.

Axes: B videos, F frames of a chunk, P tokens a frame, H heads, D head width, N queries, R text
rows, S slots, L cross-attention layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.memory.policies import ATTENTION, arrival_rank, layers_alike, plan_for


class VideoMemory(struct.PyTreeNode):
    """What one cross-attention layer remembers of B videos.

    In a Q-Former the leaves are stacked over its L cross-attention layers: ``[L, B, …]``. That is
    the memory of every policy but ``merge``, whose ``banks.BankMemory`` has the same methods.
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

    @staticmethod
    def check(config: AdaCM2Config) -> None:
        """Raises ``UserError`` if the memory has no bound or does not fit the model."""
        plan_for(config)

    @classmethod
    def empty(cls, config: AdaCM2Config, batch: int) -> "VideoMemory":
        """Of all layers, before the first frame of B = ``batch`` videos."""
        q, tokens = config.qformer, config.vision.tokens_per_frame
        head_dim, dtype = q.width // q.num_heads, jnp.dtype(config.memory_dtype)
        layer = init_memory(batch, q.num_heads, head_dim, plan_for(config).capacity, tokens, dtype)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (q.num_cross_layers,) + leaf.shape), layer
        )

    def specs(self) -> Any:
        """A ``PartitionSpec`` for every leaf of all layers: divided over ``data``, by videos."""
        return jax.tree.map(lambda _: PartitionSpec(None, "data"), self)

    @property
    def tokens_kept(self) -> jax.Array:
        """int32[B]: how many tokens the layer holds that holds most."""
        return self.length.reshape(-1, self.length.shape[-1]).max(0)

    def sources(self, config: AdaCM2Config) -> tuple[jax.Array, jax.Array]:
        """Where the token in each slot comes from: its frame and its place there.

        Args:
          config: the model.

        Returns:
          Twice int32[L, B, S], of no meaning in slots that are free; [1, B, S] where all layers
          hold the same tokens.
        """
        layers = 1 if layers_alike(config) else len(self.slots)
        return self.frame[:layers], self.patch[:layers]

    def in_time_order(self) -> dict[str, jax.Array]:
        """Which part of the video is remembered: the live tokens, oldest first.

        Works on the memory of one layer or on the stacked memory of a whole Q-Former.

        Returns:
          ``frame`` and ``patch`` (int32[…, B, S], -1 behind the live tokens), ``score``
          (float32[…, B, S], zero there) and ``live`` (bool[…, B, S]).
        """
        live = jnp.arange(self.slots.shape[-1]) < self.length[..., None]

        def ordered(values, empty):
            return jnp.where(live, jnp.take_along_axis(values, self.slots, axis=-1), empty)

        return dict(
            frame=ordered(self.frame, -1),
            patch=ordered(self.patch, -1),
            score=ordered(self.score, 0.0),
            live=live,
        )


class Frames(struct.PyTreeNode):
    """Frames as a memory takes them in: projected once, whatever the question.

    The axes are those of one frame in one layer. A chunk has F in front of all of them, and a
    chunk for all layers L in front of that on keys and values.
    """

    #: [B, H, P, D]: keys.
    key: jax.Array
    #: [B, H, P, D]: values.
    value: jax.Array
    #: int32[B]: the number of the frame in its video.
    index: jax.Array
    #: bool[B]: false where the frame is padding.
    valid: jax.Array

    def only(self, place: jax.Array) -> "Frames":
        """Of a chunk for all layers the one frame at int32[B] ``place`` of each video: F = 1."""

        def pick(leaf, axis):
            rows = place.reshape((1,) * (axis + 1) + (-1,) + (1,) * (leaf.ndim - axis - 2))
            return jnp.take_along_axis(leaf, rows, axis=axis)

        return Frames(
            pick(self.key, 1), pick(self.value, 1), pick(self.index, 0), pick(self.valid, 0)
        )


class Queries(struct.PyTreeNode):
    """The rows that read a frame, and those of them that score its tokens.

    ``rows`` and ``text`` have F in front where a chunk is read.
    """

    #: [B, H, N, D]: the rows whose output is wanted.
    rows: jax.Array
    #: [B, H, R, D]: further rows that score tokens but have no output; or None.
    text: jax.Array | None = None
    #: bool[B, R]: which of those are real.
    text_mask: jax.Array | None = None
    #: Whether ``rows`` score too; they always do where no row of ``text`` is real.
    rows_score: bool = struct.field(pytree_node=False, default=True)


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
    #: The share of novelty in a rank by attention.
    novelty: float = struct.field(pytree_node=False, default=0.0)
    #: The share of a token's score before in its score now.
    decay: float = struct.field(pytree_node=False, default=0.0)
    #: Whether all layers keep the same tokens: :func:`retain_together` drops the others.
    shared: bool = struct.field(pytree_node=False, default=False)

    @property
    def reads_attention(self) -> bool:
        """Whether what is kept depends on attention at all."""
        return self.ranking == ATTENTION and self.max_older > 0 and self.novelty < 1


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


def insert(memory: VideoMemory, frame: Frames, score: jax.Array) -> VideoMemory:
    """Writes a frame into the first free slots. ``length`` still counts the tokens before it.

    Args:
      memory: of one layer.
      frame: as this layer projects it; nothing is written where it is padding.
      score: float32[B, P], rank on arrival (zeros if the ranking is by attention).
    """
    tokens, total = frame.key.shape[2], memory.slots.shape[1]
    patch = jnp.arange(tokens, dtype=jnp.int32)
    free = jnp.take_along_axis(memory.slots, memory.length[:, None] + patch, axis=1)
    free = jnp.where(frame.valid[:, None], free, total + patch)  # out of range: not written

    def put(buffer, slot, new):
        return buffer.at[..., slot, :].set(new, mode="drop", unique_indices=True)

    def put_scalars(buffer, slot, new):
        return buffer.at[slot].set(new, mode="drop", unique_indices=True)

    return memory.replace(
        key=jax.vmap(put)(memory.key, free, frame.key),
        value=jax.vmap(put)(memory.value, free, frame.value),
        score=jax.vmap(put_scalars)(memory.score, free, score),
        frame=jax.vmap(put_scalars)(
            memory.frame, free, jnp.broadcast_to(frame.index[:, None], free.shape)
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


def novelty(memory: VideoMemory) -> jax.Array:
    """How unlike the older tokens of its layer each live one is.

    Half the cosine distance of its key to the second nearest of theirs, float32[B, S] by slot, in
    [0, 1]; 1 for the two oldest, of no meaning in slots that are free. Of many alike the two oldest
    are new and the others are not, so a rank by novelty keeps two of each kind: an answer should
    not hang on a single token.
    """
    batch, heads, total, width = memory.key.shape
    key = memory.key.swapaxes(1, 2).reshape(batch, total, heads * width)
    key = jnp.take_along_axis(key, memory.slots[..., None], axis=1)
    key = jax.lax.stop_gradient(key).astype(jnp.promote_types(key.dtype, jnp.float32))
    length = jnp.linalg.norm(key, axis=-1, keepdims=True)
    key = key / jnp.maximum(length, jnp.finfo(key.dtype).tiny)
    likeness = jnp.einsum("bse,bte->bst", key, key)
    older = jnp.arange(total)[:, None] > jnp.arange(total)  # in time order the live ones are first
    likeness = jnp.where(older, likeness, -1.0)
    # Not top_k, which sorts on a CPU: twenty times slower.
    nearest = jnp.argmax(likeness, axis=-1, keepdims=True)
    second = jnp.where(jnp.arange(total) == nearest, -1.0, likeness).max(-1)
    distance = ((1 - second) / 2).astype(memory.score.dtype)
    return jax.vmap(lambda slots, value: jnp.zeros_like(value).at[slots].set(value))(
        memory.slots, distance
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
    frame: Frames,
    queries: Queries,
    dropout: Callable | None = None,
) -> tuple[jax.Array, VideoMemory]:
    """One frame in one cross-attention layer: insert, attend and score, retain.

    Args:
      memory: the layer's memory before the frame.
      retention: the layer's counts.
      frame: as this layer projects it; a padded one leaves the memory bit-identical.
      queries: as this layer projects them.
      dropout: None, or a function of the probabilities (training); scores never see it.

    Returns:
      The attended values [B, H, N, D] (of no meaning where the frame is padding), and the memory.
    """
    memory, count = _arrive(memory, retention, frame)
    live = live_slots(memory, count)
    probs = attention_probs(queries.rows, memory, live)
    if retention.ranking == ATTENTION and retention.novelty < 1:
        score = probs.sum((1, 2))
        if queries.text is not None and queries.text_mask is not None:
            text = attention_probs(queries.text, memory, live)
            text = jnp.einsum("bhrs,br->bs", text, queries.text_mask.astype(text.dtype))
            # Where nothing is asked no text row can score: the query rows do.
            counts = queries.rows_score | ~queries.text_mask.any(1, keepdims=True)
            score = text + jnp.where(counts, score, 0)
        if retention.novelty:
            score = score / jnp.max(score, axis=1, keepdims=True)  # both in [0, 1]
            score = (1 - retention.novelty) * score + retention.novelty * novelty(memory)
        score = jax.lax.stop_gradient(score).astype(memory.score.dtype)
        if retention.decay:  # a token that has just come has its first score
            running = (1 - retention.decay) * score + retention.decay * memory.score
            score = jnp.where(memory.frame == frame.index[:, None], score, running)
        memory = memory.replace(score=jnp.where(frame.valid[:, None], score, memory.score))
    if dropout is not None:
        probs = dropout(probs)
    output = jnp.einsum("bhns,bhsd->bhnd", probs.astype(frame.value.dtype), memory.value)
    if retention.shared:
        return output, memory
    return output, retain(memory, count, retention, frame.valid)


def retain_together(
    memory: VideoMemory, retention: Retention, tokens: int, valid: jax.Array
) -> VideoMemory:
    """Keeps the same tokens in all layers: the newest, and the older ones by their mean score.

    Args:
      memory: of all layers, which have read a frame; all hold the same tokens in the same slots.
      retention: the counts of all layers, which are the same.
      tokens: P, of the frame.
      valid: bool[B]; where false the frame is padding and nothing changes.
    """
    mean = jnp.broadcast_to(memory.score.mean(0), memory.score.shape)
    memory = memory.replace(score=jnp.where(valid[:, None], mean, memory.score))
    return jax.vmap(lambda layer, counts: retain(layer, layer.length + tokens, counts, valid))(
        memory, retention
    )


def read_frames(
    memory: VideoMemory,
    retention: Retention,
    frames: Frames,
    queries: Queries,
    dropout: Callable | None = None,
) -> tuple[jax.Array, VideoMemory]:
    """:func:`read_frame` for the frames of a chunk, one after the other, by ``lax.scan``.

    The arguments are those of :func:`read_frame` with a leading frame axis F on the frames, the
    rows and the text; ``dropout`` also takes the frame's place in the chunk. Returns the attended
    values [F, B, H, N, D] and the memory after the last frame.
    """

    def step(memory, inputs):
        index, rows, frame, text = inputs
        output, memory = read_frame(
            memory,
            retention,
            frame,
            queries.replace(rows=rows, text=text),
            dropout=None if dropout is None else lambda probs: dropout(probs, index),
        )
        return memory, output

    index = jnp.arange(len(queries.rows))
    memory, output = jax.lax.scan(step, memory, (index, queries.rows, frames, queries.text))
    return output, memory


def store_frames(memory: VideoMemory, retention: Retention, frames: Frames) -> VideoMemory:
    """:func:`read_frames` where nobody wants the output and the policy reads no attention.

    Leaves the same tokens in the memory, without a query. Raises ``ValueError`` if
    ``retention.reads_attention``.
    """
    if retention.reads_attention:
        raise ValueError("this policy keeps tokens by attention: queries must read its frames")

    def step(memory, frame):
        memory, count = _arrive(memory, retention, frame)
        return retain(memory, count, retention, frame.valid), None

    return jax.lax.scan(step, memory, frames)[0]


def _arrive(
    memory: VideoMemory, retention: Retention, frame: Frames
) -> tuple[VideoMemory, jax.Array]:
    """A frame comes in: the memory that holds it, ranked by all but attention, and the live tokens,
    int32[B]."""
    batch, _, tokens, _ = frame.key.shape
    count = memory.length + tokens
    if retention.ranking != ATTENTION:
        rank = arrival_rank(retention.ranking, frame.index, tokens, retention.seed)
        return insert(memory, frame, rank), count
    memory = insert(memory, frame, jnp.zeros((batch, tokens), jnp.float32))
    if retention.novelty == 1:
        score = jnp.where(frame.valid[:, None], novelty(memory), memory.score)
        memory = memory.replace(score=score)
    return memory, count
