"""PyTorch checkpoints on disk: safetensors and pickles, read tensor by tensor.

Files are memory-mapped, and mapped anew after every :data:`WINDOW` bytes, so that the pages of a
file that is larger than the memory do not pile up in this process.
"""

import json
import pathlib
import pickle
from typing import Any

import numpy as np
import safetensors

from adacm2_jax.errors import UserError
from adacm2_jax.port.rules import Shape

#: Bytes that are read through one mapping of a file.
WINDOW = 1 << 28
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Source:
    """The tensors of a file, or of a directory of shards.

    Args:
      files: safetensors or PyTorch pickles.
      rename: file's name of a tensor → the name that it goes by here.

    Attributes:
      shapes: tensor name → shape.
      dtypes: tensor name → name of its dtype, such as ``bfloat16``.

    Raises:
      UserError: for a file that is damaged, truncated, or a pickle that holds more than tensors.
    """

    def __init__(self, files: list[pathlib.Path], rename=lambda name: name):
        self.files = files
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[pathlib.Path, str]] = {}
        for path in files:
            for name, (shape, dtype) in _open(path).tensors().items():
                if rename(name) in self.shapes:
                    other = self._places[rename(name)][0]
                    raise UserError(f"tensor {name} is in both {other} and {path}")
                self.shapes[rename(name)], self.dtypes[rename(name)] = shape, dtype
                self._places[rename(name)] = (path, name)
        self._mapped: tuple[pathlib.Path, Any] | None = None
        self._read_bytes = 0

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A copy of some rows of a tensor.

        Raises:
          UserError: if the file cannot be read there.
        """
        path, inner = self._places[name]
        if self._mapped is None or self._mapped[0] != path or self._read_bytes > WINDOW:
            self._mapped, self._read_bytes = None, 0
            self._mapped = (path, _open(path))
        values = self._mapped[1].read(inner, rows)
        self._read_bytes += values.nbytes
        return values

    def close(self) -> None:
        """Lets go of the file."""
        self._mapped = None


def checkpoint_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The weights in a Hugging Face directory: safetensors if there are any, else ``.bin``.

    Raises:
      UserError: if there are none, or a shard that the index names is missing.
    """
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        files = sorted(directory.glob(pattern))
        if (directory / index).exists():
            named = sorted(set(json.loads((directory / index).read_text())["weight_map"].values()))
            missing = [name for name in named if not (directory / name).exists()]
            if missing:
                raise UserError(
                    f"{directory / index} names {missing[0]}, which is not there "
                    f"({len(missing)} of {len(named)} shards missing); download it again"
                )
            files = [directory / name for name in named]
        if files:
            return files
    raise UserError(f"{directory}: no *.safetensors and no pytorch_model*.bin here")


def _open(path: pathlib.Path) -> "_Safetensors | _Pickle":
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)


class _Safetensors:
    def __init__(self, path: pathlib.Path):
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({error}); copy or download it again"
            ) from error

    def tensors(self) -> dict[str, tuple[Shape, str]]:
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        return {
            name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()))
            for name, part in slices.items()
        }

    def read(self, name: str, rows: slice) -> np.ndarray:
        part = self._file.get_slice(name)
        if not part.get_shape():
            return self._file.get_tensor(name)
        return part[rows]


class _Pickle:
    def __init__(self, path: pathlib.Path):
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{path} is a PyTorch pickle, which needs torch to be read; pip install "
                "'adacm2-jax[port]'"
            ) from None
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{path} is refused: it holds more than tensors, and a pickle can run code "
                f"({reason}); save its state_dict alone, or as safetensors"
            ) from error
        except (RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{path} is damaged or truncated ({reason}); copy or download it again"
            ) from error
        # LAVIS keeps the weights under "model", beside optimiser and configuration.
        if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
            tensors = tensors["model"]
        if not isinstance(tensors, dict):
            raise UserError(f"{path} holds a {type(tensors).__name__}, not a state_dict")
        self._tensors = {n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)}

    def tensors(self) -> dict[str, tuple[Shape, str]]:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice) -> np.ndarray:
        return to_numpy(
            self._tensors[name][rows] if self._tensors[name].ndim else self._tensors[name]
        ).copy()


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor's values, bfloat16 included."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray):
    """A torch tensor of an array's values, bfloat16 included."""
    import torch

    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
