"""The Q-Former over MA-LMM's banks (``banks.py``): policy ``merge``.

The same layers with the same parameters as in ``qformer.py``, so a checkpoint works with every
policy. What differs is what they read. A cross-attention layer projects the whole visual bank, the
new frame included, to keys and values; that is done anew for every frame, as its entries change.
The rows of a self-attention layer attend to all that its own bank holds, which is what came into
the layer at earlier frames and the rows themselves.

Frames are walked one by one with all layers inside, as MA-LMM does, since every frame changes what
the layers project. Nothing of the frames before the last one is kept for the backward pass: banks
are constants to what follows, and of the query rows only those of the last frame are wanted.

Axes: as in ``qformer.py``; k questions of a video, M frames of a bank, G layers of a group.
"""

import functools
import operator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from adacm2_jax.config import MemoryConfig, QFormerConfig
from adacm2_jax.errors import UserError
from adacm2_jax.memory.banks import Bank, BankMemory, append, live, shrink
from adacm2_jax.models.layers import Dense, attention, one_by_one, rematerialised
from adacm2_jax.models.qformer import (
    Chunk,
    FeedForward,
    FrameProjection,
    SelfAttention,
    attention_output,
    input_rows,
    project_frames,
)


class BankAttention(nn.Module):
    """Cross-attention, with the parameters of ``CrossAttention``, to keys and values at hand."""

    config: QFormerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, queries, key, value, mask) -> jax.Array:
        """[B, Q, E] reads [B, K, H, D] where ``mask`` bool[B, K] is true; returns [B, Q, E]."""
        c = self.config
        shape = (c.width, c.num_heads, c.width // c.num_heads)
        query = Dense(shape, ("embed", "heads", "head_dim"), name="query")(queries)
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic)
        y = attention(query, key, value, mask[:, None, None], dropout)
        return attention_output(c, dropout, queries, y)


class BankGroup(nn.Module):
    """``Group`` for one frame: a layer with cross-attention and the plain ones up to the next."""

    config: QFormerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x, given, inputs):
        """Carries x [B, N + R, E] and returns the group's banks after the frame.

        ``given``: bool[B, N + R], the rows that are real; bool[B], whether the frame is; the visual
        bank of B / k videos with the frame in it. ``inputs``: the group's banks, leaves [G, B, …],
        and its projections to keys and to values.
        """
        c = self.config
        real, valid, visual = given
        banks, projections = inputs
        after = []
        for i in range(c.cross_attention_every):
            bank = append(jax.tree.map(operator.itemgetter(i), banks), x, valid)
            after.append(shrink(bank))
            mask = (live(bank)[:, :, None] & real[:, None]).reshape(len(x), -1)
            attend = SelfAttention(c, self.deterministic, name=f"self_attention_{i}")
            x = attend(x, mask[:, None, None], _rows(bank, x.dtype))
            queries, text = x[:, : c.num_queries], x[:, c.num_queries :]
            if i == 0:
                seen = _rows(visual, x.dtype)
                key, value = (project_frames(seen, weights) for weights in projections)
                read = BankAttention(c, self.deterministic, name="cross_attention")
                # The queries of a video's k questions read the same keys: so many rows more.
                together = queries.reshape(len(seen), -1, c.width)
                mask = jnp.repeat(live(visual), visual.sizes.shape[-1], axis=1)
                queries = read(together, key, value, mask).reshape(queries.shape)
            queries = FeedForward(c, self.deterministic, name=f"query_ffn_{i}")(queries)
            text = FeedForward(c, self.deterministic, name=f"text_ffn_{i}")(text)
            x = jnp.concatenate([queries, text], axis=1)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)


def _one_after_another(group: BankGroup, apart: tuple[dict, ...], x, same, inputs):
    """What a scan over stacked layers computes, of layers with parameters of their own."""
    after = []
    for layer, own in enumerate(apart):
        mine = jax.tree.map(lambda leaf, layer=layer: leaf[layer], inputs)
        x, memory = group.apply({"params": own}, x, same, mine)
        after.append(memory)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)


