"""The few building blocks that the networks share, with PyTorch's numerics where they differ."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adacm2_jax.config import QUANTIZED
from adacm2_jax.models import int8_product
from adacm2_jax.models.cuda import has_cuda

Init = Callable[..., jax.Array]
ZEROS, ONES = nn.initializers.zeros, nn.initializers.ones


def fan_in(num_inputs: int = 1, stacked: bool = False) -> Init:
    """Normal, of variance 1 / (product of the ``num_inputs`` input axes).

    At full width this is close to the 0.02 of BERT and LLaMA; at a small one 0.02 would all but
    silence every branch beside its residual. ``stacked`` says that axis 0 is a stack of layers.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
        inputs = shape[int(stacked) :][:num_inputs]
        return jax.random.normal(key, shape, dtype) * math.prod(inputs) ** -0.5

    return init


def embedding(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Normal rows of about unit length, for tables and learned tokens."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def param(
    module: nn.Module,
    name: str,
    init: Init,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: str = "float32",
):
    """Declares a parameter and names its logical axes (see ``sharding.RULES``).

    Every parameter of every network is made here.
    """
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))


def wide(x: jax.Array) -> jax.Array:
    """In float32, where norms, softmax, scores and losses are computed; float64 stays as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rematerialised(layer: type[nn.Module], remat: bool) -> type[nn.Module]:
    """A layer to be scanned over; with ``remat`` it keeps no activations for the backward pass."""
    return nn.remat(layer, prevent_cse=False) if remat else layer


def one_by_one(
    body: Callable, layers: Any, carry: Any, frames: tuple, axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """Scans ``body(layers, carry, *frame)`` over frames; what comes of them is stacked in front.

    Args:
      layers: a module, or a function that has its parameters.
      frames: arrays, each with the frames along its one of the ``axes``.
    """
    if isinstance(layers, nn.Module):
        loop = nn.scan(
            body,
            variable_broadcast="params",
            split_rngs={"params": False, "dropout": True},
            in_axes=axes,
        )
        return loop(layers, carry, *frames)
    in_front = [jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(frames, axes, strict=True)]
    return jax.lax.scan(lambda carry, frame: body(layers, carry, *frame), carry, in_front)


class Dense(nn.Module):
    """``x @ kernel + bias``, over one or several axes, e.g. ``[…, E] → […, H, D]``.

    Attributes:
      shape: of the kernel, input axes first.
      axes: logical names of the kernel's axes.
      num_inputs: how many of the axes are contracted.
      use_bias: whether there is a bias (over the output axes).
      widen: by :func:`wide_product`.
      flat: the bias is added before the output is taken apart into several axes, which a GPU's
        library of products then does within the product.
      quantize: how the kernel is kept, one of ``config.QUANTIZED``; see ``models/quantized.py``.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    use_bias: bool = True
    widen: bool = False
    flat: bool = False
    quantize: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.quantize:
            return self._quantized(x)
        kernel = param(self, "kernel", fan_in(self.num_inputs), self.shape, self.axes).astype(
            x.dtype
        )
        y = wide_product(x, kernel) if self.widen else jnp.tensordot(x, kernel, self.num_inputs)
        if not self.use_bias:
            return y
        outputs = slice(self.num_inputs, None)
        bias = param(self, "bias", ZEROS, self.shape[outputs], self.axes[outputs]).astype(y.dtype)
        if self.flat:
            rows = y.shape[: y.ndim - bias.ndim]
            return (y.reshape(*rows, bias.size) + bias.reshape(-1)).reshape(y.shape)
        return y + bias

    def _quantized(self, x: jax.Array) -> jax.Array:
        """The same without a bias, by a kernel of eight bits whose outputs are scaled.

        Scaled is what comes out, not the kernel: so it is widened within the product, and a GPU
        reads eight bits of it. The sum is rounded once.
        """
        count, dtype = self.num_inputs, QUANTIZED[self.quantize]
        kernel = param(self, "kernel", ZEROS, self.shape, self.axes, dtype)
        shape, axes = (1,) * count + self.shape[count:], ("one",) * count + self.axes[count:]
        scale = param(self, "scale", ONES, shape, axes).reshape(self.shape[count:])
        depth, rows = math.prod(self.shape[:count]), x.shape[: x.ndim - count]
        y = int8_product.product(x.reshape(*rows, depth), kernel.reshape(depth, -1))
        return (y.reshape(*rows, *self.shape[count:]) * scale).astype(x.dtype)


