"""Where arrays live: one mesh, one table.

Weights are sharded by how often a step uses them. The ViT and the Q-Former run once a *frame*, so
they are replicated; the language model runs once a *video*, so it is split over ``data`` (and
gathered layer by layer). Batches, and with them the memory, are split over ``data``; slots never.
"""

import flax.linen as nn
import jax
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
    "llm_vocab": "model",
    "vocab": None,
    "query": None,
    "token": None,
    "frame": None,
    "patch": None,
    "rgb": None,
    "one": None,
}


def make_mesh(shape: tuple[int, int] = (-1, 1)) -> Mesh:
    """A mesh of axes ``data`` and ``model`` over all devices; -1 takes what is left.

    Raises:
      UserError: if the shape does not match the number of devices.
    """
    count = jax.device_count()
    data, model = shape
    if data == -1 and model > 0 and count % model == 0:
        data = count // model
    if data * model != count or min(data, model) < 1:
        raise UserError(
            f"mesh = {tuple(shape)} does not cover the {count} device(s) present; the product must "
            f"be {count}, or the first entry -1"
        )
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


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


def rows_per_process(batch_size: int, mesh: Mesh) -> int:
    """How many rows of a batch each process brings.

    Raises:
      UserError: if the batch does not divide over the data axis and the processes.
    """
    shards, processes = mesh.shape["data"], jax.process_count()
    if batch_size % shards or batch_size % processes:
        raise UserError(
            f"train.batch_size = {batch_size} does not divide over {shards} data shards and "
            f"{processes} process(es); change it, or mesh"
        )
    return batch_size // processes


def shard_batch(batch, mesh: Mesh):
    """Puts this process's rows of a batch (numpy leaves, batch axis first) on the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
