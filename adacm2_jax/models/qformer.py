"""InstructBLIP's Q-Former, reading a video through the memory.

BERT-base with a joint, bidirectional self-attention over learned queries and text, cross-attention
from the query rows to the video in every second layer, and separate feed-forward branches for query
and text rows (lavis/models/blip2_models/Qformer.py; post-norm, epsilon 1e-12, exact GELU).

The queries restart at every frame and a layer's memory depends on that layer alone, so the loops
may be swapped: a chunk of F frames goes through layer 0, then through layer 1, and so on. Within a
layer everything is computed for all F frames at once, in large matrix products; only the memory is
scanned frame by frame. The result is that of one frame after the other. (Where all layers keep the
same tokens, ``memory.shared_choice``, nothing can be swapped: frames do come one after the other.)

Axes: B videos, F frames of a chunk, N queries, R text tokens, E width, H heads, D head width,
P visual tokens a frame, V vision width, L cross-attention layers.
"""

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from adacm2_jax.config import MemoryConfig, QFormerConfig
from adacm2_jax.memory import fused
from adacm2_jax.memory.policies import retention_plan
from adacm2_jax.memory.slots import (
    Frames,
    Queries,
    Retention,
    VideoMemory,
    retain_together,
    store_frames,
)
from adacm2_jax.models.layers import (
    ZEROS,
    Dense,
    LayerNorm,
    Mlp,
    attention,
    embedding,
    fan_in,
    one_by_one,
    param,
    rematerialised,
)


class Chunk(struct.PyTreeNode):
    """A chunk of frames as a Q-Former of either kind reads it.

    Row b of question and memory belongs to video b // k: k questions share a video's tokens.
    """

    #: [B / k, F, P, V]: visual tokens, with the temporal embedding.
    tokens: jax.Array
    #: int32[B, F]: the number of each frame in its video.
    index: jax.Array
    #: bool[B, F]: false where the frame is padding.
    valid: jax.Array
    #: int32[B]: the place of the last frame that is none (0 where all are).
    last: jax.Array


def store(memory: VideoMemory, retention: Retention, frames: Frames) -> VideoMemory:
    """Reads a chunk into the memory of all layers without a query; see ``slots.store_frames``."""

    def layer(memory, inputs):
        place, retention, key, value = inputs
        take, put = jax.lax.dynamic_index_in_dim, jax.lax.dynamic_update_index_in_dim
        own = jax.tree.map(lambda leaf: take(leaf, place, keepdims=False), memory)
        own = store_frames(own, retention, frames.replace(key=key, value=value))
        return jax.tree.map(lambda leaf, new: put(leaf, new, place, 0), memory, own), None

    # Carried and not mapped: a loop's carry is changed where it lies.
    places = jnp.arange(len(memory.length))
    return jax.lax.scan(layer, memory, (places, retention, frames.key, frames.value))[0]


class FrameProjection(nn.Module):
    """The keys and values of a chunk for all L layers."""

    config: QFormerConfig
    vision_width: int

    def setup(self):
        c = self.config
        shape = (c.num_cross_layers, self.vision_width, c.num_heads, c.width // c.num_heads)
        axes = ("layers", "vision", "heads", "head_dim")

        def declare(name):
            kernel = param(self, f"{name}_kernel", fan_in(stacked=True), shape, axes)
            bias = param(self, f"{name}_bias", ZEROS, shape[:1] + shape[2:], axes[:1] + axes[2:])
            return kernel, bias

        self.to_key, self.to_value = declare("key"), declare("value")

    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, F, P, V] → twice [L, F, B, H, P, D]."""

        def layer(weights):
            return project_frames(features, weights).transpose(1, 0, 3, 2, 4)

        # Layer by layer: a product over all layers at once would have its weights transposed.
        return jax.lax.map(layer, self.to_key), jax.lax.map(layer, self.to_value)

    def by_slot(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens that a layer holds, [L, B, S, V] → twice [L, B, H, S, D].

        Where axis 0 is 1 all layers hold the same ones.
        """

        def project(weights):
            if len(tokens) == 1:
                return jax.lax.map(lambda w: project_frames(tokens[0], w), weights)
            return jax.lax.map(lambda pair: project_frames(*pair), (tokens, weights))

        key, value = project(self.to_key), project(self.to_value)
        return key.swapaxes(2, 3), value.swapaxes(2, 3)

    def weights(self) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """The kernel [L, V, H, D] and bias [L, H, D] of the keys, and those of the values."""
        return self.to_key, self.to_value


