"""The parameters of a model: which learn, their shapes, types and places, fresh values for them."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config, check_finite
from adacm2_jax.errors import UserError
from adacm2_jax.models.adacm2 import init_params
from adacm2_jax.models.quantized import kind_of, quantize_fresh
from adacm2_jax.sharding import param_shardings

#: A regular expression over parameter paths, and a factor on the learning rate; None freezes.
Group = tuple[str, float | None]


def check_groups(groups: Sequence[Group]) -> None:
    """Raises ``UserError`` for what is no sequence of :data:`Group`."""
    for group in groups:
        if not isinstance(group, tuple) or len(group) != 2:
            raise UserError(
                f"optim.groups: {group!r:.60} must be a pair such as ('.*', 1.0): an expression "
                "over paths and a factor, None for frozen"
            )
        pattern, factor = group
        check_expressions("optim.groups", (pattern,))
        if factor is None:
            continue
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if number:
            check_finite(factor, f"optim.groups: the factor of {pattern!r:.60}")
        if not number or factor < 0:
            raise UserError(
                f"optim.groups: the factor {factor!r:.60} must be a number from 0 on, or None"
            )


def check_expressions(name: str, patterns: Sequence[str]) -> None:
    """Raises ``UserError`` for what is no regular expression; ``name`` is the field's."""
    for pattern in patterns:
        try:
            re.compile(pattern if isinstance(pattern, str) else "(")
        except (re.error, RecursionError, OverflowError):
            raise UserError(
                f"{name}: {pattern!r:.60} is no regular expression over the paths of parameters, "
                "such as 'qformer/.*'"
            ) from None


def group_of(path: str, groups: Sequence[Group]) -> Group:
    """The first group whose expression matches the whole path such as ``qformer/norm/scale``.

    Raises:
      UserError: if none does.
    """
    for pattern, factor in groups:
        if re.fullmatch(pattern, path):
            return pattern, factor
    raise UserError(
        f"parameter {path} matches no expression of optim.groups; add a last group ('.*', 1.0)"
    )


