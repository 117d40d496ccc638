"""Streaming with a memory against a plain torch loop around the layers of Hugging Face's Q-Former.

The loop knows nothing of slots, capacities, chunks or batches: it walks one video frame by frame
and keeps lists of tokens that it concatenates and indexes, as the paper describes it (arXiv
2411.12593, Sec. 3).
"""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_state
from tests.parity import names, oracle

BASE = tiny()
BATCH, CHUNK = 2, 2
# The second video has padding in front, in the middle (a whole chunk and more) and behind.
VALID = np.array([[1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 1, 0]], bool)
QUESTION = Question(
    qformer_ids=np.random.default_rng(7).integers(512, size=(BATCH, 5)).astype(np.int32),
    qformer_mask=np.arange(5) < np.array([[5], [3]]),
    llm_ids=np.zeros((BATCH, 1), np.int32),
    llm_mask=np.ones((BATCH, 1), bool),
)
MEMORIES = {
    "eq8": MemoryConfig(recent_ratio="0.1", conserve_ratio="0.1"),
    "eq6": MemoryConfig(recent_ratio="0.9", conserve_ratio="0.1"),
    "by score alone, then by age alone": MemoryConfig(
        recent_ratio=("0", "0.6"), conserve_ratio=("0.6", "0")
    ),
    "text rows score": MemoryConfig("adacm2", "0.2", "0.5", score_rows="text"),
    "all rows score": MemoryConfig("adacm2", "0.2", "0.5", score_rows="query+text"),
}


@pytest.fixture(scope="module")
def model():
    return oracle.instructblip(BASE, seed=11)


@pytest.fixture(scope="module")
def params(model):
    params = names.instructblip(model.state_dict(), BASE)
    table = np.random.default_rng(8).normal(size=params["temporal_embed"].shape)
    return params | {"temporal_embed": table.astype(np.float32)}


@dataclasses.dataclass
class Tokens:
    """What a layer remembers: keys and values [H, n, D], and n pairs (frame, patch)."""

    key: torch.Tensor
    value: torch.Tensor
    origin: list[tuple[int, int]]


