"""The Q-Former on one frame against Hugging Face's: queries, and the scores in the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import MemoryConfig, QFormerConfig, tiny
from adacm2_jax.memory import Retention, in_time_order, init_memory
from adacm2_jax.models.qformer import Frames, QFormer
from adacm2_jax.policies import retention_plan
from tests.parity import names, oracle

TINY = tiny().qformer
SIZES = {
    "one pair, coarse epsilon": dataclasses.replace(TINY, depth=2, layer_norm_eps=0.1),
    "three pairs": dataclasses.replace(TINY, depth=6),
    "every layer reads": dataclasses.replace(TINY, depth=2, cross_attention_every=1),
    "every third layer reads": dataclasses.replace(TINY, depth=6, cross_attention_every=3),
}
FULL_WIDTH = QFormerConfig(vocab_size=100, max_positions=16, depth=2)


def build(config: QFormerConfig, vision_width: int, seed: int):
    vision = dataclasses.replace(tiny().vision, width=vision_width)
    whole = tiny(qformer=config, vision=vision, max_text_len=8)
    model = oracle.instructblip(whole, seed)
    return model, names.instructblip(model.state_dict(), whole)["qformer"]


def text(config: QFormerConfig, lengths: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows; the padding holds random words too, which nobody may read."""
    ids = np.random.default_rng(1).integers(config.vocab_size, size=(len(lengths), width))
    return ids.astype(np.int32), np.arange(width) < np.array(lengths)[:, None]


def frame(batch: int, tokens: int, width: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(batch, tokens, width)).astype(np.float32)


def run(config: QFormerConfig, params, ids, mask, features):
    """One frame with an empty memory that drops nothing: query rows, scores [L, B, P]."""
    batch, tokens, width = features.shape
    plan = retention_plan(
        MemoryConfig(policy="full", max_frames=1), tokens, config.num_cross_layers
    )
    layers = config.num_cross_layers
    retention = Retention(
        recent=jnp.asarray(plan.recent),
        older=jnp.asarray(plan.older),
        seed=jnp.zeros((layers, batch), jnp.uint32),
        max_older=int(plan.older.max()),
        ranking=plan.ranking,
    )
    head_dim = config.width // config.num_heads
    layer = init_memory(batch, config.num_heads, head_dim, plan.capacity, tokens, jnp.float32)
    memory = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (layers, *leaf.shape)), layer)
    module = QFormer(config, width)

    @jax.jit
    def apply(params, ids, mask, features):
        key, value = module.apply({"params": params}, features[:, None], method="project")
        one = jnp.ones((1, batch), bool)
        frames = Frames(key, value, index=jnp.zeros((1, batch), jnp.int32), valid=one)
        queries, after = module.apply({"params": params}, ids, mask, frames, memory, retention)
        return queries[:, 0], in_time_order(after)["score"][..., :tokens]

    return apply(params, ids, mask, features)


def run_oracle(model, ids, mask, features):
    batch, num_queries = len(features), model.query_tokens.shape[1]
    mask = np.concatenate([np.ones((batch, num_queries), bool), mask], axis=1)
    output = model.qformer(
        input_ids=torch.from_numpy(ids).long() if ids.shape[1] else None,
        attention_mask=torch.from_numpy(mask).long(),
        query_embeds=model.query_tokens.expand(batch, -1, -1),
        encoder_hidden_states=torch.from_numpy(features),
        output_attentions=True,
    )
    return output.last_hidden_state[:, :num_queries], output.cross_attentions


@pytest.mark.parametrize("size", SIZES)
def test_query_rows_and_scores_equal_the_oracle(size):
    config = SIZES[size]
    model, params = build(config, vision_width=80, seed=4)
    ids, mask = text(config, lengths=[7, 3, 0], width=7)  # the last is nothing but padding
    features = frame(batch=3, tokens=17, width=80)
    queries, scores = run(config, params, ids, mask, features)
    expected, attentions = run_oracle(model, ids, mask, features)
    oracle.assert_close(queries, expected)
    # A token's score is the attention it receives, summed over heads and query rows.
    assert len(attentions) == config.num_cross_layers
    oracle.assert_close(scores, torch.stack([probs.sum((1, 2)) for probs in attentions]))


def test_without_text_rows_it_equals_the_oracle():
    model, params = build(TINY, vision_width=80, seed=5)
    ids, mask = text(TINY, lengths=[0, 0], width=0)
    features = frame(batch=2, tokens=17, width=80)
    queries, scores = run(TINY, params, ids, mask, features)
    expected, attentions = run_oracle(model, ids, mask, features)
    oracle.assert_close(queries, expected)
    oracle.assert_close(scores, torch.stack([probs.sum((1, 2)) for probs in attentions]))


def test_at_full_width_it_equals_the_oracle():
    model, params = build(FULL_WIDTH, vision_width=1408, seed=6)
    ids, mask = text(FULL_WIDTH, lengths=[12, 5], width=12)
    features = frame(batch=2, tokens=257, width=1408)
    queries, scores = run(FULL_WIDTH, params, ids, mask, features)
    expected, attentions = run_oracle(model, ids, mask, features)
    assert queries.shape == (2, 32, 768)
    oracle.assert_close(queries, expected)
    oracle.assert_close(scores, torch.stack([probs.sum((1, 2)) for probs in attentions]))
