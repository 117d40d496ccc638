"""Products and attention in half precision, against exact arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from adacm2_jax.models.layers import (
    Dense,
    attention,
    attention_behind,
    fused_attention,
    fused_gelu,
    gelu,
    wide_product,
)
from tests.oracle import U

HALVES = ("bfloat16", "float16")


def normal(seed: int, *shape: int, dtype="bfloat16") -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, dtype)


@pytest.mark.parametrize("half", HALVES)
def test_a_wide_product_is_not_rounded_to_half_precision(half):
    x, kernel = normal(0, 3, 5, 64, dtype=half), normal(1, 64, 40, dtype=half)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    found = wide_product(x, kernel)
    assert found.dtype == jnp.float32
    # A sum of 64 products, each addition off by at most U of what has been added up.
    most = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(kernel, np.float64))
    assert (np.abs(found - exact) <= 64 * U * most).all()
    assert np.abs(found.astype(half).astype(np.float64) - exact).max() > (64 * U * most).max()


@pytest.mark.parametrize("half", HALVES)
def test_the_gradient_of_a_wide_product_is_that_of_one_in_half_precision(half):
    x, kernel = normal(0, 3, 64, dtype=half), normal(1, 64, 40, dtype=half)
    weights = normal(2, 3, 40, dtype=half)

    def loss(product):
        return lambda x, kernel: (product(x, kernel).astype(jnp.float32) * weights).sum()

    mine = jax.grad(loss(wide_product), (0, 1))(x, kernel)
    other = jax.grad(loss(jnp.matmul), (0, 1))(x, kernel)
    for found, expected, like in zip(mine, other, (x, kernel), strict=True):
        assert found.dtype == like.dtype
        assert np.array_equal(found, expected)


def test_in_float32_a_wide_product_is_the_product():
    x, kernel = normal(0, 3, 64, dtype="float32"), normal(1, 64, 40, dtype="float32")
    assert np.array_equal(jax.jit(wide_product)(x, kernel), jax.jit(jnp.matmul)(x, kernel))


@pytest.mark.parametrize("dtype", ("float32", *HALVES))
def test_what_rows_share_is_attended_to_as_if_each_had_it(dtype):
    groups, rows, width = 2, 3, 8
    query = normal(0, groups * rows, 2, 4, width, dtype=dtype)
    key, value = (normal(seed, groups * rows, 5, 4, width, dtype=dtype) for seed in (1, 2))
    before = [normal(seed, groups, 7, 4, width, dtype=dtype) for seed in (3, 4)]
    mask = np.random.default_rng(5).random((groups * rows, 1, 2, 12)) < 0.7
    found = attention_behind(query, key, value, *before, mask)
    whole = [
        np.concatenate([np.repeat(np.asarray(shared, np.float64), rows, axis=0), own], axis=1)
        for shared, own in zip(before, (key, value), strict=True)
    ]
    logits = np.einsum("bqhd,bkhd->bhqk", np.asarray(query, np.float64), whole[0]) * width**-0.5
    weights = np.where(mask, np.exp(logits - logits.max(-1, keepdims=True)), 0)
    probs = weights / weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", probs, whole[1])
    assert found.dtype == dtype
    # A probability and the sum are rounded once each; values are at most 4.
    bound = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", ("float32", *HALVES))
def test_fused_attention_is_plain_attention_where_there_is_no_nvidia_gpu(dtype):
    query, key, value = (normal(seed, 2, 7, 3, 8, dtype=dtype) for seed in range(3))
    found = jax.jit(fused_attention)(query, key, value)
    assert np.array_equal(found, jax.jit(attention)(query, key, value))


@pytest.mark.parametrize("dtype", ("float32", *HALVES))
def test_fused_gelu_is_plain_gelu_where_there_is_no_nvidia_gpu(dtype):
    x = normal(0, 5, 24, dtype=dtype)
    assert np.array_equal(jax.jit(fused_gelu)(x), jax.jit(gelu)(x))


@pytest.mark.parametrize("dtype, least", [("bfloat16", 8), ("float16", 1)])
def test_gelu_by_tanh_is_off_less_than_the_rounding_that_it_saves(dtype, least):
    """``least``: so many times. float64 by scipy, of sums whose standard deviation is 1."""
    x = np.random.default_rng(0).normal(size=100_000)
    exact = x * scipy.special.ndtr(x)
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    by_tanh = x / 2 * (1 + np.tanh(inner)) - exact
    assert np.abs(by_tanh).max() < 4.8e-4
    rounded = x.astype(jnp.dtype(dtype)).astype(np.float64)
    of_rounded = rounded * scipy.special.ndtr(rounded) - exact
    assert np.square(of_rounded).mean() ** 0.5 > least * np.square(by_tanh).mean() ** 0.5
    # It is the function that jax has.
    with jax.enable_x64(True):
        found = np.asarray(jax.nn.gelu(x, approximate=True))
    np.testing.assert_allclose(found, by_tanh + exact, rtol=1e-12, atol=1e-14)


def test_a_bias_is_the_same_before_and_after_the_output_is_taken_apart():
    x, kernel, bias = normal(0, 3, 16), normal(1, 16, 4, 6), normal(2, 4, 6)
    given = {"params": {"kernel": kernel, "bias": bias}}
    layers = (Dense((16, 4, 6), ("embed", "heads", "head_dim"), flat=flat) for flat in (0, 1))
    found = [layer.apply(given, x) for layer in layers]
    assert found[1].shape == (3, 4, 6)
    assert np.array_equal(*found)