def split_params(params, groups: Sequence[Group]) -> tuple[dict, dict]:
    """Parameters as two flat dictionaries by path: those that learn, and those that are frozen.

    Raises:
      UserError: if a group matches nothing (a misspelt expression), or nothing learns.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    chosen = {path: group_of(path, groups) for path in flat}
    unused = [pattern for pattern, _ in groups if pattern not in {g for g, _ in chosen.values()}]
    if unused:
        raise UserError(
            f"optim.groups: {unused[0]!r} matches no parameter that is left; paths start with "
            + ", ".join(sorted({path.split("/")[0] for path in flat}))
        )
    learned = {path: leaf for path, leaf in flat.items() if chosen[path][1] is not None}
    if not learned:
        raise UserError("optim.groups freezes every parameter; give one group a factor")
    return learned, {path: leaf for path, leaf in flat.items() if path not in learned}


def join_params(learned: dict, frozen: dict) -> dict:
    """The parameter tree again."""
    return traverse_util.unflatten_dict({**learned, **frozen}, sep="/")


#: Large parameters that are stacked over layers; for answering they are read layer by layer.
STACKS = (("vision", "blocks"), ("llm", "layers"))


class Layers(list):
    """The arrays of a parameter, one a layer; a leaf of a tree."""

    @property
    def dtype(self) -> Any:
        return self[0].dtype


def unstacked(params: dict, qformer: bool = True) -> dict:
    """The parameters as answering is fastest: each layer with its own.

    A loop over stacked layers copies each layer's weights out of the stack: in the language model
    for every token (``benchmarks/decode_step.py``), in the ViT and the Q-Former for every chunk.

    Args:
      params: of a model or of some of its parts, or their shapes. Its stacked arrays are used up,
        one after the other, so that no more than one of them is held twice; what is :class:`Layers`
        stays.
      qformer: also the Q-Former's. On several devices its layers stay in a loop: compiled for
        sixteen TPUs, policies ``merge`` and ``full`` need more memory without one.
    """
    for part, name in (*STACKS, ("qformer", "groups")) if qformer else STACKS:
        if part not in params:
            continue
        leaves, structure = jax.tree.flatten(_cast_biases(params[part][name]))
        parts = [split(leaf) for leaf in leaves]
        layers = tuple(jax.tree.unflatten(structure, own) for own in zip(*parts, strict=True))
        params = params | {part: params[part] | {name: layers}}
    return params


def _cast_biases(layer: dict) -> dict:
    """Biases in the type of the products that they are added to, which casts them, for every layer
    and chunk, if nobody has."""
    made: dict[str, Any] = {
        name: _cast_biases(of) if isinstance(of, dict) else of for name, of in layer.items()
    }
    if "bias" in made and "kernel" in made:
        bias, dtype = made["bias"], made["kernel"].dtype
        if isinstance(bias, Layers):
            made["bias"] = Layers(one.astype(dtype) for one in bias)
        elif isinstance(bias, jax.ShapeDtypeStruct):
            made["bias"] = jax.ShapeDtypeStruct(bias.shape, dtype, sharding=bias.sharding)
        else:
            made["bias"] = bias.astype(dtype)
    return made


def split(leaf: Any) -> Sequence[Any]:
    """[layers, …] → so many arrays […], each where its part of the leaf was; the leaf is freed."""
    if isinstance(leaf, Layers):
        return leaf
    place = leaf.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=place)] * leaf.shape[0]
    apart = jax.jit(lambda leaf: [*leaf], out_shardings=[place] * len(leaf))(leaf)
    jax.block_until_ready(apart)
    leaf.delete()
    return apart


def by_path(params: dict) -> dict[str, tuple[list[jax.Array], tuple[int, ...]]]:
    """path → the arrays of a parameter and the shape of all together: one array, or one a layer
    where they are :func:`unstacked`."""
    found: dict[str, list[jax.Array]] = {}
    apart = set()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        path = "/".join(names)
        found.setdefault(path, []).append(leaf)
        if len(names) < len(keys):
            apart.add(path)
    return {
        path: (leaves, (len(leaves),) * (path in apart) + leaves[0].shape)
        for path, leaves in found.items()
    }


def abstract_params(config: AdaCM2Config, groups: Sequence[Group], mesh: Mesh) -> dict:
    """The parameter tree without values.

    Args:
      config: the model.
      groups: of the optimiser. What learns is float32; what is frozen see :func:`frozen_dtype`.
        What is quantised is so either way; to train it is refused by ``check_step``.
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
        kept = name in frozen and not kind_of(leaf.dtype)
        dtype = frozen_dtype(config, name) if kept else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes, param_shardings(boxed, mesh))


def frozen_dtype(config: AdaCM2Config, path: str) -> str:
    """The dtype that a parameter is kept in where it does not learn.

    Weights of matrix products and tables of words have the dtype that they are used in. All else,
    a thousandth of a model, is float32: norms, biases, learned tokens and positions.
    """
    if not re.search(r"(kernel|(token|word)_embed)$", path):
        return "float32"
    return config.dtype if path.startswith(("vision/", "llm/")) else config.memory_dtype


def fresh_params(
    config: AdaCM2Config, abstract: dict, seed: int, only: Collection[str] | None = None
) -> dict[str, jax.Array]:
    """Random parameters, made where they belong.

    Args:
      config: the model.
      abstract: of :func:`abstract_params`.
      seed: of the random numbers; a parameter's values do not depend on ``only``.
      only: paths to make; by default all.

    Returns:
      Flat parameters by path.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    if only is not None:
        wanted = {path: wanted[path] for path in only}

    whole = dataclasses.replace(config, llm=dataclasses.replace(config.llm, quantize=""))

    def init(key: jax.Array) -> dict:
        params = traverse_util.flatten_dict(nn.unbox(init_params(whole, key)), sep="/")
        params = quantize_fresh(params, wanted)
        return {path: params[path].astype(like.dtype) for path, like in wanted.items()}

    shardings = {path: leaf.sharding for path, leaf in wanted.items()}
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def param_shapes(config: AdaCM2Config) -> dict[str, tuple[int, ...]]:
    """path → shape of every parameter of a model."""
    boxed = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    flat = traverse_util.flatten_dict(nn.unbox(boxed), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def replicated_parts(params: dict) -> dict:
    """The parameters that read frames; the language model's are split over devices."""
    return {part: params[part] for part in ("vision", "ln_vision", "temporal_embed", "qformer")}
