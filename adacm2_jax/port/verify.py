"""Is it the same model? Values tensor by tensor, then outputs layer by layer.

Both compare what is on disk, read again. Only one layer of either side is in memory at a time, so
that a model of 16 GB is compared in less than 4 GB.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.quantized import kind_of, scale_path
from adacm2_jax.models.quantized import quantize as quantize_layer
from adacm2_jax.port.exporter import TheirTensors
from adacm2_jax.port.formats import TorchCheckpoint, TorchParams
from adacm2_jax.port.names import hf_table
from adacm2_jax.port.store import OurParams

#: Largest relative error of an output: 2⁻²⁴ for each rounding, growing like the square root of the
#: 11,008 terms of the longest sum, in each of 83 layers one after the other, is 5e-4; twice that.
TOLERANCE = 1e-3


@dataclasses.dataclass
class Row:
    """One line of the table.

    Attributes:
      what: part of the model.
      count: values compared.
      error: the largest difference, relative to the largest magnitude of the original.
      good: whether it may be so.
    """

    what: str
    count: int
    error: float
    good: bool


def given_table(source: TorchCheckpoint, theirs: TorchParams) -> str:
    """What each part of a checkpoint gives; what a later one lies over is not counted."""
    lines = [f"{'taken from':44} {'tensors':>14} {'parameters':>14}"]
    for number, part in enumerate(source.parts):
        of_part = [pieces for which, pieces in theirs.origins.values() if which == number]
        tensors = len({piece.name for pieces in of_part for piece in pieces})
        values = sum(math.prod(piece.shape) for pieces in of_part for piece in pieces)
        lines.append(f"{part.where:44} {tensors:14} {values:14}")
    return "\n".join(lines)


def compare_values(theirs: TorchParams, ours: OurParams) -> list[Row]:
    """Every value of ours against the tensor that it came from, by network.

    Equal means bit by bit, or, where ours was converted to another dtype, equal after the same
    conversion. What was quantised has a row of its own, which also says how far from the original
    it is.
    """
    rows: dict[str, Row] = {}
    pieces = [
        (path, layer)
        for path, count in theirs.layers.items()
        for layer in ([None] if count is None else range(count))
    ]
    for path, layer in tqdm(pieces, desc="compare values", unit="layer", disable=None):
        kind = kind_of(ours.dtypes[path])
        what = path.split("/")[0] + (f", {kind}" if kind else "")
        row = rows.setdefault(what, Row(what, 0, 0.0, True))
        original, mine = theirs.read(path, layer), ours.read(path, layer)
        row.count += mine.size
        if kind:
            error, same = _compare_quantized(mine, ours.read(scale_path(path), layer), original)
            row.error, row.good = max(row.error, error), row.good and same
            continue
        original = original.astype(mine.dtype)
        if not _same_bits(mine, original):
            row.error = max(row.error, _error(mine, original))
            row.good = False
    return list(rows.values())


def _compare_quantized(
    values: np.ndarray, scale: np.ndarray, original: np.ndarray
) -> tuple[float, bool]:
    """The error that is left of quantising, and whether values and scales are those of it."""
    again = map(np.asarray, quantize_layer(original, scale.shape, values.dtype))
    same = all(_same_bits(*pair) for pair in zip((values, scale), again, strict=True))
    return _error(values.astype(np.float32) * scale, original), same


def _same_bits(mine: np.ndarray, theirs: np.ndarray) -> bool:
    left, right = (
        np.ascontiguousarray(np.asarray(array)).view(np.uint8) for array in (mine, theirs)
    )
    return np.array_equal(left, right)


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude of theirs."""
    left, right = mine.astype(np.float32), theirs.astype(np.float32)
    largest = float(np.abs(right).max())
    return float(np.abs(left - right).max()) / (largest or 1.0)


def compare_outputs(
    config: AdaCM2Config,
    theirs: TorchParams,
    ours: OurParams,
    quantize: str = "",
    seed: int = 0,
) -> list[Row]:
    """Ours and transformers' outputs on a random frame, question and prompt, in float32.

    Each side goes on with its own activations, so errors add up as they do in use. How much a
    language model's outputs may differ once it is quantised nobody can say beforehand: their errors
    are shown and not judged.

    Args:
      config: of the original.
      theirs: its parameters.
      ours: those that were made of them.
      quantize: how ours has the language model's matrices, see ``LlamaConfig``.
      seed: of what goes in.
    """
    from adacm2_jax.port.probe import OurProbe, TheirProbe

    rng = np.random.default_rng(seed)
    size, text = config.vision.image_size, 12
    pixels = rng.standard_normal((1, size, size, 3)).astype(np.float32)
    ids = rng.integers(5, config.qformer.vocab_size, (1, text))
    prompt = rng.integers(5, config.llm.vocab_size, (1, text))
    mine = dataclasses.replace(config, llm=dataclasses.replace(config.llm, quantize=quantize))
    both = [OurProbe(mine, ours), TheirProbe(config, TheirTensors(hf_table(config), theirs))]
    rows: list[Row] = []
    kept = f" ({quantize})" if quantize else ""

    def note(what: str, mine, original) -> None:
        mine, original = np.asarray(mine), np.asarray(original)
        if mine.shape != original.shape:
            raise AssertionError(f"{what}: {mine.shape} against {original.shape}")
        error = _error(mine, original)
        judged = not (quantize and what.startswith("LLM"))
        rows.append(Row(what, mine.size, error, error <= TOLERANCE or not judged))

    def step(what: str, method: str, *args: Any) -> None:
        # One after the other, so that the weights of one layer are there once.
        mine = jax.block_until_ready(getattr(both[0], method)(*args))
        original = getattr(both[1], method)(*args)
        if isinstance(mine, dict):
            for name in mine:
                note(f"{what} {name}", mine[name], original[name])
        else:
            note(what, mine, original)
        bar.update()

    total = config.vision.depth + config.qformer.depth + config.llm.depth + 3
    with (
        jax.default_matmul_precision("highest"),
        tqdm(total=total, desc="compare outputs", unit="layer", disable=None) as bar,
    ):
        for i in range(config.vision.depth):
            step(f"vision block {i}", "vision_block", i, pixels)
        step("vision tokens", "vision_tokens")
        for i in range(config.qformer.depth):
            step(f"Q-Former layer {i}", "qformer_layer", i, ids)
        step("projection", "project")
        for i in range(config.llm.depth):
            step(f"LLM{kept} layer {i}", "llm_layer", i, prompt)
        step(f"LLM{kept} logits", "logits")
    return rows


def table(title: str, rows: Sequence[Row]) -> str:
    """Rows for a terminal; of the layers of one kind the worst is shown."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        kind = " ".join(word for word in row.what.split(" ") if not word.isdigit())
        groups.setdefault(kind, []).append(row)
    lines = [f"{title:44} {'values':>14} {'largest error':>14}"]
    for kind, members in groups.items():
        worst = max(members, key=lambda row: (not row.good, row.error))
        label = kind if len(members) == 1 else f"{kind} x {len(members)}, worst: {worst.what}"
        error = "equal" if worst.error == 0 and worst.good else f"{worst.error:.1e}"
        mark = "" if worst.good else "  differs"
        lines.append(f"{label:44} {sum(r.count for r in members):14} {error:>14}{mark}")
    return "\n".join(lines)
