"""Is it the same model? Values tensor by tensor, then outputs layer by layer.

Both compare what is on disk, read again. Only one layer of either side is in memory at a time, so
that a model of 16 GB is compared in less than 4 GB.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from adacm2_jax.models.params import param_shapes
from adacm2_jax.port.formats import TorchCheckpoint
from adacm2_jax.port.names import hf_table
from adacm2_jax.port.rules import Piece, match, pieces_of
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


def compare_values(source: TorchCheckpoint, ours: OurParams) -> list[Row]:
    """Every value of ours against the tensor that it came from, by network.

    Equal means bit by bit, or, where ours was converted to another dtype, equal after the same
    conversion.
    """
    found = match(param_shapes(source.config), source.parts)
    rows: dict[str, Row] = {}
    layers = sum(len(pieces) for _, pieces in found.values())
    with tqdm(total=layers, desc="compare values", unit="layer", disable=None) as bar:
        for path, (number, pieces) in found.items():
            row = rows.setdefault(path.split("/")[0], Row(path.split("/")[0], 0, 0.0, True))
            stacked = len(pieces) > 1 or pieces[0].shape != ours.shapes[path]
            for i, piece in enumerate(pieces):
                theirs = source.sources[number].read(piece.name, piece.rows)
                theirs = piece.layout.to_ours(theirs, piece.shape).astype(ours.dtypes[path])
                mine = ours.read(path, i if stacked else None)
                row.count += mine.size
                if not _same_bits(mine, theirs):
                    row.error = max(row.error, _error(mine, theirs))
                    row.good = False
                bar.update()
    return list(rows.values())


def _same_bits(mine: np.ndarray, theirs: np.ndarray) -> bool:
    left, right = (np.ascontiguousarray(array).view(np.uint8) for array in (mine, theirs))
    return np.array_equal(left, right)


def _error(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest magnitude of theirs."""
    left, right = mine.astype(np.float32), theirs.astype(np.float32)
    largest = float(np.abs(right).max())
    return float(np.abs(left - right).max()) / (largest or 1.0)


class TheirWeights:
    """A checkpoint's tensors under Hugging Face's names, whatever its own names are."""

    def __init__(self, source: TorchCheckpoint):
        shapes = param_shapes(source.config)
        self._source = source
        found = match(shapes, source.parts)
        self._parts: dict[str, list[tuple[Piece, int, Piece]]] = {}
        for rule in hf_table(source.config).rules:
            if rule.ours in found:
                number, pieces = found[rule.ours]
                for want, have in zip(pieces_of(rule, shapes[rule.ours]), pieces, strict=True):
                    self._parts.setdefault(want.name, []).append((want, number, have))

    def state(self, prefix: str) -> dict[str, Any]:
        """A module's ``state_dict`` in float32: what stands below a prefix."""
        import torch

        state = {}
        for name, parts in self._parts.items():
            if name.startswith(prefix):
                whole = np.zeros(parts[0][0].whole_shape, np.float32)
                for want, number, have in parts:
                    whole[want.rows] = self._source.sources[number].read(have.name, have.rows)
                state[name.removeprefix(prefix)] = torch.from_numpy(whole)
        return state


def compare_outputs(source: TorchCheckpoint, ours: OurParams, seed: int = 0) -> list[Row]:
    """Ours and transformers' outputs on a random frame, question and prompt, in float32.

    Each side goes on with its own activations, so errors add up as they do in use.
    """
    from adacm2_jax.port.probe import OurProbe, TheirProbe

    config = source.config
    rng = np.random.default_rng(seed)
    size, text = config.vision.image_size, 12
    pixels = rng.standard_normal((1, size, size, 3)).astype(np.float32)
    ids = rng.integers(5, config.qformer.vocab_size, (1, text))
    prompt = rng.integers(5, config.llm.vocab_size, (1, text))
    both = [OurProbe(config, ours), TheirProbe(config, TheirWeights(source))]
    rows: list[Row] = []

    def note(what: str, mine, theirs) -> None:
        mine, theirs = np.asarray(mine), np.asarray(theirs)
        if mine.shape != theirs.shape:
            raise AssertionError(f"{what}: {mine.shape} against {theirs.shape}")
        error = _error(mine, theirs)
        rows.append(Row(what, mine.size, error, error <= TOLERANCE))

    def step(what: str, method: str, *args: Any) -> None:
        # One after the other, so that the weights of one layer are there once.
        mine = jax.block_until_ready(getattr(both[0], method)(*args))
        theirs = getattr(both[1], method)(*args)
        if isinstance(mine, dict):
            for name in mine:
                note(f"{what} {name}", mine[name], theirs[name])
        else:
            note(what, mine, theirs)
        bar.update()

    total = config.vision.depth + config.qformer.depth + config.llm.depth + 3
    with tqdm(total=total, desc="compare outputs", unit="layer", disable=None) as bar:
        for i in range(config.vision.depth):
            step(f"vision block {i}", "vision_block", i, pixels)
        step("vision tokens", "vision_tokens")
        for i in range(config.qformer.depth):
            step(f"Q-Former layer {i}", "qformer_layer", i, ids)
        step("projection", "project")
        for i in range(config.llm.depth):
            step(f"LLM layer {i}", "llm_layer", i, prompt)
        step("LLM logits", "logits")
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
