"""MA-LMM's banks in eager PyTorch, on the card that our memory is measured on.

The Q-Former of ``_torch_qformer.py`` with a bank of visual tokens and one of hidden states before
every self-attention layer (arXiv 2404.05726, Sec. 3.2), as tensors all the way: a row position's
two most alike neighbours are found and merged without a word to the host. One video, inference
only.
"""

import torch
from torch.nn import functional as F

from benchmarks._torch_qformer import CrossAttention, SelfAttention, StreamingQFormer


class Bank:
    """Up to M frames of R rows, entries float32[m, R, W], oldest first."""

    def __init__(self, frames: int):
        self.frames = frames
        self.entries = self.sizes = None

    def append(self, rows: torch.Tensor) -> torch.Tensor:
        """Adds a frame [R, W]; returns all that is held, [m · R, W], in the type of the rows."""
        new, ones = rows.float()[None], rows.new_ones((1, len(rows)), dtype=torch.float32)
        if self.entries is None:
            self.entries, self.sizes = new, ones
        else:
            self.entries = torch.cat([self.entries, new])
            self.sizes = torch.cat([self.sizes, ones])
        return self.entries.to(rows.dtype).flatten(0, 1)

    def shrink(self) -> None:
        """Of M + 1 frames makes M: each row position merges its most alike neighbours in time."""
        if len(self.entries) <= self.frames:
            return
        left, right = self.entries[:-1], self.entries[1:]
        chosen = F.cosine_similarity(left, right, dim=-1).argmax(0)
        place = torch.arange(len(left), device=left.device)[:, None]
        size, next_size = self.sizes[:-1], self.sizes[1:]
        total = size + next_size
        mean = (size[..., None] * left + next_size[..., None] * right) / total[..., None]
        before, here = place < chosen, place == chosen
        behind = torch.where(here, total, next_size)
        self.sizes = torch.where(before, size, behind)
        merged = torch.where(here[..., None], mean, right)
        self.entries = torch.where(before[..., None], left, merged)


def attend(
    layer: SelfAttention | CrossAttention,
    query: torch.nn.Linear,
    key_value: tuple[torch.nn.Linear, torch.nn.Linear],
    x: torch.Tensor,
    seen: torch.Tensor,
) -> torch.Tensor:
    """Rows [R, E] read ``seen`` [K, …], with the output projection, residual and norm."""

    def heads(projected: torch.Tensor) -> torch.Tensor:
        return projected.view(1, len(projected), layer.heads, -1).transpose(1, 2)

    key, value = (heads(part(seen)) for part in key_value)
    y = F.scaled_dot_product_attention(heads(query(x)), key, value)
    return layer.norm(x + layer.out(y.transpose(1, 2).reshape(x.shape)))


class BankedQFormer(StreamingQFormer):
    """Reads one video, frame by frame, as MA-LMM does.

    Args:
      params: those of ``AdaCM2``, unboxed, as numpy arrays.
      config: an ``AdaCM2Config`` with policy ``merge``.
      text_ids: int[R], the question.
    """

    def __init__(self, params: dict, config, text_ids):
        super().__init__(params, config, None, text_ids, fused=False)
        frames = config.memory.bank_frames
        self.visual = Bank(frames)
        self.hidden = [Bank(frames) for _ in self.self_attention]

    def forward(self, features: torch.Tensor, index: int) -> torch.Tensor:
        """One frame, float32[P, V], the video's ``index``-th → the query rows float32[N, E]."""
        features = self.ln_vision(features) + self.temporal[min(index, len(self.temporal) - 1)]
        seen = self.visual.append(features)
        x = self.rows
        for i, layer in enumerate(self.self_attention):
            query, *key_value = layer.parts
            x = attend(layer, query, key_value, x, self.hidden[i].append(x))
            self.hidden[i].shrink()
            queries, text = x[: self.num_queries], x[self.num_queries :]
            if i % self.every == 0:
                read = self.cross_attention[i // self.every]
                queries = attend(read, read.query, read.key_value, queries, seen)
            x = torch.cat([self.query_ffn[i](queries), self.text_ffn[i](text)])
        self.visual.shrink()
        return x[: self.num_queries]
