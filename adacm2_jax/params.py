"""The parameters of a model: their shapes, types and places, and fresh values for them."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jax.sharding import Mesh

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import init_params
from adacm2_jax.optim import Group, split_params
from adacm2_jax.sharding import param_shardings


def abstract_params(config: AdaCM2Config, groups: Sequence[Group], mesh: Mesh) -> dict:
    """The parameter tree without values.

    Args:
      config: the model.
      groups: of the optimiser. What learns is float32; what is frozen has the model's dtype.
      mesh: where the parameters belong.

    Returns:
      A tree of ``jax.ShapeDtypeStruct`` with shardings.

    Raises:
      UserError: if the groups or the mesh do not fit the parameters.
    """
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shapes = nn.unbox(boxed)
    frozen = split_params(shapes, groups)[1]

    def place(path, leaf, sharding) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        dtype = config.dtype if name in frozen else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes, param_shardings(boxed, mesh))


def fresh_params(config: AdaCM2Config, abstract: dict, seed: int) -> dict:
    """Random parameters, made where they belong.

    Args:
      config: the model.
      abstract: of :func:`abstract_params`.
      seed: of the random numbers.
    """

    def init(key: jax.Array) -> dict:
        params = nn.unbox(init_params(config, key))
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, abstract)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
