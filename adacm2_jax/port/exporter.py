"""Our checkpoints into PyTorch's: a Hugging Face directory, or LAVIS's parts."""

import json
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath
from tqdm import tqdm

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.errors import UserError
from adacm2_jax.files import write_json
from adacm2_jax.inference.processor import Processor
from adacm2_jax.models.vit import PIXEL_MEAN, PIXEL_STD
from adacm2_jax.port import names
from adacm2_jax.port.destination import check_room, open_destination, written_beside
from adacm2_jax.port.formats import TorchParams, to_hugging_face_config
from adacm2_jax.port.rules import Piece, Table, pieces_of
from adacm2_jax.port.source import to_torch
from adacm2_jax.port.store import OurParams, open_ours
from adacm2_jax.runs.workdir import read_base

#: Bytes of one file of an exported directory.
SHARD_BYTES = 1 << 30


def export_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    form: str,
    *,
    drop_temporal: bool = False,
    force: bool = False,
) -> None:
    """Writes a converted checkpoint, or the newest step of a run, for PyTorch.

    ``hf`` makes a directory for ``InstructBlipForConditionalGeneration.from_pretrained``; ``lavis``
    makes ``eva_vit_g.pth``, ``instruct_blip_vicuna7b_trimmed.pth`` (``checkpoint_best.pth``, as
    MA-LMM writes it, if there is a temporal table) and ``vicuna/``.

    Args:
      source: a directory of :func:`import_checkpoint` or of ``train.py``.
      destination: directory to be made.
      form: ``hf`` or ``lavis``.
      drop_temporal: leave the temporal table out of a Hugging Face directory, which has no place
        for it.
      force: replace what is at the destination.

    Raises:
      UserError: if anything does not fit; then nothing is written.
    """
    target = open_destination(destination, force, [source])
    config, ours = open_ours(source)
    if config.llm.quantize:
        raise UserError(
            f"{source} holds its language model in {config.llm.quantize} alone, for which these "
            "formats have no place; export what it was converted from"
        )
    if form == "hf" and "temporal_embed" in ours.shapes and not drop_temporal:
        raise UserError(
            f"{source} has a temporal table, for which Hugging Face's InstructBLIP has no place; "
            "pass --drop-temporal to leave it out, or --format lavis"
        )
    processor = Processor.load(os.fspath(source), config)
    total = sum(int(np.prod(s)) * ours.dtypes[p].itemsize for p, s in ours.shapes.items())
    check_room(target, total)
    table = names.hf_table(config) if form == "hf" else names.lavis_table(config)
    skipped = {"temporal_embed"} if form == "hf" else set()
    with (
        written_beside(target) as partial,
        tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=None) as bar,
    ):
        tensors = TheirTensors(table, ours, skipped)
        if form == "hf":
            write_shards(tensors, list(tensors.shapes), partial, bar.update)
            image_token = read_base(source).get("image_token")
            settings = to_hugging_face_config(config, tensors.common_dtype(), image_token)
            write_json(partial / "config.json", json.loads(settings.to_json_string()))
            _write_hf_processor(processor, config, partial)
        else:
            write_lavis(tensors, config, processor, partial, bar.update)


