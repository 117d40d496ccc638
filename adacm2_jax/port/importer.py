"""PyTorch's checkpoints into ours."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from adacm2_jax.config import QUANTIZED, AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.tokenizers import check_vicuna, read_tokenizers
from adacm2_jax.models.params import param_shapes
from adacm2_jax.models.quantized import quantize, require_qwix, scale_path
from adacm2_jax.port.base import write_base
from adacm2_jax.port.destination import check_room, open_destination
from adacm2_jax.port.formats import TorchCheckpoint, TorchParams, numpy_dtype, open_checkpoint
from adacm2_jax.port.store import LazyArray


def import_checkpoint(
    sources: Sequence[str | pathlib.Path],
    destination: str | os.PathLike,
    *,
    bert: str | pathlib.Path | None = None,
    allow_llm: str = "",
    dtype: str = "",
    quantize: str = "",
    force: bool = False,
) -> dict:
    """Converts a PyTorch checkpoint.

    Args:
      sources: see ``formats.open_checkpoint``.
      destination: directory to be made, local or ``gs://``.
      bert: directory or ``vocab.txt`` of the Q-Former's tokenizer, where the source has none.
      allow_llm: version of Vicuna to accept besides 1.1, such as ``v1.5``.
      dtype: of the result; empty keeps each parameter's own.
      quantize: how the matrices of the language model's layers are kept, one of
        ``config.QUANTIZED``; empty: as all others.
      force: replace what is at the destination.

    Returns:
      What ``base.json`` holds.

    Raises:
      UserError: if anything does not fit; then nothing is written.
    """
    target = open_destination(destination, force, sources)
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
        stored = TorchParams(source)
        check_other_values(source, stored)
        params = lazy_params(stored, dtype)
        if quantize:
            llm = dataclasses.replace(config.llm, quantize=quantize)
            config = dataclasses.replace(config, llm=llm)
            params = quantized(params, stored, config)
        total = sum(value.nbytes for value in params.values())
        check_room(target, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=None) as bar:
            return write_base(
                target,
                config,
                params,
                processor,
                on_bytes=bar.update,
                sources=[str(file) for part in source.sources for file in part.files],
                image_token=source.image_token,
            )


def lazy_params(params: TorchParams, dtype: str = "") -> dict[str, LazyArray]:
    """Every parameter, to be read layer by layer; of its own dtype unless one is named."""

    def lazy(path: str) -> LazyArray:
        kind = numpy_dtype(dtype) if dtype else params.dtypes[path]
        return LazyArray(
            params.shapes[path],
            kind,
            params.layers[path],
            lambda layer: params.read(path, layer).astype(kind, copy=False),
        )

    return {path: lazy(path) for path in params.shapes}


def quantized(
    params: dict[str, LazyArray], stored: TorchParams, config: AdaCM2Config
) -> dict[str, LazyArray]:
    """The parameters of a model of which some are quantised: made of what the source holds."""
    require_qwix()
    shapes, dtype = param_shapes(config), jnp.dtype(QUANTIZED[config.llm.quantize])
    made = dict(params)
    for path in params:
        scale = scale_path(path)
        if path.endswith("/kernel") and scale in shapes:
            made |= _quantized(stored, path, scale, shapes[scale], dtype)
    return made


def _quantized(
    stored: TorchParams, path: str, scale: str, scale_shape: tuple[int, ...], dtype: np.dtype
) -> dict[str, LazyArray]:
    """One stack of matrices and its scales, which are kept from the reading of the matrices."""
    scales: dict[int, np.ndarray] = {}

    def values_of(layer: int) -> np.ndarray:
        values, scale = quantize(stored.read(path, layer), scale_shape[1:], dtype)
        scales[layer] = np.asarray(scale)
        return np.asarray(values)

    def scale_of(layer: int) -> np.ndarray:
        if layer not in scales:
            values_of(layer)
        return scales.pop(layer)

    layers = stored.layers[path]
    return {
        path: LazyArray(stored.shapes[path], dtype, layers, values_of),
        scale: LazyArray(scale_shape, np.dtype(np.float32), layers, scale_of),
    }


def check_other_values(source: TorchCheckpoint, params: TorchParams) -> None:
    """Refuses values for which ours has no parameter: biases on the keys, where EVA has none, and
    a head of its own where ``config.json`` ties it to the embeddings.

    Raises:
      UserError: naming the tensor.
    """
    for reader, part in zip(source.sources, source.parts, strict=True):
        for name in sorted(part.table.zeros.keys() & part.shapes.keys()):
            which, parts = part.table.zeros[name]
            size = part.shapes[name][0] // parts
            if reader.read(name, slice(which * size, (which + 1) * size)).any():
                raise UserError(
                    f"{part.where}: {name} is not zero on the keys, where EVA has no bias; "
                    "these are the weights of another vision model"
                )
        for name in sorted(part.table.copies.keys() & part.shapes.keys()):
            if not np.array_equal(reader.read(name), params.read(part.table.copies[name])):
                raise UserError(
                    f"{part.where}: {name} differs from the table of embeddings, but the language "
                    "model's config.json has tie_word_embeddings: true; set it to false to keep "
                    "this head, or remove the tensor"
                )
