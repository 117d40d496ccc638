"""A few rows by a matrix of eight bits, as one kernel for NVIDIA GPUs: a token at a time.

What such a product takes is the time to read the matrix. XLA widens it within a product for tensor
cores, which wants sixteen rows and reads a third of what the card can. Here (Pallas for Triton)
every program multiplies its part of the rows of the matrix, of some columns, number by number, and
leaves its sums, float32, for whoever reads the result to add up. It has no gradient.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adacm2_jax.models.cuda import has_cuda

#: So many rows at most: each has its own sums, in registers.
MOST_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the work is dealt out: columns of a program and rows at once, programs that share a
    column, warps of each, loads under way by Triton, and parts of the matrix that are loaded before
    one is multiplied. The default was the fastest of six on an H100."""

    wide: int = 64
    tall: int = 128
    parts: int = 8
    warps: int = 4
    stages: int = 3
    ahead: int = 1


SHAPE = Shape()


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[…, K] @ [K, N] → float32[…, N]: by the kernel for int8 and up to :data:`MOST_ROWS` rows
    where the program is for one NVIDIA GPU, else by XLA.

    Args:
      x: floating-point.
      kernel: int8 or float8.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = math.prod(x.shape[:-1])
    one_device = mesh.empty or mesh.size == 1
    fits = kernel.dtype == jnp.int8 and x.dtype != jnp.float64 and rows <= MOST_ROWS
    if not (has_cuda() and one_device and fits):
        return plain(x, kernel)
    kernels = functools.partial(by_kernel, shape=SHAPE)
    return jax.lax.platform_dependent(x, kernel, cuda=kernels, default=plain)


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by XLA."""
    # Half precision holds the values of eight bits exactly, and the sum is not rounded.
    precision = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.tensordot(x, kernel.astype(x.dtype), 1, preferred_element_type=precision)


def by_kernel(
    x: jax.Array, kernel: jax.Array, shape: Shape = SHAPE, interpret: bool = False
) -> jax.Array:
    """The kernel itself; ``interpret``: as every device can, slowly."""
    depth, width = kernel.shape
    rows = x.reshape(-1, depth)
    steps = pl.cdiv(pl.cdiv(depth, shape.tall), shape.parts)
    sums = pl.pallas_call(
        functools.partial(_multiply, shape=shape, steps=steps),
        out_shape=jax.ShapeDtypeStruct((shape.parts, len(rows), width), jnp.float32),
        grid=(pl.cdiv(width, shape.wide), shape.parts),
        name="int8_product",
        compiler_params=triton.CompilerParams(num_warps=shape.warps, num_stages=shape.stages),
        interpret=interpret,
    )(rows, kernel)
    # One by one, not by a reduction: so XLA adds them up where the result is read.
    total = functools.reduce(jnp.add, [sums[part] for part in range(shape.parts)])
    return total.reshape(*x.shape[:-1], width)


def _multiply(x, kernel, sums, *, shape: Shape, steps: int):
    (depth, width), wide, tall = kernel.shape, shape.wide, shape.tall
    part = pl.program_id(1)
    column = pl.program_id(0) * wide + jnp.arange(wide)
    inside = None if width % wide == 0 else column < width

    def load(step):
        place = (part * steps + step) * tall + jnp.arange(tall)
        there = (place < depth) & (step < steps)
        mask = there[:, None] if inside is None else there[:, None] & inside[None]
        at = place[:, None], column[None]
        weights = triton.load(kernel.at[at], mask=mask, other=0)
        rows = [triton.load(x.at[row, place], mask=there, other=0) for row in range(x.shape[0])]
        return weights, rows

    def add(turn, totals):
        # All loads first: a card keeps busy what is under way, not what waits for its turn.
        loaded = [load(turn * shape.ahead + number) for number in range(shape.ahead)]
        for weights, rows in loaded:
            weights = weights.astype(jnp.float32)
            totals = tuple(
                total + weights * row.astype(jnp.float32)[:, None]
                for total, row in zip(totals, rows, strict=True)
            )
        return totals

    start = (jnp.zeros((tall, wide), jnp.float32),) * x.shape[0]
    turns = pl.cdiv(steps, shape.ahead)
    for row, total in enumerate(jax.lax.fori_loop(0, turns, add, start)):
        triton.store(sums.at[part, row, column], total.sum(0), mask=inside)
