"""Two mappings of PyTorch's names, written apart, agree: ``port/names.py`` and the tests' own."""

import dataclasses

import numpy as np
import pytest
from flax import traverse_util

from adacm2_jax.config import tiny
from adacm2_jax.port.names import hf_table, llama_table
from adacm2_jax.port.rules import Table
from tests.parity import names, oracle, ours

TINY = tiny()
SIZES = {
    "tiny": TINY,
    "odd": tiny(
        vision=dataclasses.replace(TINY.vision, width=60, num_heads=5, mlp_width=100, depth=1),
        qformer=dataclasses.replace(
            TINY.qformer, width=72, depth=6, num_heads=3, cross_attention_every=3, num_queries=7
        ),
        llm=dataclasses.replace(TINY.llm, num_kv_heads=1, depth=3, tie_embeddings=True),
    ),
    "every layer reads": tiny(
        qformer=dataclasses.replace(TINY.qformer, depth=3, cross_attention_every=1),
        llm=dataclasses.replace(TINY.llm, num_kv_heads=4, vocab_size=40),
    ),
}


def by_table(table: Table, state: dict, shapes: dict) -> dict:
    state = {name: tensor.numpy() for name, tensor in state.items()}
    theirs = {name: tensor.shape for name, tensor in state.items()}
    return ours.params_by_table(table, shapes, theirs, lambda name, rows: state[name][rows])


def assert_identical(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, err_msg=path, strict=True)


@pytest.mark.parametrize("size", SIZES)
def test_instructblip(size):
    config = SIZES[size]
    state = oracle.instructblip(config, seed=12).state_dict()
    expected = traverse_util.flatten_dict(names.instructblip(state, config), sep="/")
    del expected["temporal_embed"]  # InstructBLIP has none
    found = by_table(hf_table(config), state, ours.param_shapes(config))
    assert_identical(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_a_bare_language_model(size):
    config = SIZES[size].llm
    state = oracle.llama(config, seed=13).state_dict()
    expected = traverse_util.flatten_dict(names.llama(state, config), sep="/")
    shapes = {path: values.shape for path, values in expected.items()}
    assert_identical(by_table(llama_table(config), state, shapes), expected)
