"""Parameters on disk in Orbax's format, written and read layer by layer.

Orbax holds every array of a tree in memory while it saves; one stacked parameter of the language
model alone is 2.9 GB. Here a parameter is a :class:`LazyArray`, whose layers are read when their
turn comes, and a handler of Orbax's writes them one by one. What is on disk is an ordinary Orbax
tree that ``orbax.checkpoint.StandardCheckpointer`` restores onto any mesh.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from adacm2_jax.config import AdaCM2Config, from_dict
from adacm2_jax.errors import UserError, reason
from adacm2_jax.runs.stored import open_array
from adacm2_jax.runs.workdir import param_trees, read_config


@dataclasses.dataclass
class LazyArray:
    """A parameter whose values are read when they are needed.

    Attributes:
      shape: of the whole.
      dtype: of the whole.
      layers: how many pieces along axis 0 it is read in; None for one piece, the whole.
      read: number of the piece → its values.
      digest: hash of dtype, shape and bytes, once all pieces have been read in their order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: int | None
    read: Callable[[int], np.ndarray]
    digest: str = ""

    @classmethod
    def of(cls, values: np.ndarray) -> "LazyArray":
        """Values that are there already."""
        return cls(values.shape, values.dtype, None, lambda _: values)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """The values, piece by piece."""
        digest = hashlib.sha256(f"{self.dtype.name}{self.shape}".encode())
        for i in range(1 if self.layers is None else self.layers):
            piece = np.ascontiguousarray(self.read(i))
            digest.update(piece.reshape(-1).view(np.uint8).data)
            yield piece
        self.digest = digest.hexdigest()


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes a :class:`LazyArray` where Orbax would write a numpy array."""

    def __init__(self, on_bytes: Callable[[int], Any], stopped: threading.Event):
        super().__init__(deepcopy_host_arrays=False)
        self._on_bytes = on_bytes
        self._stopped = stopped
        self._turn = asyncio.Lock()

    async def _open_and_write(self, value: LazyArray, tspec: dict, ts_context) -> None:
        chunks = value.shape if value.layers is None else (1, *value.shape[1:])
        tspec["metadata"]["chunks"] = list(chunks)
        async with self._turn:
            if self._stopped.is_set():
                return
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            for i, piece in enumerate(value.pieces()):
                await (array if value.layers is None else array[i]).write(piece)
                self._on_bytes(piece.nbytes)
                if self._stopped.is_set():  # an error here would leave the others' writes alone
                    return


def write_params(
    directory: epath.Path, params: dict[str, LazyArray], on_bytes: Callable[[int], Any]
) -> str:
    """Writes parameters as an Orbax tree with flat names; returns their fingerprint.

    Orbax's own threads would go on writing after a signal has left ``save``, so it runs in a
    thread that is always waited for: a signal lets it end after the piece at hand. Once this
    function has been left, nothing more is written.

    Args:
      directory: that must not exist.
      params: path → values.
      on_bytes: told of every piece that is on disk.
    """
    stopped, writing = threading.Event(), threading.Lock()
    registry = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler(on_bytes, stopped))
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_compression=False, type_handler_registry=registry
    )

    def save() -> None:
        with writing:
            if not stopped.is_set():
                checkpointer.save(directory, args=ocp.args.PyTreeSave(params))

    with ocp.Checkpointer(handler) as checkpointer, ThreadPoolExecutor(1) as writer:
        try:
            writer.submit(save).result()
        except BaseException:
            stopped.set()
            with writing:  # an executor does not know of a thread during whose start it was left
                raise
    return fingerprint({path: value.digest for path, value in params.items()})


def fingerprint(digests: dict[str, str]) -> str:
    """One hash for all names, shapes, dtypes and bytes."""
    lines = "".join(f"{path} {digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def open_ours(source: str | os.PathLike) -> tuple[AdaCM2Config, "OurParams"]:
    """The model and the parameters of a converted checkpoint, or of a run's newest step.

    Raises:
      UserError: if there is none, or it is damaged.
    """
    config = from_dict(read_config(source)["model"])
    return config, OurParams(param_trees(source))


class OurParams:
    """Parameters in Orbax trees with flat names, to be read layer by layer.

    Args:
      trees: as :func:`write_params`, or ``train.py``, wrote them; of a path in several the first
        counts.

    Attributes:
      shapes: path → shape.
      dtypes: path → dtype.

    Raises:
      UserError: if one is damaged.
    """

    def __init__(self, trees: Sequence[epath.Path]):
        self._arrays: dict[str, ts.TensorStore] = {}
        for tree in reversed(trees):
            try:
                with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                    paths = handler.metadata(tree).tree
                self._arrays |= {path: open_array(tree, path) for path in paths}
            except Exception as error:
                raise UserError(
                    f"checkpoint {tree} is damaged or half-written "
                    f"({type(error).__name__}: {reason(error)})"
                ) from error
        self.shapes = {path: tuple(array.shape) for path, array in self._arrays.items()}
        self.dtypes = {p: np.dtype(array.dtype.numpy_dtype) for p, array in self._arrays.items()}

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or one layer of it."""
        array = self._arrays[path]
        return (array if layer is None else array[layer]).read().result()