def project_frames(features: jax.Array, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Keys or values of one layer, [… , V] → [… , H, D], by its kernel and bias."""
    kernel, bias = (weight.astype(features.dtype) for weight in weights)
    return jnp.tensordot(features, kernel, 1) + bias


def attention_output(
    config: QFormerConfig, dropout: nn.Dropout, rows: jax.Array, attended: jax.Array
) -> jax.Array:
    """How every attention ends: [… , H, D] → [… , E], dropout, residual ``rows`` and norm.

    The parameters belong to the module that calls it.
    """
    shape = (config.num_heads, config.width // config.num_heads, config.width)
    y = Dense(shape, ("heads", "head_dim", "embed"), num_inputs=2, name="out")(attended)
    return LayerNorm(config.layer_norm_eps, "embed", name="norm")(rows + dropout(y))


class SelfAttention(nn.Module):
    config: QFormerConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, context: jax.Array | None = None
    ) -> jax.Array:
        """Joint attention over [B·F, N + R, E] with its output projection, residual and norm.

        The rows attend to each other, or to ``context`` [B·F, K, E] where that is given.
        """
        c = self.config
        shape = (c.width, c.num_heads, c.width // c.num_heads)
        axes = ("embed", "heads", "head_dim")
        context = x if context is None else context
        query = Dense(shape, axes, name="query")(x)
        key, value = (Dense(shape, axes, name=n)(context) for n in ("key", "value"))
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        y = attention(query, key, value, mask, dropout)
        return attention_output(c, dropout, x, y)


class CrossAttention(nn.Module):
    config: QFormerConfig
    score_rows: str
    deterministic: bool
    fused_memory: bool = False
    layer: int | None = None

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        frames: Frames,
        memory: VideoMemory,
        retention: Retention,
    ) -> tuple[jax.Array, VideoMemory]:
        """Query rows [B, F, N, E] read one layer's memory; text rows [B, F, R, E] may score.

        ``frames``, ``memory`` and ``retention`` are that layer's, or all layers' and it is
        ``layer`` of them, whose memory is changed.
        """
        c = self.config
        shape = (c.width, c.num_heads, c.width // c.num_heads)
        axes = ("embed", "heads", "head_dim")
        project = Dense(shape, axes, name="query")
        rate = 0.0 if self.deterministic else c.dropout
        dropout = None
        if rate:
            rng = self.make_rng("dropout")

            def dropout(probs, frame):
                kept = jax.random.bernoulli(jax.random.fold_in(rng, frame), 1 - rate, probs.shape)
                return jnp.where(kept, probs / (1 - rate), 0)

        with_text = self.score_rows != "query"
        rows = Queries(
            rows=project(queries).transpose(1, 0, 3, 2, 4),
            text=project(text).transpose(1, 0, 3, 2, 4) if with_text else None,
            text_mask=text_mask,
            rows_score=self.score_rows != "text",
        )
        given = memory, retention, frames, rows, self.layer
        if self.fused_memory and dropout is None:
            attended, memory = fused.read_frames(*given)
        else:
            attended, memory = fused.read_plainly(*given, dropout)
        attended = attended.transpose(1, 0, 3, 2, 4)  # [F, B, H, N, D] → [B, F, N, H, D]
        hidden_dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        return attention_output(c, hidden_dropout, queries, attended), memory


class FeedForward(nn.Module):
    config: QFormerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        y = Mlp(c.width, c.mlp_width, "embed", name="mlp")(x)
        y = nn.Dropout(c.dropout, deterministic=self.deterministic)(y)
        return LayerNorm(c.layer_norm_eps, "embed", name="norm")(x + y)


class Group(nn.Module):
    """One layer with cross-attention and the plain layers up to the next such one."""

    config: QFormerConfig
    score_rows: str
    deterministic: bool
    fused_memory: bool = False
    layer: int | None = None

    @nn.compact
    def __call__(self, x, text_mask, frames_valid, inputs):
        """Carries x [B, F, N + R, E]; ``inputs`` are key, value, memory and counts: this layer's,
        or all layers' and it is ``layer`` of them."""
        c = self.config
        index, valid = frames_valid
        key, value, memory, retention = inputs
        batch, frames, rows, width = x.shape
        queries_mask = jnp.ones((batch, c.num_queries), bool)
        mask = jnp.repeat(jnp.concatenate([queries_mask, text_mask], axis=1), frames, axis=0)
        for i in range(c.cross_attention_every):
            attend = SelfAttention(c, self.deterministic, name=f"self_attention_{i}")
            x = attend(x.reshape(batch * frames, rows, width), mask[:, None, None])
            x = x.reshape(batch, frames, rows, width)
            queries, text = x[:, :, : c.num_queries], x[:, :, c.num_queries :]
            if i == 0:
                how = self.score_rows, self.deterministic, self.fused_memory, self.layer
                read = CrossAttention(c, *how, name="cross_attention")
                queries, memory = read(
                    queries, text, text_mask, Frames(key, value, index, valid), memory, retention
                )
            queries = FeedForward(c, self.deterministic, name=f"query_ffn_{i}")(queries)
            text = FeedForward(c, self.deterministic, name=f"text_ffn_{i}")(text)
            x = jnp.concatenate([queries, text], axis=2)
        return x, memory


def _one_after_another(group_of, apart: tuple[dict, ...], x, text_mask, numbers, inputs):
    """What a scan over stacked layers computes, of layers with parameters of their own."""
    key, value, memory, retention = inputs
    for layer, own in enumerate(apart):
        given = x, text_mask, numbers, (key, value, memory, retention)
        x, memory = group_of(layer=layer).apply({"params": own}, *given)
    return x, memory


def input_rows(
    module: nn.Module, config: QFormerConfig, text_ids: jax.Array, dtype, deterministic: bool
) -> jax.Array:
    """What the first layer reads at every frame: int32[B, R] → [B, N + R, E], queries first.

    The parameters belong to ``module``, which calls it.
    """
    c = config
    words = param(module, "word_embed", embedding, (c.vocab_size, c.width), ("vocab", "embed"))
    places = param(module, "pos_embed", embedding, (c.max_positions, c.width), ("token", "embed"))
    tokens = param(
        module, "query_tokens", embedding, (1, c.num_queries, c.width), ("one", "query", "embed")
    )
    text = words[text_ids] + places[: text_ids.shape[1]]
    queries = jnp.broadcast_to(tokens, text_ids.shape[:1] + tokens.shape[1:])
    x = jnp.concatenate([queries, text], axis=1)
    x = LayerNorm(c.layer_norm_eps, "embed", name="norm")(x.astype(dtype))
    return nn.Dropout(c.dropout, deterministic=deterministic)(x)


class QFormer(nn.Module):
    """Reads a chunk of frames; see the file's head for the order of computation.

    For example, with 32 queries, 12 text tokens and 8 frames of 2 videos at full size: rows are
    ``[2, 8, 44, 768]``, and the result is ``[2, 8, 32, 768]``: what each frame made of the queries.
    """

    config: QFormerConfig
    vision_width: int
    memory_config: MemoryConfig = MemoryConfig()
    remat: bool = True
    fused_memory: bool = False

    #: What it reads and leaves.
    memory_type: ClassVar = VideoMemory

    def setup(self):
        self.frame_projection = FrameProjection(self.config, self.vision_width)

    def read(
        self,
        text_ids: jax.Array,
        text_mask: jax.Array,
        chunk: Chunk,
        memory: VideoMemory,
        seed: jax.Array,
        deterministic: bool = True,
    ) -> tuple[jax.Array, VideoMemory]:
        """Reads a chunk; the interface of every Q-Former.

        Args:
          text_ids: int32[B, R], the question in the Q-Former's vocabulary; R may be 0.
          text_mask: bool[B, R], false on padding.
          chunk: of frames.
          memory: of all layers, before the chunk.
          seed: uint32[B], of the videos, for the random policy.
          deterministic: false switches dropout on (needs the rng ``dropout``).

        Returns:
          The query rows after the last frame that is no padding, [B, N, E] (of no meaning where
          all are), and the memory.
        """
        share = len(text_ids) // len(chunk.tokens)
        key, value = (jnp.repeat(kv, share, axis=2) for kv in self.project(chunk.tokens))
        frames = Frames(key, value, chunk.index.T, chunk.valid.T)
        retention = self._retention(seed, chunk.tokens.shape[2])
        newest, last = frames, chunk.last
        if not retention.reads_attention:
            # The frames before the last one matter by their tokens alone: no query reads them.
            count = chunk.valid.shape[1]
            if count > 1:
                before = frames.valid & (jnp.arange(count)[:, None] != last)
                memory = store(memory, retention, frames.replace(valid=before))
            newest = frames.only(last)
            last = jnp.zeros_like(last)
        queries, after = self(text_ids, text_mask, newest, memory, retention, deterministic)
        # A large memory (of policy full) is changed where it lies, the Q-Former's copy dropped.
        memory = after if retention.reads_attention else store(memory, retention, newest)
        return jnp.take_along_axis(queries, last[:, None, None, None], axis=1)[:, 0], memory

    def _retention(self, seed: jax.Array, tokens: int) -> Retention:
        """The counts of all layers, for frames of P = ``tokens``."""
        plan = retention_plan(self.memory_config, tokens, self.config.num_cross_layers)
        layers = jnp.arange(plan.recent.shape[0], dtype=jnp.uint32)[:, None]
        return Retention(
            recent=jnp.asarray(plan.recent),
            older=jnp.asarray(plan.older),
            seed=seed + layers * jnp.uint32(0x9E3779B9),
            max_older=int(plan.older.max()),
            ranking=plan.ranking,
            novelty=plan.novelty,
            decay=plan.decay,
            shared=plan.shared,
        )

    def project(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a chunk, [B, F, P, V] → twice [L, F, B, H, P, D]."""
        return self.frame_projection(features)

    def project_slots(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of tokens by slot; see :meth:`FrameProjection.by_slot`."""
        return self.frame_projection.by_slot(tokens)

    @nn.compact
    def __call__(
        self,
        text_ids: jax.Array,
        text_mask: jax.Array,
        frames: Frames,
        memory: VideoMemory,
        retention: Retention,
        deterministic: bool = True,
    ) -> tuple[jax.Array, VideoMemory]:
        """Attends to a chunk and updates the memory.

        Args:
          text_ids: int32[B, R], the question in the Q-Former's vocabulary; R may be 0.
          text_mask: bool[B, R], false on padding.
          frames: the chunk.
          memory: of all layers, leaves [L, B, …].
          retention: of all layers, leaves [L, …].
          deterministic: false switches dropout on (needs the rng ``dropout``).

        Returns:
          The query rows after each frame, [B, F, N, E], and the memory after the last frame.
        """
        c = self.config
        x = input_rows(self, c, text_ids, frames.key.dtype, deterministic)
        groups = nn.scan(
            rematerialised(Group, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.num_cross_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            unroll=c.num_cross_layers if self.fused_memory else 1,
        )
        settings = c, self.memory_config.score_rows, deterministic, self.fused_memory
        apart: Any = self.get_variable("params", "groups")
        if isinstance(apart, tuple):  # see params.unstacked
            group_of = functools.partial(Group, *settings, parent=None)
            layers: Any = functools.partial(_one_after_another, group_of, apart)
        else:
            layers = groups(*settings, name="groups")

        def read(layers, memory, frames):
            rows = jnp.broadcast_to(x[:, None], (len(x), len(frames.index)) + x.shape[1:])
            numbers, inputs = (frames.index, frames.valid), (frames.key, frames.value)
            rows, memory = layers(rows, text_mask, numbers, (*inputs, memory, retention))
            return rows[:, :, : c.num_queries], memory

        if not retention.shared:
            return read(layers, memory, frames)

        def read_one(layers, memory, key, value, index, valid):
            one = Frames(key[:, None], value[:, None], index[None], valid[None])
            queries, memory = read(layers, memory, one)
            return retain_together(memory, retention, key.shape[-2], valid), queries[:, 0]

        # What a layer keeps of a frame is known when all have read it: no loop may be swapped.
        given = frames.key, frames.value, frames.index, frames.valid
        memory, queries = one_by_one(read_one, layers, memory, given, (1, 1, 0, 0))
        return jnp.moveaxis(queries, 0, 1), memory
