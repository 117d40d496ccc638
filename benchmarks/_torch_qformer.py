"""The streaming step in eager PyTorch: the yardstick of streaming_step.py.

Frame by frame, as PyTorch implementations of such models read a video: concatenate the memory and
the new frame, attend, add up the scores, take the top k, gather what stays. One video at a time and
inference only. Two ways to write it: ``plain``, with a linear layer for each of query, key and
value and softmax attention in separate operations, as LAVIS, MA-LMM and transformers have it; and
``fused``, with one linear layer for all three and PyTorch's own fused self-attention.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def linear(*layers: dict, num_inputs: int = 1) -> nn.Linear:
    """One ``nn.Linear`` that computes several of our dense layers of the same input."""
    kernels = [np.array(layer["kernel"]) for layer in layers]
    rows = int(np.prod(kernels[0].shape[:num_inputs]))
    weight = np.concatenate([kernel.reshape(rows, -1) for kernel in kernels], axis=1)
    bias = np.concatenate([np.array(layer["bias"]).reshape(-1) for layer in layers])
    module = nn.Linear(*weight.shape, device="meta")
    module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(weight.T)))
    module.bias = nn.Parameter(torch.from_numpy(bias))
    return module


def layer_norm(layer: dict, epsilon: float) -> nn.LayerNorm:
    module = nn.LayerNorm(layer["scale"].shape[0], epsilon)
    module.weight = nn.Parameter(tensor(layer["scale"]))
    module.bias = nn.Parameter(tensor(layer["bias"]))
    return module


class SelfAttention(nn.Module):
    def __init__(self, params: dict, heads: int, epsilon: float, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        names = ("query", "key", "value")
        if fused:
            self.qkv = linear(*(params[name] for name in names))
        else:
            self.parts = nn.ModuleList([linear(params[name]) for name in names])
        self.out = linear(params["out"], num_inputs=2)
        self.norm = layer_norm(params["norm"], epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, width = x.shape
        if self.fused:
            q, k, v = self.qkv(x).view(1, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = (part(x).view(1, rows, self.heads, -1).transpose(1, 2) for part in self.parts)
            y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.norm(x + self.out(y.transpose(1, 2).reshape(rows, width)))


class FeedForward(nn.Module):
    def __init__(self, params: dict, epsilon: float):
        super().__init__()
        self.up, self.down = linear(params["mlp"]["up"]), linear(params["mlp"]["down"])
        self.norm = layer_norm(params["norm"], epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


class CrossAttention(nn.Module):
    """Holds its memory: keys and values [n, H, D], oldest token first."""

    def __init__(
        self,
        params: dict,
        projection: dict,
        heads: int,
        epsilon: float,
        counts: Callable,
        fused: bool,
    ):
        super().__init__()
        self.heads, self.counts, self.fused = heads, counts, fused
        self.query = linear(params["query"])
        key, value = (
            dict(kernel=projection[f"{name}_kernel"], bias=projection[f"{name}_bias"])
            for name in ("key", "value")
        )
        parts = [linear(key, value)] if fused else [linear(key), linear(value)]
        self.key_value = nn.ModuleList(parts)
        self.out = linear(params["out"], num_inputs=2)
        self.norm = layer_norm(params["norm"], epsilon)
        self.key = self.value = None

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        rows, width = x.shape
        parts = [part(features) for part in self.key_value]
        if self.fused:
            parts = parts[0].chunk(2, dim=1)
        key, value = (part.view(-1, self.heads, width // self.heads) for part in parts)
        if self.key is not None:
            key, value = torch.cat([self.key, key]), torch.cat([self.value, value])
        query = self.query(x).view(rows, self.heads, -1).transpose(0, 1)
        logits = (query * query.shape[-1] ** -0.5) @ key.permute(1, 2, 0)
        probs = logits.softmax(-1)  # [H, N, n]
        y = (probs @ value.transpose(0, 1)).transpose(0, 1).reshape(rows, width)

        live = key.shape[0]
        recent, older = self.counts(live)
        score = probs.sum((0, 1))[: live - recent]
        best = score.topk(older, sorted=False).indices.sort().values
        kept = torch.cat([best, torch.arange(live - recent, live, device=best.device)])
        self.key, self.value = key.index_select(0, kept), value.index_select(0, kept)
        return self.norm(x + self.out(y))


class StreamingQFormer(nn.Module):
    """Reads one video, frame by frame.

    Args:
      params: those of ``AdaCM2``, unboxed, as numpy arrays.
      config: an ``AdaCM2Config``.
      counts: from the number of live tokens to (newest kept, older kept).
      text_ids: int[R], the question.
      fused: how attention is written; see the head of this file.
    """

    def __init__(self, params: dict, config, counts: Callable, text_ids: np.ndarray, fused: bool):
        super().__init__()
        c, q = config.qformer, params["qformer"]
        heads, epsilon = c.num_heads, c.layer_norm_eps
        self.num_queries = c.num_queries
        self.ln_vision = layer_norm(params["ln_vision"], config.ln_vision_eps)
        self.temporal = nn.Parameter(tensor(params["temporal_embed"]))
        text = q["word_embed"][text_ids] + q["pos_embed"][: len(text_ids)]
        rows = tensor(np.concatenate([q["query_tokens"][0], text]))
        norm = layer_norm(q["norm"], epsilon)
        self.rows = nn.Parameter(norm(rows).detach())

        def at(tree, layer):
            if isinstance(tree, dict):
                return {name: at(value, layer) for name, value in tree.items()}
            return tree[layer]

        self.self_attention, self.cross_attention = nn.ModuleList(), nn.ModuleList()
        self.query_ffn, self.text_ffn = nn.ModuleList(), nn.ModuleList()
        self.every = c.cross_attention_every
        for layer in range(c.num_cross_layers):
            group = at(q["groups"], layer)
            projection = at(q["frame_projection"], layer)
            self.cross_attention.append(
                CrossAttention(group["cross_attention"], projection, heads, epsilon, counts, fused)
            )
            for i in range(self.every):
                self.self_attention.append(
                    SelfAttention(group[f"self_attention_{i}"], heads, epsilon, fused)
                )
                self.query_ffn.append(FeedForward(group[f"query_ffn_{i}"], epsilon))
                self.text_ffn.append(FeedForward(group[f"text_ffn_{i}"], epsilon))

    def load_memory(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Starts from a given memory, twice float32[L, n, H, D], oldest token first."""
        for layer, key, value in zip(self.cross_attention, keys, values, strict=True):
            layer.key, layer.value = tensor(key), tensor(value)

    def forward(self, features: torch.Tensor, index: int) -> torch.Tensor:
        """One frame, float32[P, V], the video's ``index``-th → the query rows float32[N, E]."""
        features = self.ln_vision(features) + self.temporal[min(index, len(self.temporal) - 1)]
        x = self.rows
        for i, attend in enumerate(self.self_attention):
            x = attend(x)
            queries, text = x[: self.num_queries], x[self.num_queries :]
            if i % self.every == 0:
                queries = self.cross_attention[i // self.every](queries, features)
            x = torch.cat([self.query_ffn[i](queries), self.text_ffn[i](text)])
        return x[: self.num_queries]
