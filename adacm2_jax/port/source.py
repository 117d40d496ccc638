"""PyTorch checkpoints on disk: safetensors and pickles, read tensor by tensor.

Files are memory-mapped, and mapped anew after every :data:`WINDOW` bytes, so that the pages of a
file that is larger than the memory do not pile up in this process. A pickle of PyTorch before 1.6
cannot be mapped: it is held in memory.
"""

import pathlib
import pickle
import re
import warnings
from typing import Any

import numpy as np
import safetensors

from adacm2_jax.errors import UserError, reason
from adacm2_jax.files import check_pointer, read_json
from adacm2_jax.port.rules import Shape

#: Bytes that are read through one mapping of a file.
WINDOW = 1 << 28
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Under what training programs keep a state_dict, beside their optimiser and settings.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
#: What DistributedDataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")


class Source:
    """The tensors of a file, or of a directory of shards.

    Args:
      files: safetensors or PyTorch pickles.
      rename: file's name of a tensor → the name that it goes by here.

    Attributes:
      shapes: tensor name → shape.
      dtypes: tensor name → name of its dtype, such as ``bfloat16``.

    Raises:
      UserError: for a file that is damaged, truncated, holds no tensor, or is a pickle that holds
        more than tensors.
    """

    def __init__(self, files: list[pathlib.Path], rename=lambda name: name):
        self.files = files
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[pathlib.Path, str]] = {}
        for path in files:
            tensors = _open(path).tensors()
            if not tensors:
                raise UserError(f"{path} holds no tensor; name the file with the weights")
            prefix = _common_prefix(tensors)
            for inner, (shape, dtype) in tensors.items():
                name = rename(inner.removeprefix(prefix))
                if name in self.shapes:
                    raise UserError(f"tensor {name} is in both {self._places[name][0]} and {path}")
                self.shapes[name], self.dtypes[name] = shape, dtype
                self._places[name] = (path, inner)
        self._opened: tuple[pathlib.Path, Any] | None = None
        self._read_bytes = 0

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A copy of some rows of a tensor.

        Raises:
          UserError: if the file cannot be read there.
        """
        path, inner = self._places[name]
        if self._opened and self._opened[1].mapped and self._read_bytes > WINDOW:
            self._opened = None
        if not self._opened or self._opened[0] != path:
            self._opened, self._read_bytes = None, 0
            self._opened = (path, _open(path))
        values = self._opened[1].read(inner, rows)
        self._read_bytes += values.nbytes
        return values

    def close(self) -> None:
        """Lets go of the file."""
        self._opened = None


def checkpoint_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The weights in a Hugging Face directory: safetensors if there are any, else ``.bin``.

    Raises:
      UserError: if there are none, the index is damaged, or a shard that it names is missing.
    """
    for pattern, name in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        index = directory / name
        files = [directory / shard for shard in _shards(index)] if index.exists() else []
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(
                f"{index} names {missing[0]}, which is not there "
                f"({len(missing)} of {len(files)} shards missing); download it again"
            )
        if files := files or sorted(directory.glob(pattern)):
            return files
    raise UserError(f"{directory}: no *.safetensors and no pytorch_model*.bin here")


def _shards(index: pathlib.Path) -> list[str]:
    named = read_json(index).get("weight_map")
    if not named or not isinstance(named, dict):
        raise UserError(f"{index} is damaged: it has no weight_map; download it again")
    if wrong := [file for file in named.values() if not isinstance(file, str)]:
        raise UserError(f"{index} is damaged: {wrong[0]!r} names no file; download it again")
    return sorted(set(named.values()))


def _open(path: pathlib.Path) -> "_Safetensors | _Pickle":
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    check_pointer(path)
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickle(path)


def _common_prefix(names) -> str:
    """What training programs have put before every name."""
    prefix = ""
    while more := [
        each for each in _PREFIXES if all(name.startswith(prefix + each) for name in names)
    ]:
        prefix += more[0]
    return prefix


class _Safetensors:
    mapped = True

    def __init__(self, path: pathlib.Path):
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged or truncated ({reason(error)}); copy or download it again"
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
        with path.open("rb") as file:
            self.mapped = file.read(4) == b"PK\x03\x04"  # a zip archive, as since PyTorch 1.6
        try:
            with warnings.catch_warnings(action="ignore"):  # what they say is in the refusal
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=self.mapped)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise _refusal(path, error) from error
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, not a state_dict")
        self._tensors = _unwrap(content, torch.Tensor)
        if not self._tensors:
            keys = ", ".join(map(str, list(content)[:10])) or "none"
            raise UserError(
                f"{path} holds no tensor under a usual name; its top-level keys are: {keys}; save "
                "the state_dict alone, or as 'model'"
            )

    def tensors(self) -> dict[str, tuple[Shape, str]]:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str, rows: slice) -> np.ndarray:
        tensor = self._tensors[name]
        return to_numpy(tensor[rows] if tensor.ndim else tensor).copy()


def _unwrap(content: dict, kind: type) -> dict[str, Any]:
    """The tensors of a state_dict, which may lie within dictionaries of usual names."""
    for name in _WRAPPERS:
        inner = content.get(name)
        if isinstance(inner, dict) and (found := _unwrap(inner, kind)):
            return found
    return {str(name): value for name, value in content.items() if isinstance(value, kind)}


def _refusal(path: pathlib.Path, error: Exception) -> UserError:
    """Why torch does not read a file. Its own text advises to run what is in the pickle."""
    text = str(error)
    found = re.search(r"GLOBAL `?([\w.]+)", text)
    if found or "TorchScript" in text:
        held = found[1] if found else "a TorchScript program"
        return UserError(
            f"{path} is refused: it holds more than tensors ({held}), and a pickle can run code; "
            "save its state_dict alone, or as safetensors"
        )
    why = "no pickle of PyTorch" if "weights_only" in text else reason(error)
    return UserError(f"{path} is damaged or truncated ({why}); copy or download it again")


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
