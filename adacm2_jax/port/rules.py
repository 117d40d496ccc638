"""How a parameter of ours and a tensor of a PyTorch checkpoint are the same numbers.

Ours stacks the layers of a network along a leading axis and keeps attention heads apart; PyTorch
has a tensor a layer, linear weights as ``[out, in]`` and sometimes several of ours in one tensor
(EVA's packed ``qkv``). A :class:`Rule` states one such correspondence, and :func:`match` checks a
whole checkpoint against a list of rules, in both directions, before a single value is read.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from adacm2_jax.errors import UserError

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of one layer's parameter lie in PyTorch.

    Attributes:
      kind: ``same``: identical. ``flat``: heads and head width in one axis. ``linear``: ``[out,
        in]``, with heads and head width in one axis on either side. ``conv``: ``[out, in, h, w]``.
      num_inputs: of ``linear``: how many of our leading axes are inputs.
    """

    kind: str
    num_inputs: int = 1

    def shape(self, ours: Shape) -> Shape:
        """The tensor's shape in PyTorch."""
        if self.kind == "same":
            return ours
        if self.kind == "flat":
            return (math.prod(ours),)
        if self.kind == "conv":
            return (ours[3], ours[2], ours[0], ours[1])
        return (math.prod(ours[self.num_inputs :]), math.prod(ours[: self.num_inputs]))

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        if self.kind == "conv":
            return theirs.transpose(2, 3, 1, 0)
        return (theirs.T if self.kind == "linear" else theirs).reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        if self.kind == "conv":
            return ours.transpose(3, 2, 0, 1)
        if self.kind == "linear":
            return ours.reshape(math.prod(ours.shape[: self.num_inputs]), -1).T
        return ours.reshape(self.shape(ours.shape))


SAME, FLAT, CONV = Layout("same"), Layout("flat"), Layout("conv")
LINEAR, FROM_HEADS = Layout("linear"), Layout("linear", num_inputs=2)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One parameter of ours, in all layers of its stack.

    Attributes:
      ours: path in our tree, such as ``vision/blocks/query/kernel``.
      theirs: name of the tensor; ``{}`` stands for the number of the layer.
      layout: of one layer's values.
      layers: numbers of the layers that our stack holds, in its order; None if it is no stack.
      part: our share of the tensor's first axis, as (which, of how many equal parts).
    """

    ours: str
    theirs: str
    layout: Layout
    layers: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)

    def names(self) -> list[str]:
        """The tensors that it reads, in the order of our stack."""
        if self.layers is None:
            return [self.theirs]
        return [self.theirs.format(number) for number in self.layers]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one layer of one parameter of ours is in a PyTorch checkpoint.

    Attributes:
      name: the tensor.
      part: our share of its first axis.
      layout: of that share.
      shape: ours, of this layer.
    """

    name: str
    part: tuple[int, int]
    layout: Layout
    shape: Shape

    @property
    def whole_shape(self) -> Shape:
        """Of the tensor."""
        first, *others = self.layout.shape(self.shape)
        return (first * self.part[1], *others)

    @property
    def rows(self) -> slice:
        """Of the tensor's first axis."""
        size = self.layout.shape(self.shape)[0]
        return slice(self.part[0] * size, (self.part[0] + 1) * size)


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one kind of checkpoint.

    Attributes:
      rules: one for each parameter of ours.
      zeros: tensor name → a share of its first axis that is zero and has no counterpart of ours
        (EVA's attention has no bias on the keys).
      ignored: regular expressions over tensors that carry no parameter, and why.
      optional: paths of ours that the checkpoint may lack.
      copies: tensor name → path of ours whose values it may repeat, but not change (a tied head).
    """

    rules: tuple[Rule, ...]
    zeros: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    ignored: tuple[tuple[str, str], ...] = ()
    optional: tuple[str, ...] = ()
    copies: dict[str, str] = dataclasses.field(default_factory=dict)


def pieces_of(rule: Rule, shape: Shape) -> list[Piece]:
    """A rule for a parameter of ours of this (stacked) shape.

    Raises:
      UserError: if our stack has another number of layers.
    """
    if rule.layers is None:
        return [Piece(rule.theirs, rule.part, rule.layout, shape)]
    if len(rule.layers) != shape[0]:
        raise UserError(f"{rule.ours}: {shape[0]} layers here, {len(rule.layers)} there")
    return [Piece(name, rule.part, rule.layout, shape[1:]) for name in rule.names()]


@dataclasses.dataclass(frozen=True)
class Part:
    """One file or directory of a checkpoint, before anything is read.

    Attributes:
      where: its path, for messages.
      table: the names that it uses.
      shapes: tensor name → shape.
    """

    where: str
    table: Table
    shapes: dict[str, Shape]


def match(ours: dict[str, Shape], parts: Sequence[Part]) -> dict[str, tuple[int, list[Piece]]]:
    """Pairs every parameter of ours with tensors, and every tensor with a use.

    Args:
      ours: path → shape of all parameters.
      parts: of the checkpoint; a parameter that several hold is taken from the last.

    Returns:
      path → the part that holds it, and a :class:`Piece` a layer. Optional parameters that no part
      holds are left out.

    Raises:
      UserError: with a readable difference, if anything is missing, left over or of another shape;
        for a part that gives nothing.
    """
    found: dict[str, tuple[int, list[Piece]]] = {}
    lines = []
    for number, part in enumerate(parts):
        known = {rule.ours for rule in part.table.rules}
        if known != set(ours):
            raise AssertionError(f"names.py does not cover {sorted(known ^ set(ours))}")
        used = set(part.table.copies)
        given = False
        for rule in part.table.rules:
            names = rule.names()
            used.update(names)
            if set(names).isdisjoint(part.shapes):
                continue
            given = True
            try:
                pieces = pieces_of(rule, ours[rule.ours])
            except UserError as error:
                lines.append(f" ! {error}")
                continue
            for piece in pieces:
                shape = part.shapes.get(piece.name)
                if shape is None:
                    lines.append(f" - {piece.name} {piece.whole_shape}")
                elif shape != piece.whole_shape:
                    lines.append(f" ! {piece.name} {shape}, expected {piece.whole_shape}")
            found[rule.ours] = (number, pieces)
        for name in sorted(set(part.shapes) - used):
            if not any(re.fullmatch(pattern, name) for pattern, _ in part.table.ignored):
                lines.append(f" + {name} {part.shapes[name]}")
        if not given and not lines:
            tensors = ", ".join(sorted(part.shapes)[:5])
            raise UserError(
                f"{part.where} gives no parameter of this model, it holds {tensors}; leave it out, "
                "or name the file with the weights"
            )
    for rule in parts[0].table.rules:
        if rule.ours not in found and rule.ours not in parts[0].table.optional:
            pieces = pieces_of(rule, ours[rule.ours])
            lines += [f" - {piece.name} {piece.whole_shape}" for piece in pieces]
    if lines:
        lines = list(dict.fromkeys(lines))
        shown = "\n".join(lines[:40]) + ("" if len(lines) <= 40 else f"\n … {len(lines)} in all")
        raise UserError(
            f"{', '.join(part.where for part in parts)}: these are not the weights of this model "
            f"(- missing, + unknown, ! of another shape); nothing was written\n{shown}"
        )
    return found
