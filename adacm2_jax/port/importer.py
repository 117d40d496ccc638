"""PyTorch's checkpoints into ours.

A converted checkpoint is a directory that ``init_from`` takes::

    params/                              every parameter, an Orbax tree with flat names
    config.json                          {"model": …}
    {qformer,llm}_tokenizer/             Hugging Face tokenizers
    base.json                            where it comes from, and its fingerprint

It is written under another name and renamed when it is complete.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from adacm2_jax.config import to_dict
from adacm2_jax.errors import UserError
from adacm2_jax.files import write_json
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.tokenizers import check_vicuna, read_tokenizers
from adacm2_jax.models.params import param_shapes
from adacm2_jax.port.destination import check_destination, check_room, written_beside
from adacm2_jax.port.formats import TorchCheckpoint, open_checkpoint
from adacm2_jax.port.rules import match
from adacm2_jax.port.store import LazyArray, write_params
from adacm2_jax.runs.workdir import PARAMS_DIR


def import_checkpoint(
    sources: Sequence[str | pathlib.Path],
    destination: str | os.PathLike,
    *,
    bert: str | pathlib.Path | None = None,
    allow_llm: str = "",
    dtype: str = "",
    force: bool = False,
) -> dict:
    """Converts a PyTorch checkpoint.

    Args:
      sources: see ``formats.open_checkpoint``.
      destination: directory to be made, local or ``gs://``.
      bert: directory or ``vocab.txt`` of the Q-Former's tokenizer, where the source has none.
      allow_llm: version of Vicuna to accept besides 1.1, such as ``v1.5``.
      dtype: of the result; empty keeps each parameter's own.
      force: replace what is at the destination.

    Returns:
      What ``base.json`` holds.

    Raises:
      UserError: if anything does not fit; then nothing is written.
    """
    target = epath.Path(destination)
    check_destination(target, force)
    with contextlib.closing(open_checkpoint(sources)) as source:
        check_vicuna(source.llm_dir, allow_llm)
        config = source.config
        tokenizers = read_tokenizers(
            source.llm_dir,
            bert or source.bert_dir,
            config.llm.vocab_size,
            config.qformer.vocab_size,
        )
        processor = Processor(*tokenizers, config)
        params = lazy_params(source, dtype)
        check_zeros(source)
        total = sum(value.nbytes for value in params.values())
        check_room(target, total)
        with written_beside(target, force) as partial:
            with tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=None) as bar:
                digest = write_params(partial / PARAMS_DIR, params, bar.update)
            save_processor(processor, partial)
            write_json(partial / "config.json", {"model": to_dict(config)})
            base = {
                "fingerprint": digest,
                "sources": [str(file) for part in source.sources for file in part.files],
                "parameters": sum(value.size for value in params.values()),
                "bytes": total,
                "image_token": source.image_token,
                "missing": sorted(set(param_shapes(config)) - set(params)),
            }
            write_json(partial / "base.json", base)  # last: its presence says that all is there
    return base


def lazy_params(source: TorchCheckpoint, dtype: str = "") -> dict[str, LazyArray]:
    """Every parameter of a recognised checkpoint, to be read layer by layer.

    Raises:
      UserError: with a readable difference, if names or shapes do not fit.
    """
    shapes = param_shapes(source.config)
    found = match(shapes, source.parts)
    params = {}
    for path, (number, pieces) in sorted(found.items()):
        reader = source.sources[number]
        stored = [np.dtype(_np_dtype(reader.dtypes[piece.name])) for piece in pieces]
        kind = np.dtype(_np_dtype(dtype)) if dtype else _promoted(stored)
        stacked = len(pieces) > 1 or pieces[0].shape != shapes[path]

        def read(i: int, reader=reader, pieces=pieces, kind=kind) -> np.ndarray:
            piece = pieces[i]
            values = reader.read(piece.name, piece.rows)
            return piece.layout.to_ours(values, piece.shape).astype(kind, copy=False)

        params[path] = LazyArray(shapes[path], kind, len(pieces) if stacked else None, read)
    return params


def check_zeros(source: TorchCheckpoint) -> None:
    """Refuses values where ours has no parameter: EVA's attention has no bias on the keys.

    Raises:
      UserError: naming the tensor.
    """
    for reader, part in zip(source.sources, source.parts, strict=True):
        for name, (which, parts) in part.table.zeros.items():
            if name in part.shapes:
                size = part.shapes[name][0] // parts
                if reader.read(name, slice(which * size, (which + 1) * size)).any():
                    raise UserError(
                        f"{part.where}: {name} is not zero on the keys, where EVA has no bias; "
                        "these are the weights of another vision model"
                    )


def save_processor(processor: Processor, directory: epath.Path) -> None:
    """Writes the tokenizers, also where the tokenizers library cannot write."""
    with tempfile.TemporaryDirectory() as local:
        processor.save(local)
        for file in sorted(path for path in pathlib.Path(local).rglob("*") if path.is_file()):
            copy = directory / file.relative_to(local).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def _np_dtype(name: str) -> Any:
    import ml_dtypes

    known = {"float64", "float32", "float16", "bfloat16"}
    if name not in known:
        raise UserError(f"dtype {name} is not one of {', '.join(sorted(known))}")
    return ml_dtypes.bfloat16 if name == "bfloat16" else name


def _promoted(kinds: Sequence[np.dtype]) -> np.dtype:
    """One dtype that holds every layer's values exactly."""
    unique = set(kinds)
    return unique.pop() if len(unique) == 1 else np.dtype(np.float32)
