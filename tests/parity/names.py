"""Hugging Face's InstructBLIP and LLaMA weights under our names.

A torch ``state_dict`` goes in, the parameter tree of ``AdaCM2`` (or ``Llama``) comes out, as numpy
arrays. Every name must be known and used: a missing one raises ``KeyError``, one left over
``ValueError``.

PyTorch keeps linear weights as ``[out, in]``, we as ``[in, out]`` with the heads apart; layers are
separate there, stacked along a leading axis here.
"""

from collections.abc import Mapping

import jax
import numpy as np

from adacm2_jax.config import AdaCM2Config, LlamaConfig, QFormerConfig, VisionConfig

Tree = dict[str, "Tree | np.ndarray"]


class Weights:
    """A ``state_dict`` that notes what was taken from it."""

    def __init__(self, state: Mapping):
        self.left = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.left.pop(name)

    def close(self) -> None:
        if self.left:
            raise ValueError(f"no counterpart for {', '.join(sorted(self.left))}")


def instructblip(state: Mapping, config: AdaCM2Config) -> Tree:
    """All parameters; the temporal table, which InstructBLIP lacks, is zero."""
    weights = Weights(state)
    tree = dict(
        vision=_vision(weights, config.vision),
        ln_vision=_norm(weights, "vision_model.post_layernorm"),
        temporal_embed=np.zeros((config.temporal_positions, config.vision.width), np.float32),
        qformer=_qformer(weights, config.qformer),
        language_projection=_dense(weights, "language_projection"),
        llm=_llama(weights, "language_model.", config.llm),
    )
    weights.close()
    return tree


def llama(state: Mapping, config: LlamaConfig) -> Tree:
    """The parameters of a bare ``LlamaForCausalLM``."""
    weights = Weights(state)
    tree = _llama(weights, "", config)
    weights.close()
    return tree


def _vision(weights: Weights, c: VisionConfig) -> Tree:
    def block(i: int) -> Tree:
        name = f"vision_model.encoder.layers.{i}"
        kernels = np.split(weights[f"{name}.self_attn.qkv.weight"], 3)
        biases = np.split(weights[f"{name}.self_attn.qkv.bias"], 3)
        if biases[1].any():
            raise ValueError(f"{name}.self_attn.qkv.bias is not zero on the keys")
        query, key, value = (
            _split_heads(kernel.T, bias, c.num_heads)
            for kernel, bias in zip(kernels, biases, strict=True)
        )
        del key["bias"]
        up, down = (_dense(weights, f"{name}.mlp.{part}") for part in ("fc1", "fc2"))
        return dict(
            norm1=_norm(weights, f"{name}.layer_norm1"),
            query=query,
            key=key,
            value=value,
            out=_out(weights, f"{name}.self_attn.projection", c.num_heads),
            norm2=_norm(weights, f"{name}.layer_norm2"),
            mlp=dict(up=up, down=down),
        )

    name = "vision_model.embeddings"
    return dict(
        cls_token=weights[f"{name}.class_embedding"],
        pos_embed=weights[f"{name}.position_embedding"],
        patch_embed=dict(
            kernel=weights[f"{name}.patch_embedding.weight"].transpose(2, 3, 1, 0),
            bias=weights[f"{name}.patch_embedding.bias"],
        ),
        blocks=_stack([block(i) for i in range(c.depth)]),
    )