@jax.custom_vjp
def wide_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[… , W] @ [W, V] as it is added up, in float32: not rounded to half precision.

    Its gradient is that of a product in ``x.dtype``, so that no weight is ever widened.
    """
    return jnp.matmul(x, kernel, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _wide_product_forward(x: jax.Array, kernel: jax.Array):
    return wide_product(x, kernel), (x, kernel)


def _wide_product_backward(saved, gradient: jax.Array):
    return jax.vjp(jnp.matmul, *saved)[1](gradient.astype(saved[0].dtype))


wide_product.defvjp(_wide_product_forward, _wide_product_backward)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis in float32, by the two-pass variance of PyTorch."""

    epsilon: float
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ONES, (x.shape[-1],), (self.axis,))
        bias = param(self, "bias", ZEROS, (x.shape[-1],), (self.axis,))
        return layer_norm(x, scale, bias, self.epsilon)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """What :class:`LayerNorm` computes, […, W] by two parameters [W]."""
    full = wide(x)
    centred = full - full.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + epsilon) * scale + bias).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x·Φ(x), in float32 inside.

    ``jax.nn.gelu(approximate=False)`` is the same function by erfc, which takes longer on a CPU.
    """
    full = wide(x)
    return (0.5 * full * (1 + jax.lax.erf(full * math.sqrt(0.5)))).astype(x.dtype)


def fused_gelu(x: jax.Array) -> jax.Array:
    """:func:`gelu` in half precision within the product that ``x`` is the result of, where the
    program is for an NVIDIA GPU and compiled with :func:`cuda.compiler_options`.

    cuBLASLt has a GELU of its own for that, by tanh, of the sum before it is rounded. It is 4.8e-4
    off the exact one at most; root mean square, less than an eighth of what rounding the sum to
    bfloat16 costs, and less than what float16 costs. float32 and every other device have
    :func:`gelu`.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16) or not has_cuda():
        return gelu(x)
    by_tanh = functools.partial(jax.nn.gelu, approximate=True)
    return jax.lax.platform_dependent(x, cuda=by_tanh, default=gelu)


class Mlp(nn.Module):
    """Two dense layers with the exact (erf) GELU between them; ``fused``: by :func:`fused_gelu`."""

    width: int
    mlp_width: int
    axis: str
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense((self.width, self.mlp_width), (self.axis, "mlp"), name="up")(x)
        x = (fused_gelu if self.fused else gelu)(x)
        return Dense((self.mlp_width, self.width), ("mlp", self.axis), name="down")(x)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Softmax attention with probabilities in float32.

    Args:
      query: [B, Q, H, D].
      key: [B, K, H, D].
      value: [B, K, H, D].
      mask: bool, broadcastable to [B, H, Q, K]; true where attention is allowed.
      dropout: None, or a function of the probabilities.

    Returns:
      [B, Q, H, D].
    """
    precision = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=precision)
    logits = logits * query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(precision).min)
    probs = jax.nn.softmax(logits)
    if dropout is not None:
        probs = dropout(probs)
    return jnp.einsum("bhqk,bkhd->bqhd", probs.astype(value.dtype), value)


def attention_behind(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shared_key: jax.Array,
    shared_value: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """:func:`attention` to what groups of rows share, and behind it to what each row has itself.

    As if the shared keys and values were repeated for each row and stood in front of its own.

    Args:
      query: [G·R, Q, H, D], R rows of each of G groups.
      key, value: [G·R, K, H, D].
      shared_key, shared_value: [G, J, H, D].
      mask: bool, broadcastable to [G·R, H, Q, J + K].

    Returns:
      [G·R, Q, H, D].
    """
    precision = jnp.promote_types(query.dtype, jnp.float32)
    rows, groups, places = len(query), len(shared_key), shared_key.shape[1]

    def grouped(x: jax.Array) -> jax.Array:
        return x.reshape(groups, rows // groups, *x.shape[1:])

    wide_einsum = functools.partial(jnp.einsum, preferred_element_type=precision)
    own = wide_einsum("bqhd,bkhd->bhqk", query, key)
    shared = wide_einsum("grqhd,gkhd->grhqk", grouped(query), shared_key)
    logits = jnp.concatenate([shared.reshape(*own.shape[:3], places), own], axis=3)
    logits = jnp.where(mask, logits * query.shape[-1] ** -0.5, jnp.finfo(precision).min)
    probs = jax.nn.softmax(logits).astype(value.dtype)
    of_shared, of_own = probs[..., :places], probs[..., places:]
    y = wide_einsum("grhqk,gkhd->grqhd", grouped(of_shared), shared_value).reshape(query.shape)
    return (y + wide_einsum("bhqk,bkhd->bqhd", of_own, value)).astype(value.dtype)


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """:func:`attention` without a mask, by cuDNN's kernel where the program is for an NVIDIA GPU.

    That kernel has no array of all logits in memory. It computes in half precision alone, with
    sums and softmax in float32; float32 and every other device have :func:`attention`.

    Args:
      query, key, value: [B, Q, H, D], [B, K, H, D], [B, K, H, D]; D a multiple of 8, at most 128.
    """
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not has_cuda():
        return attention(query, key, value)
    return jax.lax.platform_dependent(query, key, value, cuda=_cudnn_attention, default=attention)


def _cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
