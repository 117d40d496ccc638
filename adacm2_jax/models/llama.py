"""A LLaMA decoder (Vicuna-7B at full size): grouped-query attention, an explicit KV cache.

RMSNorm in float32, cast back before the weight; rotary positions in half-split (Hugging Face)
order; SwiGLU; no biases. The same code serves training (no cache), prefill and decoding.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from adacm2_jax.config import LlamaConfig
from adacm2_jax.models.layers import (
    ONES,
    Dense,
    attention,
    attention_behind,
    embedding,
    param,
    rematerialised,
    wide,
    wide_product,
)
from adacm2_jax.sharding import rows_sharded


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers, at a fixed length; an argument and a result of the decoder.

    Rows may share what they begin with: see :meth:`branched`.
    """

    #: of every layer [B, length, KV heads, D].
    key: tuple[jax.Array, ...]
    #: of every layer [B, length, KV heads, D].
    value: tuple[jax.Array, ...]
    #: bool[B, length]: which places hold a real token.
    mask: jax.Array
    #: int32: places written so far, the same for the whole batch.
    index: jax.Array
    #: What comes before, of B / K rows: row b goes on from row b // K of it. None: nothing does.
    prompt: "KVCache | None" = None

    @property
    def tokens(self) -> jax.Array:
        """int32[B]: real tokens of every row, those that it shares counted."""
        own = self.mask.sum(axis=1, dtype=jnp.int32)
        if self.prompt is None:
            return own
        return own + jnp.repeat(self.prompt.tokens, self._rows_each)

    def branched(self, count: int, room: int) -> "KVCache":
        """K = ``count`` rows for each row, that share what has been read and own what comes.

        Args:
          count: K.
          room: places that each row has of its own: the last ``room`` of this cache, where nothing
            has been written yet.
        """
        rows = len(self.mask)
        shared = self.mask.shape[1] - room

        def own(leaf: jax.Array) -> jax.Array:
            # One place where none is needed: to write is compiled even where it never happens.
            return jnp.zeros((rows * count, max(room, 1), *leaf.shape[2:]), leaf.dtype)

        before = {name: getattr(self, name) for name in ("key", "value", "mask")}
        return KVCache(
            **jax.tree.map(own, before),
            index=jnp.zeros((), jnp.int32),
            prompt=self.replace(**jax.tree.map(lambda leaf: leaf[:, :shared], before)),
        )

    @property
    def _rows_each(self) -> int:
        assert self.prompt is not None
        return len(self.mask) // len(self.prompt.mask)

    def layers(self) -> tuple[tuple[jax.Array, ...], ...]:
        """Of every layer its key and value, and behind them those that its rows share."""
        own = self.key, self.value
        shared = () if self.prompt is None else (self.prompt.key, self.prompt.value)
        return tuple(zip(*own, *shared, strict=True))

    def seen(self, places: jax.Array) -> jax.Array:
        """bool[B, 1, S, shared + length]: what rows attend to from int32[S] ``places``."""
        causal = jnp.arange(self.mask.shape[1]) <= places[:, None]
        own = causal[None, None] & self.mask[:, None, None]
        if self.prompt is None:
            return own
        before = jnp.repeat(self.prompt.mask, self._rows_each, axis=0)[:, None, None]
        before = jnp.broadcast_to(before, (*own.shape[:3], before.shape[3]))
        return jnp.concatenate([before, own], axis=3)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype) -> KVCache:
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(
        key=tuple(jnp.zeros(shape, dtype) for _ in range(config.depth)),
        value=tuple(jnp.zeros(shape, dtype) for _ in range(config.depth)),
        mask=jnp.zeros((batch, length), bool),
        index=jnp.zeros((), jnp.int32),
    )


