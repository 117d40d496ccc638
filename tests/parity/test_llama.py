"""The LLaMA decoder against Hugging Face's: whole sequences, and token by token with the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adacm2_jax.config import LlamaConfig, tiny
from adacm2_jax.models.llama import Llama, init_cache
from tests.parity import names, oracle

TINY = tiny().llm
SIZES = {
    "all heads": dataclasses.replace(TINY, num_kv_heads=4),
    "grouped query": TINY,
    "one key head": dataclasses.replace(TINY, num_kv_heads=1, depth=3),
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "other constants": dataclasses.replace(TINY, rope_theta=1e5, rms_norm_eps=0.1),
}
LENGTHS, WIDTH = np.array([9, 4, 1]), 9


def build(config: LlamaConfig, seed: int):
    model = oracle.llama(config, seed)
    return model, {"params": names.llama(model.state_dict(), config)}


def prompts(config: LlamaConfig, extra: int = 0):
    """Left-padded prompts (``extra`` more tokens on the right): ids, mask, rotary positions."""
    width = WIDTH + extra
    ids = np.random.default_rng(3).integers(config.vocab_size, size=(len(LENGTHS), width))
    mask = np.arange(width) >= WIDTH - LENGTHS[:, None]
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def expected_logits(model, ids, mask, positions) -> torch.Tensor:
    ids, mask, positions = map(torch.from_numpy, (ids, mask, positions))
    return model(input_ids=ids, attention_mask=mask.long(), position_ids=positions).logits


def forward(module: Llama, ids, mask, positions, cache=None):
    hidden, cache = module(module.embed(ids, jnp.float32), mask, positions, cache)
    return module.logits(hidden), cache


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_the_oracle(size):
    config = SIZES[size]
    model, params = build(config, seed=7)
    ids, mask, positions = prompts(config)
    logits, _ = jax.jit(Llama(config).apply, static_argnames="method")(
        params, ids, mask, positions, method=forward
    )
    real = torch.from_numpy(mask)
    oracle.assert_close(logits[mask], expected_logits(model, ids, mask, positions)[real])


@pytest.mark.parametrize("size", ["grouped query", "tied"])
def test_prefill_and_single_steps_equal_the_oracles_whole_sequence(size):
    config, steps = SIZES[size], 5
    model, params = build(config, seed=8)
    ids, mask, positions = prompts(config, extra=steps)
    expected = expected_logits(model, ids, mask, positions)
    apply = jax.jit(Llama(config).apply, static_argnames="method")

    # Three places more than are needed: what is not written yet must not be seen.
    cache = init_cache(config, len(ids), WIDTH + steps + 3, jnp.float32)
    part = slice(0, WIDTH)
    logits, cache = apply(
        params, ids[:, part], mask[:, part], positions[:, part], cache, method=forward
    )
    oracle.assert_close(logits[mask[:, part]], expected[:, part][torch.from_numpy(mask[:, part])])
    for i in range(WIDTH, WIDTH + steps):
        part = slice(i, i + 1)
        logits, cache = apply(
            params, ids[:, part], mask[:, part], positions[:, part], cache, method=forward
        )
        oracle.assert_close(logits, expected[:, part])
    assert cache.index == WIDTH + steps


def test_bare_positions_without_padding_are_the_oracles_default():
    model, params = build(TINY, seed=9)
    ids, _, _ = prompts(TINY)
    mask = np.ones_like(ids, bool)
    positions = np.broadcast_to(np.arange(WIDTH), ids.shape)
    logits, _ = Llama(TINY).apply(params, ids, mask, positions, method=forward)
    oracle.assert_close(logits, model(input_ids=torch.from_numpy(ids)).logits)
