"""Matrices in eight bits: what they are, by NumPy, and what a product by them is."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh

from adacm2_jax.config import QUANTIZED, LlamaConfig, instructblip_vicuna_7b, tiny
from adacm2_jax.errors import UserError
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.models.layers import Dense
from adacm2_jax.models.llama import Llama
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, unstacked
from adacm2_jax.models.quantized import kind_of, quantize, refuse_learning_quantized
from adacm2_jax.plan.steps import device_bytes
from adacm2_jax.sharding import make_mesh
from tests.small import quick_compilation

FROZEN = (("temporal_embed", 1.0), (".*", None))
#: Shapes of one layer's matrix and of its scales: one input axis, and two.
SHAPES = [((48, 4, 6), (1, 4, 6)), ((4, 6, 48), (1, 1, 48))]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


def with_llm(config, **fields):
    return dataclasses.replace(config, llm=dataclasses.replace(config.llm, **fields))


def weights(shape, seed=0) -> np.ndarray:
    """Normal, with an outlier, a channel of zeros and one of a single number."""
    made = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    made[0, ..., 1] *= 40
    made[..., 2] = 0
    made[..., 3] = -0.37
    return made


@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_int8_is_the_nearest_step_of_every_channel(shape, scale_shape, stored):
    """By float64 and in NumPy alone. 127 and a half steps reach the largest of a channel."""
    given = weights(shape).astype(jnp.dtype(stored))
    values, scale = map(np.asarray, quantize(given, scale_shape, "int8"))
    assert values.dtype == np.int8 and scale.dtype == np.float32
    assert values.shape == shape and scale.shape == scale_shape
    inputs = tuple(axis for axis, size in enumerate(scale_shape) if size == 1)
    exact = given.astype(np.float64)
    step = np.abs(exact).max(inputs, keepdims=True) / 127.5
    np.testing.assert_allclose(scale, np.where(step == 0, 1, step), rtol=2**-22)
    wanted = exact / scale.astype(np.float64)
    # Within half a step; a quotient that float32 rounds is off by 127.5 · 2⁻²³ of a step at most.
    assert np.abs(wanted - values).max() <= 0.5 + 127.5 * 2**-23
    assert np.abs(exact - values * scale.astype(np.float64)).max() <= scale.max() * 0.5001
    apart = np.abs(np.abs(wanted % 1) - 0.5) > 1e-4  # from a tie
    nearest = np.clip(np.rint(wanted), -127, 127)
    assert apart.mean() > 0.8 and np.array_equal(values[apart], nearest[apart])


def test_fp8_is_the_nearest_number_of_three_bits():
    shape, scale_shape = SHAPES[0]
    given = weights(shape)
    values, scale = map(np.asarray, quantize(given, scale_shape, "float8_e4m3fn"))
    assert np.abs(values.astype(np.float32)).max() == 448  # its largest number
    wanted = given.astype(np.float64) / scale
    # Half of the last of three bits; below 2⁻⁶ the steps are all 2⁻⁹.
    bound = np.maximum(np.abs(wanted) * 2**-4, 2**-10) * 1.0001
    assert (np.abs(wanted - values.astype(np.float64)) <= bound).all()
    nearest = (given / scale).astype(ml_dtypes.float8_e4m3fn)
    assert (values.view(np.uint8) == nearest.view(np.uint8)).mean() > 0.999


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES)
def test_a_product_is_that_of_the_kernel_times_its_scales(kind, dtype, shape, scale_shape):
    """In float64; values are exact in half precision, so that the result alone is rounded."""
    count = scale_shape.count(1)
    values, scale = quantize(weights(shape), scale_shape, QUANTIZED[kind])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, *shape[:count])), dtype)
    axes = ("llm_embed", "llm_heads", "head_dim")
    dense = Dense(shape, axes, num_inputs=count, use_bias=False, quantize=kind)
    found = jax.jit(dense.apply)({"params": {"kernel": values, "scale": scale}}, x)
    assert found.dtype == x.dtype
    matrix = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    exact = np.tensordot(np.asarray(x, np.float64), matrix, count)
    size = np.tensordot(np.abs(np.asarray(x, np.float64)), np.abs(matrix), count)
    unit = float(jnp.finfo(dtype).eps) / 2
    bound = unit * np.abs(exact) + 24 * 2**-23 * size
    assert (np.abs(np.asarray(found, np.float64) - exact) <= bound * 1.01).all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_stacked_layers_and_layers_apart_give_the_same(kind):
    config = with_llm(tiny(), quantize=kind)
    params = made(config)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, config.llm.width)), jnp.float32)
    run = jax.jit(lambda params: Llama(config.llm).apply({"params": params}, x, *rows(x))[0])
    whole = run(params["llm"])
    apart = unstacked(params)["llm"]
    assert kind_of(apart["layers"][0]["gate"]["kernel"].dtype) == kind
    np.testing.assert_allclose(run(apart), whole, rtol=1e-5, atol=1e-5)


def test_quantising_moves_hidden_states_a_little():
    """Not more than the rounding of every matrix can: nowhere near the states themselves."""
    plain, kept = made(tiny()), made(with_llm(tiny(), quantize="int8"))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, tiny().llm.width)), jnp.float32)
    found = {
        kind: np.asarray(
            Llama(with_llm(tiny(), quantize=kind).llm).apply(
                {"params": params["llm"]}, x, *rows(x)
            )[0]
        )
        for kind, params in (("", plain), ("int8", kept))
    }
    error = np.linalg.norm(found["int8"] - found[""]) / np.linalg.norm(found[""])
    assert 1e-4 < error < 0.05


def rows(x: jax.Array):
    """A mask and positions for all of [B, S, W]."""
    return jnp.ones(x.shape[:2], bool), jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@functools.cache
def drawn(config) -> dict:
    abstract = abstract_params(config, FROZEN, make_mesh((-1, 1)))
    only = [path for path in traverse_util.flatten_dict(abstract, sep="/") if path[:4] == "llm/"]
    return fresh_params(config, abstract, 0, only)


def made(config) -> dict:
    """A language model's fresh parameters, which their user may use up."""
    return join_params(jax.tree.map(jnp.copy, drawn(config)), {})