class BankQFormer(nn.Module):
    """Reads a chunk of frames, one after the other; what it offers is what ``QFormer`` does."""

    config: QFormerConfig
    vision_width: int
    memory_config: MemoryConfig
    remat: bool = True
    #: Of no meaning for banks.
    fused_memory: bool = False

    #: What it reads and leaves.
    memory_type: ClassVar = BankMemory

    def setup(self):
        self.frame_projection = FrameProjection(self.config, self.vision_width)

    @nn.compact
    def read(
        self,
        text_ids: jax.Array,
        text_mask: jax.Array,
        chunk: Chunk,
        memory: BankMemory,
        seed: jax.Array,
        deterministic: bool = True,
    ) -> tuple[jax.Array, BankMemory]:
        """See ``QFormer.read``; the question is padded to the places that the banks have.

        Raises:
          UserError: for a question that is longer.
        """
        c = self.config
        features, valid, last = chunk.tokens, chunk.valid, chunk.last
        share = len(text_ids) // len(features)
        places = memory.hidden.sizes.shape[-1] - c.num_queries
        if text_ids.shape[1] > places:
            raise UserError(
                f"a question of {text_ids.shape[1]} tokens does not fit the banks of policy "
                f"'merge', which hold {places} (max_text_len); raise it, or shorten the question"
            )
        padding = ((0, 0), (0, places - text_ids.shape[1]))
        text_ids, text_mask = jnp.pad(text_ids, padding), jnp.pad(text_mask, padding)
        x = input_rows(self, c, text_ids, features.dtype, deterministic)
        queries_real = jnp.ones((len(x), c.num_queries), bool)
        real = jnp.concatenate([queries_real, text_mask], axis=1)
        projections = self.frame_projection.weights()
        apart: Any = self.get_variable("params", "groups")
        if isinstance(apart, tuple):  # see params.unstacked
            group = BankGroup(c, deterministic, parent=None)
            groups: Any = functools.partial(_one_after_another, group, apart)
        else:
            groups = nn.scan(
                rematerialised(BankGroup, self.remat),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0),
                length=c.num_cross_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, deterministic, name="groups")

        def read_frame(groups, memory, frame, valid):
            """One frame, [B / k, P, V]: the memory after it, and its query rows."""
            visual = append(memory.visual, frame, valid[::share])
            rows, hidden = groups(x, (real, valid, visual), (memory.hidden, projections))
            return BankMemory(shrink(visual), hidden), rows[:, : c.num_queries]

        def read_memory_only(groups, memory, frame, valid):
            return read_frame(groups, memory, frame, valid)[0], None

        # The k rows of a video hold the same visual bank: one of them stands for all.
        memory = memory.replace(visual=jax.tree.map(lambda leaf: leaf[::share], memory.visual))
        count = valid.shape[1]
        if count > 1:
            before = valid & (jnp.arange(count) < last[:, None])
            # In the last place of a chunk no frame comes before the last one.
            given = features[:, :-1], before[:, :-1]
            memory, _ = one_by_one(read_memory_only, groups, memory, given, (1, 1))
        newest = jnp.take_along_axis(features, last[::share, None, None, None], axis=1)[:, 0]
        valid = jnp.take_along_axis(valid, last[:, None], axis=1)[:, 0]
        memory, queries = read_frame(groups, memory, newest, valid)
        visual = jax.tree.map(lambda leaf: jnp.repeat(leaf, share, axis=0), memory.visual)
        return queries, memory.replace(visual=visual)


def _rows(bank: Bank, dtype) -> jax.Array:
    """All places of a bank in a row, [B, (M + 1)·R, W], in the type that the layers compute in."""
    entries = bank.entries
    return entries.reshape(len(entries), -1, entries.shape[-1]).astype(dtype)
