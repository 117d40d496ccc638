"""What a frozen ViT makes of frames, computed apart from training, with the very same numbers.

A matrix product may add up in another order for another number of rows. So the ViT gets as many
images at a time as it does on each device in the training step
(``training.step.images_at_a_time``); then its features are those of the training step, bit by bit
where the compiler treats both alike, and the image's place among the others does not matter.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import AdaCM2, call
from adacm2_jax.models.cuda import compiler_options
from adacm2_jax.models.params import by_path
from adacm2_jax.sharding import on_every_shard, replicated


def describe_vision(config: AdaCM2Config, params: dict | None = None) -> dict:
    """What features depend on, as JSON values.

    Args:
      config: the model.
      params: with the ViT's under ``vision``; adds ``weights``, a hash of their values.
    """
    found: dict = dataclasses.asdict(config.vision)
    found |= {"dtype": config.dtype, "features": config.feature_dtype}
    if params is not None:
        found["weights"] = fingerprint(params["vision"])
    return found


def fingerprint(params: dict) -> str:
    """A hash of parameters: paths, dtypes, shapes and values, wherever they are and whether layers
    are stacked or not."""
    digest = hashlib.sha256()
    for path, (leaves, shape) in sorted(by_path(params).items()):
        digest.update(f"{path} {leaves[0].dtype} {shape}\n".encode())
        for leaf in leaves:
            digest.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).data)
    return digest.hexdigest()[:16]


class Encoder:
    """The ViT, compiled for a fixed number of images at a time.

    Args:
      config: the model.
      params: with ``vision``, on ``mesh``.
      mesh: of this process's own devices; images are divided over ``data``.
      images: of ``training.step.images_at_a_time``.
    """

    def __init__(
        self, config: AdaCM2Config, params: dict, mesh: Mesh, images: tuple[int, int, int]
    ):
        # Not read, but the module has it.
        table = jnp.zeros((config.temporal_positions, config.vision.width))
        table = jax.device_put(table, replicated(mesh))
        self._params = {"vision": params["vision"], "temporal_embed": table}
        self._mesh, self._images, self._config = mesh, images, config

        def encode(params: dict, frames: jax.Array) -> jax.Array:
            run = on_every_shard(
                lambda *given: call(AdaCM2(config), given[0], "encode_frames", given[1]),
                len(frames),
                (PartitionSpec(), PartitionSpec("data")),
                PartitionSpec("data"),
            )
            return run(params, frames[:, None])[:, 0]

        self._encode = jax.jit(encode, compiler_options=compiler_options(config))

    def clips(self, num_frames: int) -> int:
        """So many clips of T frames fill the devices about as training does."""
        first, head, rest = self._images
        images = (max(head, rest) if first else rest) * self._mesh.shape["data"]
        return -(-images // num_frames)

    def __call__(self, clips: np.ndarray, valid: np.ndarray) -> list[np.ndarray]:
        """The features of clips.

        Args:
          clips: uint8[K, T, height, width, 3].
          valid: bool[K, T]; padding is not computed.

        Returns:
          For each clip [n, P, V] in ``feature_dtype``, of its n valid frames.
        """
        vision = self._config.vision
        size = (vision.tokens_per_frame, vision.width)
        features = np.zeros(valid.shape + size, jnp.dtype(self._config.feature_dtype))
        first, *images = self._images
        for part, count in zip((slice(first), slice(first, None)), images, strict=True):
            place = np.zeros_like(valid)
            place[:, part] = valid[:, part]
            where = np.argwhere(place)
            for rows, result in self._run(clips, where, count * self._mesh.shape["data"]):
                features[rows[:, 0], rows[:, 1]] = np.asarray(result)[: len(rows)]
        return [part[mask] for part, mask in zip(features, valid, strict=True)]

    def _run(
        self, clips: np.ndarray, where: np.ndarray, count: int
    ) -> Iterator[tuple[np.ndarray, jax.Array]]:
        """Frames at these places [n, 2], ``count`` at a time; a result is given out when the next
        one is being computed."""
        rows_of = NamedSharding(self._mesh, PartitionSpec("data"))
        before = None
        for start in range(0, len(where), count):
            rows = where[start : start + count]
            frames = np.zeros((count, *clips.shape[2:]), np.uint8)
            frames[: len(rows)] = clips[rows[:, 0], rows[:, 1]]
            with jax.set_mesh(self._mesh):
                result = self._encode(self._params, jax.device_put(frames, rows_of))
            if before:
                yield before
            before = rows, result
        if before:
            yield before