class TorchStream:
    """One video; ``memory`` has an entry for every cross-attention layer."""

    def __init__(self, model, table: np.ndarray, config: MemoryConfig, ids, mask):
        self.model, self.table, self.config = model, torch.from_numpy(table), config
        self.ids, self.mask = torch.from_numpy(ids).long()[None], torch.from_numpy(mask)
        self.readers = [layer for layer in model.qformer.encoder.layer if layer.has_cross_attention]
        self.memory: list[Tokens | None] = [None] * len(self.readers)
        self.seen = 0
        #: The closest call so far: the gap between the last score kept and the first one dropped,
        #: relative to the largest score.
        self.margin = float("inf")

    def read_frame(self, features: torch.Tensor) -> torch.Tensor:
        """One frame's tokens [P, V] from the ViT; returns the query rows [N, E]."""
        model, count = self.model, self.model.query_tokens.shape[1]
        features = model.vision_model.post_layernorm(features) + self.table[self.seen]
        rows = model.qformer.embeddings(input_ids=self.ids, query_embeds=model.query_tokens)
        attended_to = torch.cat([torch.ones(count, dtype=torch.bool), self.mask])
        mask = torch.zeros(len(attended_to)).masked_fill(~attended_to, -torch.inf)
        for layer in model.qformer.encoder.layer:
            rows = oracle.first(layer.attention(rows, attention_mask=mask))
            queries, text = rows[:, :count], rows[:, count:]
            if layer.has_cross_attention:
                index = self.readers.index(layer)
                attended = self.read(index, layer.crossattention.attention, features, queries, text)
                queries = layer.crossattention.output(attended, queries)
            queries, text = layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(text)
            rows = torch.cat([queries, text], dim=1)
        self.seen += 1
        return rows[0, :count]

    def read(self, index: int, attention, features, queries, text) -> torch.Tensor:
        """Appends the frame, attends to all, then drops; returns [1, N, E]."""
        heads = attention.num_attention_heads

        def split(x):
            return x.unflatten(-1, (heads, -1)).transpose(0, 1)

        new = Tokens(
            split(attention.key(features)),
            split(attention.value(features)),
            [(self.seen, patch) for patch in range(len(features))],
        )
        old = self.memory[index]
        if old is not None:
            new = Tokens(
                torch.cat([old.key, new.key], dim=1),
                torch.cat([old.value, new.value], dim=1),
                old.origin + new.origin,
            )

        def probabilities(rows):
            query = split(attention.query(rows))
            return torch.softmax(query @ new.key.mT / query.shape[-1] ** 0.5, dim=-1)

        read = probabilities(queries[0])
        score = torch.zeros(len(new.origin))
        if "query" in self.config.score_rows:
            score += read.sum((0, 1))
        if "text" in self.config.score_rows:
            score += probabilities(text[0, self.mask]).sum((0, 1))
        kept = self.select(index, score)
        self.memory[index] = Tokens(
            new.key[:, kept], new.value[:, kept], [new.origin[i] for i in kept]
        )
        return (read @ new.value).transpose(0, 1).flatten(1)[None]

    def select(self, index: int, score: torch.Tensor) -> list[int]:
        def ratio(value):
            return Fraction(value[index] if isinstance(value, tuple) else value)

        total = len(score)
        recent = int(ratio(self.config.recent_ratio) * total)
        older = total - recent
        count = int(ratio(self.config.conserve_ratio) * older)
        ranked, order = torch.topk(score[:older], older)
        if 0 < count < older:
            gap = (ranked[count - 1] - ranked[count]) / ranked[0]
            self.margin = min(self.margin, float(gap))
        return sorted(order[:count].tolist()) + list(range(older, total))


def kept_tokens(memory, layer: int, row: int) -> list[tuple[int, int]]:
    tokens = jax.tree.map(lambda leaf: np.asarray(leaf)[layer, row], memory.in_time_order())
    pairs = zip(tokens["frame"].tolist(), tokens["patch"].tolist(), strict=True)
    return [pair for pair, live in zip(pairs, tokens["live"], strict=True) if live]


@pytest.mark.parametrize("name", MEMORIES)
def test_queries_and_kept_tokens_equal_the_torch_loop(model, params, name):
    """After every chunk, at whatever numbers of frames seen."""
    config = dataclasses.replace(BASE, memory=MEMORIES[name])
    shape = (*VALID.shape, config.vision.tokens_per_frame, config.vision.width)
    features = np.random.default_rng(9).normal(size=shape).astype(np.float32)

    read = jax.jit(functools.partial(AdaCM2(config).apply, method="read"))
    state = init_state(config, jnp.zeros(BATCH, jnp.int32))
    loops = [
        TorchStream(model, params["temporal_embed"], config.memory, ids, mask)
        for ids, mask in zip(QUESTION.qformer_ids, QUESTION.qformer_mask, strict=True)
    ]
    expected = list(torch.zeros(state.queries.shape))
    for start in range(0, VALID.shape[1], CHUNK):
        part, valid = features[:, start : start + CHUNK], VALID[:, start : start + CHUNK]
        state = read({"params": params}, part, valid, QUESTION, state)
        for row, loop in enumerate(loops):
            for frame in part[row, valid[row]]:
                expected[row] = loop.read_frame(torch.from_numpy(frame))
            for layer, tokens in enumerate(loop.memory):
                assert kept_tokens(state.memory, layer, row) == tokens.origin
        oracle.assert_close(state.queries, torch.stack(expected))
    assert state.frames_seen.tolist() == [loop.seen for loop in loops]
    # Equality of the sets may be asked for: no choice was closer than the rounding of the scores.
    assert min(loop.margin for loop in loops) > oracle.TOLERANCE