class TheirTensors:
    """Our parameters under the names and in the shapes of a PyTorch checkpoint.

    Attributes:
      shapes: tensor name → shape.
      nbytes: tensor name → bytes.
    """

    def __init__(self, table: Table, ours: OurParams | TorchParams, skipped: Collection[str] = ()):
        self._ours = ours
        # Tensor → what it is made of: (path, layer, piece).
        self._parts: dict[str, list[tuple[str, int | None, Piece]]] = {}
        for rule in table.rules:
            if rule.ours in skipped or rule.ours not in ours.shapes:
                continue
            pieces = pieces_of(rule, ours.shapes[rule.ours])
            for i, piece in enumerate(pieces):
                layer = None if rule.layers is None else i
                self._parts.setdefault(piece.name, []).append((rule.ours, layer, piece))
        unknown = set(ours.shapes) - set(skipped) - {rule.ours for rule in table.rules}
        if unknown:
            raise UserError(f"parameters without a name in this format: {sorted(unknown)}")
        self.shapes = {name: parts[0][2].whole_shape for name, parts in self._parts.items()}
        self.nbytes = {
            name: int(np.prod(shape)) * self.dtype(name).itemsize
            for name, shape in self.shapes.items()
        }

    def dtype(self, name: str) -> np.dtype:
        return self._ours.dtypes[self._parts[name][0][0]]

    def common_dtype(self) -> str:
        """The dtype that most of the bytes have."""
        sizes: dict[str, int] = {}
        for name, size in self.nbytes.items():
            sizes[self.dtype(name).name] = sizes.get(self.dtype(name).name, 0) + size
        return max(sizes, key=lambda kind: sizes[kind])

    def read(self, name: str) -> np.ndarray:
        """One tensor; shares that ours does not have are zero."""
        whole = np.zeros(self.shapes[name], self.dtype(name))
        for path, layer, piece in self._parts[name]:
            values = piece.layout.to_theirs(self._ours.read(path, layer))
            whole[piece.rows] = values
        return whole


def write_shards(
    tensors: TheirTensors,
    wanted: Sequence[str],
    directory: epath.Path,
    on_bytes: Callable[[int], Any],
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Safetensors files of at most :data:`SHARD_BYTES` (or one tensor), with their index."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in wanted:
        if shards[-1] and size + tensors.nbytes[name] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors.nbytes[name]
    weight_map: dict[str, str] = {}
    directory.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        values = {rename(name): tensors.read(name) for name in shard}
        safetensors.numpy.save_file(values, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
        on_bytes(sum(tensors.nbytes[name] for name in shard))
    if len(shards) > 1:
        total = sum(tensors.nbytes[name] for name in wanted)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)


def write_lavis(
    tensors: TheirTensors,
    config: AdaCM2Config,
    processor: Processor,
    directory: epath.Path,
    on_bytes: Callable[[int], Any],
) -> None:
    """The parts that LAVIS and MA-LMM read."""
    try:
        import torch
    except ImportError:
        raise UserError(
            "--format lavis writes PyTorch pickles; pip install 'adacm2-jax[port]'"
        ) from None
    vit, llm = "visual_encoder.", "llm_model."
    rest = [name for name in tensors.shapes if not name.startswith((vit, llm))]
    temporal = "image_pe.weight" in tensors.shapes
    name = "checkpoint_best.pth" if temporal else "instruct_blip_vicuna7b_trimmed.pth"
    directory.mkdir(parents=True, exist_ok=True)

    def save(file: str, wanted: list[str], prefix: str, wrap: bool) -> None:
        state = {n.removeprefix(prefix): to_torch(tensors.read(n)) for n in wanted}
        torch.save({"model": state} if wrap else state, directory / file)
        on_bytes(sum(tensors.nbytes[n] for n in wanted))

    save("eva_vit_g.pth", [n for n in tensors.shapes if n.startswith(vit)], vit, False)
    save(name, rest, "", True)
    llm_names = [n for n in tensors.shapes if n.startswith(llm)]
    write_shards(tensors, llm_names, directory / "vicuna", on_bytes, lambda n: n.removeprefix(llm))
    settings = to_hugging_face_config(config, tensors.common_dtype(), None).text_config.to_dict()
    settings["architectures"] = ["LlamaForCausalLM"]
    write_json(directory / "vicuna" / "config.json", settings)
    processor.save_llm(directory / "vicuna")
    processor.save_qformer(directory / "bert")


def _write_hf_processor(processor: Processor, config: AdaCM2Config, directory: epath.Path) -> None:
    processor.save_llm(directory)
    processor.save_qformer(directory / "qformer_tokenizer")
    size = config.vision.image_size
    write_json(
        directory / "preprocessor_config.json",
        {
            "image_processor_type": "BlipImageProcessor",
            "processor_class": "InstructBlipProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(PIXEL_MEAN),
            "image_std": list(PIXEL_STD),
        },
    )
    write_json(
        directory / "processor_config.json",
        {
            "processor_class": "InstructBlipProcessor",
            "num_query_tokens": config.qformer.num_queries,
        },
    )
