"""The Q-Former on one frame against Hugging Face's: every layer, and who attends to what."""

import dataclasses

import numpy as np
import pytest
import torch

from adacm2_jax.config import QFormerConfig, tiny
from tests.parity import names, oracle, ours

TINY = tiny().qformer
SIZES = {
    "one pair, coarse epsilon": dataclasses.replace(TINY, depth=2, layer_norm_eps=0.1),
    "full depth": dataclasses.replace(TINY, depth=12),
    "every layer reads": dataclasses.replace(TINY, depth=2, cross_attention_every=1),
    "every third layer reads": dataclasses.replace(TINY, depth=6, cross_attention_every=3),
}


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


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_and_every_attention_probability_equal_the_oracle(size):
    config = SIZES[size]
    model, params = build(config, vision_width=80, seed=4)
    ids, mask = text(config, lengths=[7, 3, 0], width=7)  # the last is nothing but padding
    features = frame(batch=3, tokens=17, width=80)
    queries, scores, rows = ours.run(config, params, ids, mask, features)
    layers, probs = ours.run_layer_by_layer(config, params, rows, mask, features)
    expected, expected_layers, expected_probs = oracle.qformer(model, ids, mask, features)

    oracle.assert_close(queries, expected)
    assert len(expected_probs) == config.num_cross_layers
    # A token's score is the attention it receives, summed over heads and query rows.
    oracle.assert_close(scores, torch.stack([each.sum((1, 2)) for each in expected_probs]))
    for found, theirs in zip(probs, expected_probs, strict=True):
        oracle.assert_close(found, theirs)
    assert len(expected_layers) == config.depth
    for found, theirs in zip(layers, expected_layers, strict=True):
        oracle.assert_close(found, theirs)


def test_without_text_rows_it_equals_the_oracle():
    model, params = build(TINY, vision_width=80, seed=5)
    ids, mask = text(TINY, lengths=[0, 0], width=0)
    features = frame(batch=2, tokens=17, width=80)
    queries, scores, _ = ours.run(TINY, params, ids, mask, features)
    expected, _, probs = oracle.qformer(model, ids, mask, features)
    oracle.assert_close(queries, expected)
    oracle.assert_close(scores, torch.stack([each.sum((1, 2)) for each in probs]))
