"""The language model's matrices in eight bits: weights alone, symmetric, a scale an output.

A quantised matrix is two parameters, which hold what qwix's ``QArray`` does: ``kernel``, int8 or
float8_e4m3fn, and beside it ``scale``, float32, with the kernel's axes, of which those that a
product sums over have size 1. Their product is about the matrix that was: in int8 every number of
it is within half a step, ``scale / 2``. ``layers.Dense`` multiplies by both.

Of a language model the matrices of its layers are quantised, 95 % of Vicuna-7B. Its head stays as
it is, for its products decide between words, and so do the embeddings, of which a token reads one
row. ``LlamaConfig.quantize`` says how; all else follows from the shapes of the parameters.
"""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adacm2_jax.config import QUANTIZED
from adacm2_jax.errors import UserError


def kind_of(dtype: Any) -> str:
    """How a matrix of this dtype is quantised, one of ``config.QUANTIZED``; empty: it is not."""
    name = jnp.dtype(dtype).name
    return next((kind for kind, values in QUANTIZED.items() if values == name), "")


def scale_path(kernel: str) -> str:
    """The path of the scales of a quantised kernel."""
    return kernel.removesuffix("kernel") + "scale"


def require_qwix() -> None:
    """Raises ``ModuleNotFoundError`` where nothing can be quantised: to import qwix takes
    seconds."""
    if importlib.util.find_spec("qwix") is None:
        raise ModuleNotFoundError("qwix quantises; pip install 'adacm2-jax[int8]'", name="qwix")


def refuse_learning_quantized(learned: Mapping[str, Any]) -> None:
    """Refuses to train what is quantised.

    Args:
      learned: the parameters that learn, or their shapes, by path.

    Raises:
      UserError: naming the first of them that is.
    """
    for path, leaf in sorted(learned.items()):
        if kind := kind_of(leaf.dtype):
            raise UserError(
                f"model.llm.quantize = {kind!r}, but {path} learns, for which eight bits are too "
                "few; freeze llm/layers/.* in optim.groups, or set model.llm.quantize = ''"
            )


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(
    kernel: jax.Array | np.ndarray, scale_shape: tuple[int, ...], dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """One layer's matrix in eight bits.

    Args:
      kernel: floating-point, of any precision; it is read in float32.
      scale_shape: the kernel's, with 1 for the axes that a product sums over.
      dtype: of the values.

    Returns:
      Values of ``dtype`` and scales, float32.
    """
    import qwix

    channels = [axis for axis, size in enumerate(kernel.shape) if scale_shape[axis] == size]
    exact = jnp.asarray(kernel, jnp.float32)
    made = qwix.quantize(exact, jnp.dtype(dtype), channelwise_axes=channels)
    return made.qvalue, made.scale


def quantize_stack(kernel: jax.Array, values: Any, scale: Any) -> tuple[jax.Array, jax.Array]:
    """The matrices of all layers, [layers, …], one after the other, where they belong.

    Args:
      kernel: floating-point.
      values, scale: the shapes of what is made, with dtypes and shardings.
    """

    def run(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda one: quantize(one, scale.shape[1:], values.dtype), kernel)

    return jax.jit(run, out_shardings=(values.sharding, scale.sharding))(kernel)


def quantize_fresh(params: dict[str, jax.Array], wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Flat parameters of which those that are quantised in ``wanted``, their shapes, are so."""
    made = dict(params)
    for path, like in wanted.items():
        if kind_of(like.dtype):
            scale = scale_path(path)
            made[path], made[scale] = quantize_stack(params[path], like, wanted[scale])
    return made
