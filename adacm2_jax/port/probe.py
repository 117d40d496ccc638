"""One frame, one question and one prompt, layer by layer, through either side of a conversion.

Both classes have the same methods, which are called in the order in which the data goes; each loads
the weights of its step, goes on with its own float32 activations, and returns them.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.instructblip import modeling_instructblip as blip
from transformers.models.llama import modeling_llama as llama

from adacm2_jax.config import AdaCM2Config, MemoryConfig
from adacm2_jax.memory.policies import retention_plan
from adacm2_jax.memory.slots import (
    Frames,
    Retention,
    VideoMemory,
    attention_probs,
    init_memory,
    insert,
)
from adacm2_jax.models.layers import Dense, LayerNorm
from adacm2_jax.models.llama import Layer, RMSNorm
from adacm2_jax.models.qformer import FrameProjection, Group, SelfAttention
from adacm2_jax.models.vit import Block, VisionTransformer
from adacm2_jax.port.exporter import TheirTensors
from adacm2_jax.port.formats import to_hugging_face_config
from adacm2_jax.port.store import OurParams


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, *args):
    return module.apply({"params": params}, *args)


class OurProbe:
    """Our side: each layer's own module, on the parameters of that layer."""

    def __init__(self, config: AdaCM2Config, weights: OurParams):
        self._c, self._weights = config, weights

    def _tree(self, path: str, layer: int | None = None, only: tuple[str, ...] = ()) -> Any:
        """The parameter at a path, or the tree below it, as stored; one layer of a stack."""
        if path in self._weights.shapes:
            return jnp.asarray(self._weights.read(path, layer))
        tree: dict = {}
        for name in self._weights.shapes:
            if not name.startswith(f"{path}/"):
                continue
            *parents, leaf = name.removeprefix(f"{path}/").split("/")
            if only and (parents + [leaf])[0] not in only:
                continue
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
            node[leaf] = jnp.asarray(self._weights.read(name, layer))
        return tree

    def vision_block(self, i: int, pixels: np.ndarray) -> jax.Array:
        """After block ``i``, [1, P, V]; the first one takes normalised pixels [1, H, W, 3]."""
        c = self._c.vision
        tree = self._tree("vision/blocks", i)
        if i == 0:
            tree = {"blocks": jax.tree.map(lambda leaf: leaf[None], tree)}
            for name in ("cls_token", "pos_embed", "patch_embed"):
                tree[name] = self._tree(f"vision/{name}")
            vit = VisionTransformer(dataclasses.replace(c, depth=1), remat=False)
            self._x = _apply(vit, tree, jnp.asarray(pixels))
        else:
            self._x, _ = _apply(Block(c), tree, self._x, None)
        return self._x

    def vision_tokens(self) -> jax.Array:
        norm = LayerNorm(self._c.ln_vision_eps, "vision")
        self._features = _apply(norm, self._tree("ln_vision"), self._x)
        return self._features

    def qformer_layer(self, i: int, ids: np.ndarray) -> dict[str, jax.Array]:
        """After layer ``i``, [1, N + R, E], and what its queries attended to, [1, H, N, P]."""
        c = self._c.qformer
        group, place = divmod(i, c.cross_attention_every)
        if i == 0:
            words = self._weights.read("qformer/word_embed")[ids].astype(np.float32)
            places = self._weights.read("qformer/pos_embed")[: ids.shape[1]]
            text = words + places.astype(np.float32)
            tokens = self._tree("qformer/query_tokens").astype(jnp.float32)
            rows = jnp.concatenate([tokens, text], axis=1)
            norm = LayerNorm(c.layer_norm_eps, "embed")
            self._rows = _apply(norm, self._tree("qformer/norm"), rows)
            project = FrameProjection(c, self._c.vision.width)
            weights = self._tree("qformer/frame_projection")
            self._kv = _apply(project, weights, self._features[:, None])
        names = [f"{kind}_{j}" for j in range(place + 1) for kind in _GROUP_PARTS]
        tree = self._tree("qformer/groups", group, ("cross_attention", *names))
        key, value = (kv[group] for kv in self._kv)
        memory, retention = self._empty_memory()
        part = Group(
            dataclasses.replace(c, depth=place + 1, cross_attention_every=place + 1), "query", True
        )
        one, there = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        rows, _ = _apply(
            part,
            tree,
            self._rows[:, None],
            jnp.ones(ids.shape, bool),
            (one, there),
            (key, value, memory, retention),
        )
        result = {"rows": rows[:, 0]}
        if place == 0:
            result["cross-attention"] = self._probs(tree, key[0], value[0], memory)
        if place == c.cross_attention_every - 1:
            self._rows = rows[:, 0]
        return result

    def project(self) -> jax.Array:
        c = self._c
        queries = self._rows[:, : c.qformer.num_queries]
        dense = Dense((c.qformer.width, c.llm.width), ("embed", "llm_embed"))
        self._h = _apply(dense, self._tree("language_projection"), queries)
        return self._h

    def llm_layer(self, i: int, ids: np.ndarray) -> jax.Array:
        """After layer ``i``, [1, N + S, W]: visual tokens, then the prompt."""
        if i == 0:
            words = self._weights.read("llm/token_embed")[ids].astype(np.float32)
            self._h = jnp.concatenate([self._h, words], axis=1)
        length = self._h.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        layer = Layer(self._c.llm)
        positions, start = jnp.arange(length)[None], jnp.zeros((), jnp.int32)
        weights = self._tree("llm/layers", i)
        self._h, _ = _apply(layer, weights, self._h, positions, causal, start, None)
        return self._h

    def logits(self) -> jax.Array:
        c = self._c.llm
        norm = RMSNorm(c.rms_norm_eps)
        hidden = _apply(norm, self._tree("llm/norm"), self._h)
        if c.tie_embeddings:
            return hidden @ self._tree("llm/token_embed").T
        dense = Dense((c.width, c.vocab_size), ("llm_embed", "llm_vocab"), use_bias=False)
        return _apply(dense, self._tree("llm/lm_head"), hidden)

    def _empty_memory(self) -> tuple[VideoMemory, Retention]:
        """Of one layer, for one frame that is kept whole."""
        c, tokens = self._c.qformer, self._features.shape[1]
        plan = retention_plan(MemoryConfig("full", max_frames=1), tokens, 1)
        memory = init_memory(1, c.num_heads, c.width // c.num_heads, tokens, tokens, jnp.float32)
        retention = Retention(
            recent=jnp.asarray(plan.recent[0]),
            older=jnp.asarray(plan.older[0]),
            seed=jnp.zeros((1,), jnp.uint32),
            max_older=0,
            ranking=plan.ranking,
        )
        return memory, retention

    def _probs(self, tree: dict, key, value, memory: VideoMemory) -> jax.Array:
        c, tokens = self._c.qformer, self._features.shape[1]
        attend = SelfAttention(c, deterministic=True)
        mask = jnp.ones((1, 1, 1, self._rows.shape[1]), bool)
        rows = _apply(attend, tree["self_attention_0"], self._rows, mask)
        shape = (c.width, c.num_heads, c.width // c.num_heads)
        dense = Dense(shape, ("embed", "heads", "head_dim"))
        query = _apply(dense, tree["cross_attention"]["query"], rows[:, : c.num_queries])
        query = query.transpose(0, 2, 1, 3)
        frame = Frames(key, value, index=jnp.zeros(1, jnp.int32), valid=jnp.ones(1, bool))
        memory = insert(memory, frame, jnp.zeros((1, tokens)))
        live = jnp.arange(memory.slots.shape[1])[None] < tokens
        return attention_probs(query, memory, live)[..., :tokens]


_GROUP_PARTS = ("self_attention", "query_ffn", "text_ffn")


class TheirProbe:
    """transformers' side: its layers, with the weights that the checkpoint has for them.

    Args:
      config: the model.
      weights: the checkpoint's, under Hugging Face's names.
    """

    def __init__(self, config: AdaCM2Config, weights: TheirTensors):
        self._c, self._weights = config, weights
        hf = to_hugging_face_config(config, "float32", None)
        self._vision, self._qformer = hf.vision_config, hf.qformer_config
        self._text = hf.text_config
        for part in (self._vision, self._qformer, self._text):
            part._attn_implementation = "eager"

    def _state(self, prefix: str) -> dict[str, torch.Tensor]:
        """A module's ``state_dict`` in float32: what stands below a prefix."""
        return {
            name.removeprefix(prefix): torch.from_numpy(self._weights.read(name).astype(np.float32))
            for name in self._weights.shapes
            if name.startswith(prefix)
        }

    def _load(self, prefix: str, make: Callable[..., Any], *args: Any, **options: Any):
        """A module with its weights, without memory for others."""
        with torch.device("meta"):
            module = make(*args, **options)
        module.load_state_dict(self._state(prefix), strict=True, assign=True)
        return module.eval().requires_grad_(False)

    def vision_block(self, i: int, pixels: np.ndarray):
        if i == 0:
            embed = self._load(
                "vision_model.embeddings.", blip.InstructBlipVisionEmbeddings, self._vision
            )
            self._x = embed(torch.from_numpy(np.moveaxis(pixels, -1, 1).copy()))
        prefix = f"vision_model.encoder.layers.{i}."
        block = self._load(prefix, blip.InstructBlipEncoderLayer, self._vision)
        # Required up to 4.x, unknown from 5.x on.
        masked = "attention_mask" in inspect.signature(block.forward).parameters
        self._x = _first(block(self._x, **({"attention_mask": None} if masked else {})))
        return self._x

    def vision_tokens(self):
        width, eps = self._c.vision.width, self._c.ln_vision_eps
        norm = self._load("vision_model.post_layernorm.", torch.nn.LayerNorm, width, eps=eps)
        self._features = norm(self._x)
        return self._features

    def qformer_layer(self, i: int, ids: np.ndarray):
        count = self._c.qformer.num_queries
        if i == 0:
            embed = blip.InstructBlipQFormerEmbeddings(self._qformer)
            embed.load_state_dict(self._state("qformer.embeddings."), strict=False)
            tokens = self._state("query_tokens")[""]
            self._rows = embed.eval()(input_ids=torch.from_numpy(ids).long(), query_embeds=tokens)
        prefix = f"qformer.encoder.layer.{i}."
        layer = self._load(prefix, blip.InstructBlipQFormerLayer, self._qformer, i)
        with torch.no_grad():
            mask = torch.zeros((1, 1, 1, self._rows.shape[1]))
            rows = _first(layer.attention(self._rows, attention_mask=mask))
            queries, text = rows[:, :count], rows[:, count:]
            result = {}
            if layer.has_cross_attention:
                attention = layer.crossattention.attention
                heads = attention.num_attention_heads

                def split(x):
                    return x.unflatten(-1, (heads, -1)).transpose(1, 2)

                query, key = split(attention.query(queries)), split(attention.key(self._features))
                probs = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)
                result["cross-attention"] = probs.numpy()
                read = (probs @ split(attention.value(self._features))).transpose(1, 2).flatten(2)
                queries = layer.crossattention.output(read, queries)
            queries = layer.feed_forward_chunk_query(queries)
            self._rows = torch.cat([queries, layer.feed_forward_chunk(text)], dim=1)
        return {"rows": self._rows.numpy()} | result

    def project(self):
        sizes = self._c.qformer.width, self._c.llm.width
        dense = self._load("language_projection.", torch.nn.Linear, *sizes)
        self._h = dense(self._rows[:, : self._c.qformer.num_queries])
        return self._h

    def llm_layer(self, i: int, ids: np.ndarray):
        if i == 0:
            words = self._state("language_model.model.embed_tokens.")["weight"][ids]
            self._h = torch.cat([self._h, words], dim=1)
        length = self._h.shape[1]
        positions = torch.arange(length)[None]
        turn = llama.LlamaRotaryEmbedding(config=self._text)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        prefix = f"language_model.model.layers.{i}."
        layer = self._load(prefix, llama.LlamaDecoderLayer, self._text, 0)
        places = dict(position_ids=positions, position_embeddings=turn(self._h, positions))
        self._h = _first(layer(self._h, attention_mask=mask, **places))
        return self._h

    def logits(self):
        c, prefix = self._c.llm, "language_model."
        norm = self._load(f"{prefix}model.norm.", llama.LlamaRMSNorm, c.width, c.rms_norm_eps)
        head = f"{prefix}model.embed_tokens." if c.tie_embeddings else f"{prefix}lm_head."
        return norm(self._h) @ self._state(head)["weight"].T


def _first(output):
    return output[0] if isinstance(output, tuple) else output
