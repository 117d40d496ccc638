"""What stands between two products of a ViT block, as one kernel for NVIDIA GPUs.

A block adds to the residual stream and normalises the sum. XLA makes two or three kernels of it,
which read the stream, float32, two or three times; here one kernel (Pallas for Triton) reads a row
of the stream once, keeps it, and writes sum and norm. It has no gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adacm2_jax.models.cuda import has_cuda
from adacm2_jax.models.layers import layer_norm


def add_and_norm(
    x: jax.Array, added: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Adds to a residual stream and normalises: by one kernel where the program is for an NVIDIA
    GPU.

    Args:
      x: float32[…, W].
      added: […, W], of the type of the products.
      scale, bias: float32[W].
      epsilon: of the norm.

    Returns:
      x + added, float32, and its layer norm in the type of ``added``.
    """
    plainly = functools.partial(plain, epsilon=epsilon)
    if not has_cuda():
        return plainly(x, added, scale, bias)
    kernel = functools.partial(by_kernel, epsilon=epsilon)
    return jax.lax.platform_dependent(x, added, scale, bias, cuda=kernel, default=plainly)


def plain(
    x: jax.Array, added: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """The same by XLA."""
    x = x + added
    return x, layer_norm(x, scale, bias, epsilon).astype(added.dtype)


def by_kernel(
    x: jax.Array,
    added: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The kernel itself; ``interpret``: as every device can, slowly."""
    width = x.shape[-1]
    rows = x.size // width
    stream, normed = pl.pallas_call(
        functools.partial(_add_and_norm, epsilon=epsilon),
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), x.dtype),
            jax.ShapeDtypeStruct((rows, width), added.dtype),
        ),
        grid=(rows,),
        name="add_and_norm",
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(x.reshape(rows, width), added.reshape(rows, width), scale, bias)
    return stream.reshape(x.shape), normed.reshape(x.shape)


def _add_and_norm(x, added, scale, bias, stream, normed, *, epsilon: float):
    """One row."""
    row, width = pl.program_id(0), x.shape[1]
    column = jnp.arange(pl.next_power_of_2(width))
    inside = column < width

    def load(ref, *at):
        return triton.load(ref.at[(*at, column)], mask=inside, other=0.0).astype(jnp.float32)

    total = load(x, row) + load(added, row)
    triton.store(stream.at[row, column], total, mask=inside)
    centred = jnp.where(inside, total - total.sum() / width, 0.0)
    variance = jnp.square(centred).sum() / width
    found = centred * jax.lax.rsqrt(variance + epsilon) * load(scale) + load(bias)
    triton.store(normed.at[row, column], found.astype(normed.dtype), mask=inside)
