"""The kernels for NVIDIA GPUs, interpreted, against float64 in numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adacm2_jax.config import tiny
from adacm2_jax.inference.steps import encode, encoder
from adacm2_jax.models import fused_norm, int8_product
from adacm2_jax.models.adacm2 import AdaCM2, init_params
from adacm2_jax.models.layers import Dense
from adacm2_jax.models.params import unstacked
from tests.small import quick_compilation

EPS = 1e-6


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("width", [24, 128, 1408])
def test_a_sum_and_its_norm_in_one_kernel(width):
    x, added, scale, bias = (
        draw(i, *s) for i, s in enumerate([(2, 3, width)] * 2 + [(width,)] * 2)
    )
    added = jnp.asarray(added, jnp.bfloat16)
    run = functools.partial(fused_norm.by_kernel, epsilon=EPS, interpret=True)
    stream, normed = run(x, added, scale, bias)
    total = x.astype(np.float64) + np.asarray(added, np.float64)
    exact = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + EPS)
    exact = exact * scale + bias
    assert stream.dtype == jnp.float32 and normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(stream, total, rtol=2.0**-24, atol=0)
    # Rounded once to half precision; what it is made of carries a few roundings of float32.
    close = np.abs(np.asarray(normed, np.float64) - exact)
    assert (close <= 2.0**-8 * np.abs(exact) + 2.0**-20 * np.abs(exact).max()).all()


def test_where_there_is_no_nvidia_gpu_xla_adds_and_normalises():
    x, added, scale, bias = (draw(i, *s) for i, s in enumerate([(4, 24)] * 2 + [(24,)] * 2))
    found = jax.jit(functools.partial(fused_norm.add_and_norm, epsilon=EPS))(x, added, scale, bias)
    wanted = jax.jit(functools.partial(fused_norm.plain, epsilon=EPS))(x, added, scale, bias)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("rows, depth, width", [(1, 256, 300), (3, 700, 129), (4, 1000, 512)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_by_a_matrix_of_eight_bits(rows, depth, width, dtype):
    """Also where a program's part ends in the middle."""
    x = jnp.asarray(draw(0, rows, depth), dtype)
    matrix = np.random.default_rng(1).integers(-127, 128, (depth, width)).astype(np.int8)
    found = int8_product.by_kernel(x, jnp.asarray(matrix), interpret=True)
    terms = np.abs(np.asarray(x, np.float64)) @ np.abs(matrix.astype(np.float64))
    exact = np.asarray(x, np.float64) @ matrix.astype(np.float64)
    # A sum of n terms carries at most n roundings of the sum of their magnitudes.
    assert (np.abs(np.asarray(found, np.float64) - exact) <= depth * 2.0**-24 * terms).all()


@pytest.mark.parametrize(
    "shape", [int8_product.Shape(wide=32, tall=16, parts=3, ahead=3), int8_product.SHAPE]
)
def test_how_the_work_is_dealt_out_does_not_matter(shape):
    x, matrix = draw(0, 2, 5, 384), np.random.default_rng(1).integers(-127, 128, (384, 96))
    found = int8_product.by_kernel(x, jnp.asarray(matrix, jnp.int8), shape, interpret=True)
    assert found.shape == (2, 5, 96)
    off = np.abs(np.asarray(found, np.float64) - x.astype(np.float64) @ matrix)
    # At most as many roundings as terms, each of at most the sum of their magnitudes.
    assert (off <= 384 * 2.0**-24 * (np.abs(x) @ np.abs(matrix))).all()


def test_a_quantised_layer_without_an_nvidia_gpu_multiplies_by_xla():
    """Over two input axes, as the output of attention has them."""
    layer = Dense((4, 8, 6), ("heads", "head_dim", "embed"), 2, use_bias=False, quantize="int8")
    kernel = np.random.default_rng(1).integers(-127, 128, (4, 8, 6)).astype(np.int8)
    scale = np.abs(draw(2, 1, 1, 6))
    x = draw(0, 2, 3, 4, 8)
    found = layer.apply({"params": {"kernel": kernel, "scale": scale}}, x)
    exact = np.tensordot(x.astype(np.float64), kernel.astype(np.float64), 2) * scale[0, 0]
    terms = np.tensordot(np.abs(x), np.abs(kernel.astype(np.float64)), 2) * scale[0, 0]
    # 32 terms and the scale: a rounding each, of at most the sum of the terms' magnitudes.
    assert (np.abs(np.asarray(found, np.float64) - exact) <= 33 * 2.0**-24 * terms).all()


def test_a_model_with_epilogues_encodes_alike_where_there_is_no_nvidia_gpu():
    """And the compiler takes the options, which are not for it."""
    plain, fused = (tiny(dtype="bfloat16", fused_epilogues=way) for way in (False, True))
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 56, 56, 3), np.uint8)
    with quick_compilation():
        params = jax.jit(init_params, static_argnums=0)(plain, jax.random.key(0))
    params = unstacked(nn.unbox(params))
    assert encoder(plain) is encode and encoder(fused) is not encode
    found, wanted = (encoder(config)(AdaCM2(config), params, frames) for config in (fused, plain))
    np.testing.assert_array_equal(found, wanted)