def test_only_the_matrices_of_the_language_model_s_layers_are_quantised():
    config = with_llm(tiny(dtype="bfloat16"), quantize="int8")
    abstract = abstract_params(config, FROZEN, make_mesh((-1, 1)))
    flat = traverse_util.flatten_dict(abstract, sep="/")
    names = ("query", "key", "value", "out", "gate", "up", "down")
    kernels = {f"llm/layers/{name}/kernel" for name in names}
    assert {path for path, leaf in flat.items() if kind_of(leaf.dtype)} == kernels
    assert flat["llm/layers/out/scale"].shape == (2, 1, 1, 96)
    assert flat["llm/layers/query/scale"].shape == (2, 1, 4, 24)
    assert {flat[f"llm/layers/{name}/scale"].dtype for name in names} == {np.dtype(np.float32)}
    assert flat["llm/lm_head/kernel"].dtype == flat["llm/token_embed"].dtype == jnp.bfloat16


def test_fresh_parameters_are_the_same_draw_quantised():
    whole, kept = made(tiny()), made(with_llm(tiny(), quantize="int8"))
    one, stack = kept["llm"]["layers"]["gate"], whole["llm"]["layers"]["gate"]["kernel"]
    assert np.abs(one["kernel"] * one["scale"] - stack).max() <= np.max(one["scale"]) * 0.501
    np.testing.assert_array_equal(kept["llm"]["token_embed"], whole["llm"]["token_embed"])


def test_scales_are_split_over_devices_as_their_kernel_s_outputs():
    config = with_llm(instructblip_vicuna_7b(dtype="bfloat16"), quantize="int8")
    llm = abstract_params(config, FROZEN, AbstractMesh((2, 4), ("data", "model")))["llm"]["layers"]
    for name, layer in llm.items():
        if "kernel" in layer:
            kernel, scale = layer["kernel"].sharding.spec, layer["scale"].sharding.spec
            sizes = layer["scale"].shape
            for axis, size in enumerate(sizes):
                assert scale[axis] == (None if size == 1 else kernel[axis]), name
    assert tuple(llm["gate"]["scale"].sharding.spec) == (None, None, "model")
    assert tuple(llm["down"]["scale"].sharding.spec) == (None, None, "data")


@pytest.mark.parametrize("kind", QUANTIZED)
def test_full_size_is_below_ten_gigabytes(kind):
    """Vicuna-7B's layers at one byte a number, all else in bfloat16."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    config = with_llm(instructblip_vicuna_7b(dtype="bfloat16"), quantize=kind)
    whole = device_bytes(abstract_params(instructblip_vicuna_7b(dtype="bfloat16"), FROZEN, mesh))
    kept = device_bytes(abstract_params(config, FROZEN, mesh))
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    scales = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert whole - kept == matrices - 4 * scales
    assert kept < 10e9 < 15e9 < whole


def test_the_fingerprint_tells_quantised_parameters_from_others():
    prints = {fingerprint(made(with_llm(tiny(), quantize=kind))) for kind in ("", *QUANTIZED)}
    assert len(prints) == 3


def test_what_is_unknown_or_learns_is_refused():
    with pytest.raises(UserError, match=r"llm.quantize is 'int4'; it must be one of , int8, fp8"):
        LlamaConfig(quantize="int4")
    learned = {"llm/layers/up/kernel": jax.ShapeDtypeStruct((2, 3), jnp.int8)}
    with pytest.raises(UserError, match="quantize = 'int8', but llm/layers/up/kernel learns"):
        refuse_learning_quantized(learned)
    refuse_learning_quantized({"a": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_no_gradient_is_needed_of_what_is_frozen():
    """The gradient of the inputs is that of the kernel times its scales."""
    shape, scale_shape = SHAPES[0]
    values, scale = quantize(weights(shape), scale_shape, "int8")
    dense = Dense(shape, ("llm_embed", "llm_heads", "head_dim"), use_bias=False, quantize="int8")
    x = jnp.ones((2, shape[0]))

    def loss(x):
        return dense.apply({"params": {"kernel": values, "scale": scale}}, x).sum()

    matrix = np.asarray(values, np.float64) * np.asarray(scale)
    expected = np.broadcast_to(matrix.sum((1, 2)), x.shape)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-5, atol=1e-4)


def test_boxes_name_every_axis():
    dense = Dense((8, 2, 4), ("llm_embed", "llm_heads", "head_dim"), quantize="int8")
    boxed = dense.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert isinstance(boxed["scale"], nn.Partitioned)
    assert boxed["scale"].names == ("one", "llm_heads", "head_dim")