class RMSNorm(nn.Module):
    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ONES, (x.shape[-1],), ("llm_embed",))
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates [B, S, H, D] by int32[B, S] positions; the halves of D are the pairs' members."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, positions, mask, index, cache):
        """x [B, S, W]; mask bool[B, 1, S, K]; ``cache`` is None or of :meth:`KVCache.layers`."""
        c = self.config
        dense = functools.partial(Dense, use_bias=False, quantize=c.quantize)

        def heads(name, count):
            axes = ("llm_embed", "llm_heads", "head_dim")
            return dense((c.width, count, c.head_dim), axes, name=name)(y)

        y = RMSNorm(c.rms_norm_eps, name="attention_norm")(x)
        query = rotary(heads("query", c.num_heads), positions, c.rope_theta)
        key = rotary(heads("key", c.num_kv_heads), positions, c.rope_theta)
        value = heads("value", c.num_kv_heads)
        shared: tuple[jax.Array, ...] = ()
        if cache is not None:
            put = jax.lax.dynamic_update_slice_in_dim
            key, value = put(cache[0], key, index, 1), put(cache[1], value, index, 1)
            cache, shared = (key, value), cache[2:]
        repeat = functools.partial(jnp.repeat, repeats=c.num_heads // c.num_kv_heads, axis=2)
        if shared:
            before = repeat(shared[0]), repeat(shared[1])
            y = attention_behind(query, repeat(key), repeat(value), *before, mask)
        else:
            y = attention(query, repeat(key), repeat(value), mask)
        axes = ("llm_heads", "head_dim", "llm_embed")
        shape = (c.num_heads, c.head_dim, c.width)
        x = x + dense(shape, axes, num_inputs=2, name="out")(y)

        y = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x)
        sizes, names = (c.width, c.mlp_width), ("llm_embed", "llm_mlp")
        gate = dense(sizes, names, name="gate")(y)
        y = jax.nn.silu(gate) * dense(sizes, names, name="up")(y)
        down = dense(sizes[::-1], names[::-1], name="down")
        return rows_sharded(x + down(y)), cache


class Llama(nn.Module):
    """Embeddings to hidden states, and hidden states to logits.

    ``embed`` turns token ids into embeddings; the caller may put visual tokens among them. Calling
    the module without a cache computes a whole sequence (training); with one, it appends S tokens
    to what the cache holds (prefill with S = prompt, then S = 1). ``logits`` is a method of its
    own, so that nobody pays for a vocabulary of logits at places that are not read.

    The parameters of its layers are stacked, and scanned over. Where they are a tuple, one tree a
    layer (``params.unstacked``), the layers follow one another in the program: the same results,
    and no layer's weights are copied out of the stack for every token.
    """

    config: LlamaConfig
    remat: bool = True

    def setup(self):
        c = self.config
        shape, axes = (c.vocab_size, c.width), ("llm_vocab", "llm_embed")
        self.tokens = param(self, "token_embed", embedding, shape, axes)
        self.layers = nn.scan(
            rematerialised(Layer, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_embeddings:
            # Rounded to half precision, words that differ would tie.
            self.lm_head = Dense(shape[::-1], axes[::-1], use_bias=False, widen=True)

    def embed(self, ids: jax.Array, dtype) -> jax.Array:
        """int32[B, S] → [B, S, W]."""
        return self.tokens[ids].astype(dtype)

    def __call__(
        self,
        embeddings: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the decoder.

        Args:
          embeddings: [B, S, W].
          mask: bool[B, S], false on padding (which no token attends to).
          positions: int32[B, S], rotary positions.
          cache: None, or what came before, with room for S more.

        Returns:
          Normalised hidden states [B, S, W], and the ``KVCache`` with the new tokens, or None.
        """
        length = embeddings.shape[1]
        x = rows_sharded(embeddings)
        index = jnp.zeros((), jnp.int32) if cache is None else cache.index
        place = index + jnp.arange(length)
        if cache is None:
            seen = (place <= place[:, None])[None, None] & mask[:, None, None]
            return self.norm(self._through_layers(x, positions, seen, index, None)[0]), None
        known = jax.lax.dynamic_update_slice_in_dim(cache.mask, mask, index, 1)
        cache = cache.replace(mask=known)
        x, layers = self._through_layers(x, positions, cache.seen(place), index, cache.layers())
        key, value = zip(*layers, strict=True)
        return self.norm(x), cache.replace(key=key, value=value, index=index + length)

    def _through_layers(self, x: jax.Array, positions, mask, index, caches):
        """All layers; ``caches`` is None or :meth:`KVCache.layers`; gives (key, value) of each."""
        apart: Any = self.get_variable("params", "layers")
        if not isinstance(apart, tuple):
            stacked = caches and jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
            x, stacked = self.layers(x, positions, mask, index, stacked)
            if caches is None:
                return x, None
            return x, tuple(zip(*map(tuple, stacked), strict=True))
        layer, after = Layer(self.config, parent=None), []
        for own, cache in zip(apart, caches or [None] * len(apart), strict=True):
            x, cache = layer.apply({"params": own}, x, positions, mask, index, cache)
            after.append(cache)
        return x, caches and tuple(after)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[…, W] → float32[…, vocabulary]."""
        if not self.config.tie_embeddings:
            return self.lm_head(hidden)
        return wide_product(hidden, self.tokens.T.astype(hidden.dtype))
