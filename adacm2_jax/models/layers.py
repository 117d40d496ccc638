"""The few building blocks that the networks share, with PyTorch's numerics where they differ."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

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


def param(module: nn.Module, name: str, init: Init, shape: tuple[int, ...], axes: tuple[str, ...]):
    """Declares a float32 parameter and names its logical axes (see ``sharding.RULES``).

    Every parameter of every network is made here.
    """
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """In float32, where norms, softmax, scores and losses are computed; float64 stays as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rematerialised(layer: type[nn.Module], remat: bool) -> type[nn.Module]:
    """A layer to be scanned over; with ``remat`` it keeps no activations for the backward pass."""
    return nn.remat(layer, prevent_cse=False) if remat else layer


class Dense(nn.Module):
    """``x @ kernel + bias``, over one or several axes, e.g. ``[…, E] → […, H, D]``.

    Attributes:
      shape: of the kernel, input axes first.
      axes: logical names of the kernel's axes.
      num_inputs: how many of the axes are contracted.
      use_bias: whether there is a bias (over the output axes).
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_inputs: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = param(self, "kernel", fan_in(self.num_inputs), self.shape, self.axes).astype(
            x.dtype
        )
        y = jnp.tensordot(x, kernel, self.num_inputs)
        if self.use_bias:
            outputs = slice(self.num_inputs, None)
            y = y + param(self, "bias", ZEROS, self.shape[outputs], self.axes[outputs]).astype(
                y.dtype
            )
        return y


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis in float32, by the two-pass variance of PyTorch."""

    epsilon: float
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ONES, (x.shape[-1],), (self.axis,))
        bias = param(self, "bias", ZEROS, (x.shape[-1],), (self.axis,))
        full = wide(x)
        centred = full - full.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x·Φ(x), in float32 inside.

    ``jax.nn.gelu(approximate=False)`` is the same function by erfc, which takes longer on a CPU.
    """
    full = wide(x)
    return (0.5 * full * (1 + jax.lax.erf(full * math.sqrt(0.5)))).astype(x.dtype)


class Mlp(nn.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    width: int
    mlp_width: int
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense((self.width, self.mlp_width), (self.axis, "mlp"), name="up")(x)
        x = gelu(x)
        return Dense((self.mlp_width, self.width), ("mlp", self.axis), name="down")(x)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, dropout=None
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