def _qformer(weights: Weights, c: QFormerConfig) -> Tree:
    def attention(name: str, inputs: tuple[str, ...]) -> Tree:
        tree = {n: _heads(weights, f"{name}.attention.{n}", c.num_heads) for n in inputs}
        tree["out"] = _out(weights, f"{name}.output.dense", c.num_heads)
        tree["norm"] = _norm(weights, f"{name}.output.LayerNorm")
        return tree

    def feed_forward(name: str, kind: str) -> Tree:
        mlp = dict(
            up=_dense(weights, f"{name}.intermediate{kind}.dense"),
            down=_dense(weights, f"{name}.output{kind}.dense"),
        )
        return dict(mlp=mlp, norm=_norm(weights, f"{name}.output{kind}.LayerNorm"))

    def group(first: int) -> Tree:
        cross = f"qformer.encoder.layer.{first}.crossattention"
        tree = dict(cross_attention=attention(cross, ("query",)))
        for i in range(c.cross_attention_every):
            name = f"qformer.encoder.layer.{first + i}"
            tree[f"self_attention_{i}"] = attention(f"{name}.attention", ("query", "key", "value"))
            tree[f"query_ffn_{i}"] = feed_forward(name, "_query")
            tree[f"text_ffn_{i}"] = feed_forward(name, "")
        return tree

    def frame_projection(first: int) -> Tree:
        name = f"qformer.encoder.layer.{first}.crossattention.attention"
        return {
            f"{kind}_{part}": array
            for kind in ("key", "value")
            for part, array in _heads(weights, f"{name}.{kind}", c.num_heads).items()
        }

    reading = range(0, c.depth, c.cross_attention_every)
    return dict(
        query_tokens=weights["query_tokens"],
        word_embed=weights["qformer.embeddings.word_embeddings.weight"],
        pos_embed=weights["qformer.embeddings.position_embeddings.weight"],
        norm=_norm(weights, "qformer.embeddings.layernorm"),
        frame_projection=_stack([frame_projection(first) for first in reading]),
        groups=_stack([group(first) for first in reading]),
    )


def _llama(weights: Weights, prefix: str, c: LlamaConfig) -> Tree:
    def layer(i: int) -> Tree:
        name = f"{prefix}model.layers.{i}"
        kv_heads = c.num_kv_heads
        return dict(
            attention_norm=dict(scale=weights[f"{name}.input_layernorm.weight"]),
            query=_heads(weights, f"{name}.self_attn.q_proj", c.num_heads, bias=False),
            key=_heads(weights, f"{name}.self_attn.k_proj", kv_heads, bias=False),
            value=_heads(weights, f"{name}.self_attn.v_proj", kv_heads, bias=False),
            out=_out(weights, f"{name}.self_attn.o_proj", c.num_heads, bias=False),
            mlp_norm=dict(scale=weights[f"{name}.post_attention_layernorm.weight"]),
            gate=_dense(weights, f"{name}.mlp.gate_proj", bias=False),
            up=_dense(weights, f"{name}.mlp.up_proj", bias=False),
            down=_dense(weights, f"{name}.mlp.down_proj", bias=False),
        )

    tree = dict(
        token_embed=weights[f"{prefix}model.embed_tokens.weight"],
        layers=_stack([layer(i) for i in range(c.depth)]),
        norm=dict(scale=weights[f"{prefix}model.norm.weight"]),
    )
    head = _dense(weights, f"{prefix}lm_head", bias=False)
    if not c.tie_embeddings:
        tree["lm_head"] = head
    elif not np.array_equal(head["kernel"].T, tree["token_embed"]):
        raise ValueError("lm_head differs from the embeddings that it should be tied to")
    return tree


def _dense(weights: Weights, name: str, bias: bool = True) -> Tree:
    tree: Tree = dict(kernel=weights[f"{name}.weight"].T)
    if bias:
        tree["bias"] = weights[f"{name}.bias"]
    return tree


def _heads(weights: Weights, name: str, heads: int, bias: bool = True) -> Tree:
    """A projection to heads: ``[in, H, D]``."""
    tree = _dense(weights, name, bias)
    return _split_heads(tree["kernel"], tree.get("bias"), heads)


def _out(weights: Weights, name: str, heads: int, bias: bool = True) -> Tree:
    """A projection from heads: ``[H, D, out]``."""
    tree = _dense(weights, name, bias)
    kernel = tree["kernel"]
    return tree | dict(kernel=kernel.reshape(heads, -1, kernel.shape[1]))


def _norm(weights: Weights, name: str) -> Tree:
    return dict(scale=weights[f"{name}.weight"], bias=weights[f"{name}.bias"])


def _split_heads(kernel: np.ndarray, bias: np.ndarray | None, heads: int) -> Tree:
    tree: Tree = dict(kernel=kernel.reshape(kernel.shape[0], heads, -1))
    if bias is not None:
        tree["bias"] = bias.reshape(heads, -1)
    return tree


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
