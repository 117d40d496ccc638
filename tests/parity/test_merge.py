"""Policy ``merge`` against MA-LMM's loop, written in torch from its description.

The loop walks one video frame by frame around the layers of Hugging Face's Q-Former (arXiv
2404.05726, Sec. 3.2). For every row position it keeps a list of vectors with sizes, which grows and
shrinks. It knows nothing of capacities, chunks or batches.
"""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import MemoryConfig, tiny
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_state
from tests.parity import names, oracle
from tests.small import quick_compilation

BASE = tiny()
N, WORDS = BASE.qformer.num_queries, 5
# One video far longer than the banks. The other has padding in front, in the middle and behind.
VALID = np.array([[1] * 12, [0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 0]], bool)
QUESTION = Question(
    qformer_ids=np.random.default_rng(7).integers(512, size=(2, WORDS)).astype(np.int32),
    qformer_mask=np.arange(WORDS) < np.array([[5], [3]]),
    llm_ids=np.zeros((2, 1), np.int32),
    llm_mask=np.ones((2, 1), bool),
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def model():
    return oracle.instructblip(BASE, seed=11)


@pytest.fixture(scope="module")
def params(model):
    params = names.instructblip(model.state_dict(), BASE)
    table = np.random.default_rng(8).normal(size=params["temporal_embed"].shape)
    return params | {"temporal_embed": table.astype(np.float32)}


@pytest.fixture(scope="module")
def features():
    shape = (*VALID.shape, BASE.vision.tokens_per_frame, BASE.vision.width)
    return np.random.default_rng(9).normal(size=shape).astype(np.float32)


class Bank:
    """For every row position a list of (vector, size), oldest first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.slots: list[list[tuple[torch.Tensor, int]]] = []
        #: The closest call so far: by how much the pair chosen was more alike than the next best.
        self.margin = float("inf")
        #: Positions where all vectors were equal but for rounding: there the choice is arbitrary,
        #: and makes no difference.
        self.constant: set[int] = set()

    def frames(self) -> list[torch.Tensor]:
        held = len(self.slots[0]) if self.slots else 0
        return [torch.stack([slot[i][0] for slot in self.slots]) for i in range(held)]

    def sizes(self) -> np.ndarray:
        return np.array([[size for _, size in slot] for slot in self.slots]).T

    def remember(self, rows: torch.Tensor) -> None:
        self.slots = self.slots or [[] for _ in rows]
        for position, (slot, row) in enumerate(zip(self.slots, rows.detach(), strict=True)):
            slot.append((row, 1))
            if len(slot) > self.limit:
                self.merge_one(position, slot)

    def merge_one(self, position: int, slot: list[tuple[torch.Tensor, int]]) -> None:
        vectors = torch.stack([vector for vector, _ in slot])
        alike = torch.nn.functional.cosine_similarity(vectors[:-1], vectors[1:], dim=-1).tolist()
        if len(alike) > 1:
            if (vectors - vectors[0]).abs().max() <= oracle.TOLERANCE * vectors.abs().max():
                self.constant.add(position)
            else:
                second, best = sorted(alike)[-2:]
                self.margin = min(self.margin, best - second)
        k = alike.index(max(alike))
        (left, size), (right, next_size) = slot[k : k + 2]
        total = size + next_size
        slot[k : k + 2] = [((size * left + next_size * right) / total, total)]


class MergingLoop:
    """One video."""

    def __init__(self, model, table: torch.Tensor, limit: int, ids, mask):
        self.model, self.table, self.seen = model, table, 0
        self.ids, self.mask = torch.from_numpy(ids).long()[None], torch.from_numpy(mask)
        self.visual = Bank(limit)
        self.hidden = [Bank(limit) for _ in model.qformer.encoder.layer]

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """One frame's tokens [P, V] from the ViT; returns the query rows [N, E]."""
        model = self.model
        frame = model.vision_model.post_layernorm(features) + self.table[self.seen]
        context = torch.cat([*self.visual.frames(), frame])
        rows = model.qformer.embeddings(input_ids=self.ids, query_embeds=model.query_tokens)[0]
        real = torch.cat([torch.ones(N, dtype=torch.bool), self.mask])
        for layer, bank in zip(model.qformer.encoder.layer, self.hidden, strict=True):
            past, inputs = bank.frames(), rows
            attended = attend(
                layer.attention.attention,
                inputs,
                torch.cat([*past, inputs]),
                real.repeat(len(past) + 1),
            )
            rows = layer.attention.output(attended, inputs)
            bank.remember(inputs)
            queries, text = rows[:N], rows[N:]
            if layer.has_cross_attention:
                attended = attend(layer.crossattention.attention, queries, context)
                queries = layer.crossattention.output(attended, queries)
            queries, text = layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(text)
            rows = torch.cat([queries, text])
        self.visual.remember(frame)
        self.seen += 1
        return rows[:N]


def attend(attention, rows, context, real=None) -> torch.Tensor:
    """[Q, E] reads [K, …], where ``real`` bool[K] is true."""

    def split(x):
        return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(0, 1)

    query, key, value = (
        split(getattr(attention, name)(x))
        for name, x in (("query", rows), ("key", context), ("value", context))
    )
    logits = query @ key.mT / query.shape[-1] ** 0.5
    if real is not None:
        logits = logits.masked_fill(~real, -torch.inf)
    return (torch.softmax(logits, dim=-1) @ value).transpose(0, 1).flatten(1)


def make_loops(model, table: torch.Tensor, limit: int) -> list[MergingLoop]:
    rows = zip(QUESTION.qformer_ids, QUESTION.qformer_mask, strict=True)
    return [MergingLoop(model, table, limit, ids, mask) for ids, mask in rows]


def check_bank(ours, bank: Bank, seen: int) -> None:
    """Compares one bank of one video; ours also has rows for words that the question lacks."""
    held, rows = len(bank.frames()), len(bank.slots)
    assert ours.count == held == min(seen, bank.limit)
    if held:
        oracle.assert_close(ours.entries[:held, :rows], torch.stack(bank.frames()))
        clear = [position for position in range(rows) if position not in bank.constant]
        sizes = ours.sizes[:held, :rows]
        assert np.array_equal(sizes[:, clear], bank.sizes()[:, clear])
        assert (sizes.sum(0) == seen).all()


@pytest.mark.parametrize(("limit", "chunk"), [(3, 1), (3, 4), (1, 3)])
def test_queries_and_banks_equal_the_torch_loop(model, params, features, limit, chunk):
    """After every frame, or every chunk: below, at and far above what the banks hold."""
    config = dataclasses.replace(BASE, memory=MemoryConfig("merge", bank_frames=limit))
    read = jax.jit(functools.partial(AdaCM2(config).apply, method="read"))
    state = init_state(config, jnp.zeros(2, jnp.int32))
    loops = make_loops(model, torch.from_numpy(params["temporal_embed"]), limit)
    expected = list(torch.zeros(state.queries.shape))
    for start in range(0, VALID.shape[1], chunk):
        part, valid = features[:, start : start + chunk], VALID[:, start : start + chunk]
        state = read({"params": params}, part, valid, QUESTION, state)
        for row, loop in enumerate(loops):
            for frame in part[row, valid[row]]:
                expected[row] = loop.read(torch.from_numpy(frame))
        oracle.assert_close(state.queries, torch.stack(expected))
        memory = jax.tree.map(np.asarray, state.memory)
        for row, loop in enumerate(loops):
            visual = jax.tree.map(lambda leaf, row=row: leaf[row], memory.visual)
            check_bank(visual, loop.visual, loop.seen)
            for number, bank in enumerate(loop.hidden):
                place = (*divmod(number, BASE.qformer.cross_attention_every), row)
                check_bank(
                    jax.tree.map(lambda leaf, place=place: leaf[place], memory.hidden),
                    bank,
                    loop.seen,
                )
    assert state.frames_seen.tolist() == [loop.seen for loop in loops] == [12, 5]
    if limit > 1:
        # Sizes may be compared: no choice was closer than the rounding of the similarities.
        banks = [bank for loop in loops for bank in (loop.visual, *loop.hidden)]
        assert min(bank.margin for bank in banks) > oracle.TOLERANCE
        # What enters the first layer is the same at every frame. So is the text in the second one:
        # it has not met a query yet that has read the video.
        text = set(range(N, N + WORDS))
        for loop in loops:
            found = [bank.constant for bank in (loop.visual, *loop.hidden)]
            assert found == [set(), text | set(range(N)), text, set(), set()]


def test_the_gradient_equals_that_of_the_torch_loop(model, params, features):
    """Banks are detached there, so only the pass of each video's last frame counts."""
    limit = 3
    config = dataclasses.replace(BASE, memory=MemoryConfig("merge", bank_frames=limit))
    upstream = np.random.default_rng(10).normal(size=(2, N, BASE.qformer.width)).astype(np.float32)

    learned = {name: params[name] for name in ("ln_vision", "temporal_embed", "qformer")}

    @jax.jit
    @jax.grad
    def gradient(learned):
        state = init_state(config, jnp.zeros(2, jnp.int32))
        apply = functools.partial(AdaCM2(config).apply, {"params": learned}, method="read")
        return (apply(features, VALID, QUESTION, state).queries * upstream).sum()

    ours = gradient(learned)
    learner = copy.deepcopy(model).requires_grad_(True)
    table = torch.from_numpy(params["temporal_embed"]).requires_grad_(True)
    for row, loop in enumerate(make_loops(learner, table, limit)):
        for frame in features[row, VALID[row]]:
            queries = loop.read(torch.from_numpy(frame))
        (queries * torch.from_numpy(upstream[row])).sum().backward()
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in learner.named_parameters()
    }
    theirs = names.instructblip(gradients, BASE) | {"temporal_embed": table.grad.numpy()}
    assert set(np.flatnonzero(np.abs(theirs["temporal_embed"]).max(1))) == {4, 11}
    for part, mine in ours.items():
        pairs = list(zip(jax.tree.leaves(mine), jax.tree.leaves(theirs[part]), strict=True))
        # Some are zero but for rounding, such as those of biases on keys: relative to the part.
        largest = max(np.abs(leaf).max() for _, leaf in pairs)
        assert largest > 0
        for leaf, other in pairs:
            assert np.abs(leaf - other).max() <= oracle.TOLERANCE * largest
