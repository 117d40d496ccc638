"""Where arrays live: one mesh, one table.

Weights are sharded by how often a step uses them. The ViT and the Q-Former run once a *frame*, so
they are replicated; the language model runs once a *video*, so it is split over ``data`` (and
gathered layer by layer) and over ``model`` (tensor parallelism). Batches, and with them the memory,
are split over ``data``; slots never, and heads neither: a token's score is a sum over all heads.

The loop over frames runs by itself on every device (:func:`on_every_shard`), so that no collective
can get into it but the one that is asked for: the images of a chunk are divided over ``model`` for
the ViT (:func:`over_model`), which is where nearly all the arithmetic of a frame is. Only training
with ``gradient="scan"`` is left to the compiler as a whole: there scores are gathered every frame.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adacm2_jax.errors import UserError

#: Logical axis → mesh axis (None: replicated).
RULES = {
    "layers": None,
    "vision": None,
    "embed": None,
    "heads": None,
    "head_dim": None,
    "mlp": None,
    "llm_embed": "data",
    "llm_heads": "model",
    "llm_mlp": "model",
    "llm_vocab": None,  # 32,001 rows divide by nothing
    "vocab": None,
    "query": None,
    "token": None,
    "frame": None,
    "patch": None,
    "rgb": None,
    "one": None,
}


#: Rows of a batch: divided over ``data``.
ROWS = PartitionSpec("data")


def make_mesh(shape: tuple[int, int] = (-1, 1), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of axes ``data`` and ``model``; -1 takes what is left.

    Args:
      shape: devices along ``data`` and along ``model``.
      devices: by default all that are present; a topology's, to compile for what is not here.

    Raises:
      UserError: if the shape does not match the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    data, model = shape
    if data == -1 and model > 0 and count % model == 0:
        data = count // model
    if data * model != count or min(data, model) < 1:
        raise UserError(
            f"mesh = {tuple(shape)} does not cover the {count} device(s) present; the product must "
            f"be {count}, or the first entry -1"
        )
    names, auto = ("data", "model"), (AxisType.Auto,) * 2
    try:
        return jax.make_mesh((data, model), names, devices=devices, axis_types=auto)
    except NotImplementedError:  # an axis of the mesh needs a part of one of the torus
        placed = mesh_utils.create_device_mesh(
            (data, model), devices, allow_split_physical_axes=True
        )
        return Mesh(placed, names, axis_types=auto)


def param_shardings(boxed, mesh: Mesh):
    """The sharding of every parameter, from the logical axes on its box.

    Args:
      boxed: parameters (or their shapes) as ``init_params`` returns them, with axis names.
      mesh: from :func:`make_mesh`.

    Returns:
      A tree of ``NamedSharding`` with the structure of the unboxed parameters.

    Raises:
      UserError: if an axis does not divide by its mesh axis, or two axes of one parameter claim the
        same mesh axis.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = [RULES[axis] for axis in leaf.names]
        used = [axis for axis in spec if axis]
        if len(used) != len(set(used)):
            raise UserError(f"{name}: two of its axes {leaf.names} map to one mesh axis {used}")
        for size, axis in zip(leaf.value.shape, spec, strict=True):
            if axis and size % mesh.shape[axis]:
                raise UserError(
                    f"{name}: an axis of {size} does not divide over mesh axis {axis!r} of "
                    f"{mesh.shape[axis]} devices; choose another mesh"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    is_box = lambda leaf: isinstance(leaf, nn.Partitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process brings, and how many shares there are.

    That is one a process, unless a data shard lies on several: these then bring the same rows. The
    shards of a process need not be neighbours: on a torus, devices are ordered by their links.

    Raises:
      UserError: if the processes hold unequal numbers of shards, or some of each other's.
    """
    if jax.process_count() == 1:
        return 0, 1
    held: dict[int, set[int]] = {}
    for shard, row in enumerate(mesh.devices):
        for device in row:
            held.setdefault(device.process_index, set()).add(shard)
    shares = sorted({tuple(sorted(shards)) for shards in held.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) > len(mesh.devices):
        raise UserError(
            f"mesh = {mesh.devices.shape}: the processes hold data shards "
            f"{', '.join(map(str, shares))}; choose a mesh that gives all of them equal ones"
        )
    mine = tuple(sorted(held[jax.process_index()]))
    return shares.index(mine), len(shares)


def rows_per_process(batch_size: int, mesh: Mesh, parts: int = 1) -> int:
    """How many rows of a batch each process brings.

    Args:
      batch_size: of all processes together.
      mesh: from :func:`make_mesh`.
      parts: that the batch is computed in (gradient accumulation).

    Raises:
      UserError: if the batch does not divide over the parts and the data axis.
    """
    shards, processes = mesh.shape["data"], data_share(mesh)[1]
    if batch_size % (shards * parts):
        divided = f"{shards} data shards" + (f" × train.accumulate = {parts}" if parts > 1 else "")
        raise UserError(
            f"train.batch_size = {batch_size} does not divide over {divided}; change it, or mesh"
        )
    return batch_size // processes


def shard_batch(batch, mesh: Mesh):
    """Puts this process's rows of a batch (numpy leaves, batch axis first) on the mesh.

    Which rows come first in the global array depends on where the process's shards lie.
    """
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def on_every_shard(function: Callable, rows: int, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` as every device runs it on its own rows, without communication.

    Where no mesh is set, or the rows do not divide over ``data`` (a question about one video, say),
    it stays as it is: everybody computes everything.

    Args:
      function: of arrays; it must not be differentiated.
      rows: of the batch.
      in_specs, out_specs: of ``jax.shard_map``, with ``data`` on the axis of the batch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or rows % mesh.shape["data"]:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def over_model(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Divides axis 0 over ``model`` and gathers the results, inside :func:`on_every_shard`.

    There every device of a data shard holds the same input; each computes its part of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape["model"] if "model" in mesh.manual_axes else 1
    if parts == 1:
        return function

    def divided(x: jax.Array) -> jax.Array:
        share = -(-len(x) // parts)
        x = jnp.pad(x, [(0, share * parts - len(x))] + [(0, 0)] * (x.ndim - 1))
        mine = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("model") * share, share)
        return jax.lax.all_gather(function(mine), "model", tiled=True)

    return lambda x: divided(x)[: len(x)]


def rows_sharded(x: jax.Array) -> jax.Array:
    """Says that axis 0 is the batch: left to itself the compiler may compute all rows everywhere
    to spare a gather of weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or len(x) % mesh.shape["data"]:
        return x
    spec = PartitionSpec("data", *(PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, spec)


def to_host(tree: Any) -> Any:
    """Arrays as numpy, whole, also where this process holds a part of them alone."""

    def fetch(leaf):
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)
