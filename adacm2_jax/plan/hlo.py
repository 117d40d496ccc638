"""Reads optimised HLO: what is really computed, moved and communicated, and inside which loop.

``compiled.cost_analysis()`` counts the body of a loop once, and jax's Python API hands out neither
trip counts nor collectives, so this file reads the text of the module. It works alike on programs
for CPU, TPU (where matrix products are convolutions) and GPU (where they are calls of cuBLAS).

Use::

    program = read(compiled.as_text())        # or read(compiled)
    program.flops()                           # of dots and convolutions, loops multiplied out
    program.bytes_accessed()                  # of operands and results, outside fusions
    program.loops                             # tuple[Loop, …] in order of the text
    program.collectives                       # tuple[Collective, …], one for each instruction

    [c for c in program.collectives if c.inside("jvp(chunks)")]

A :class:`Loop` knows its ``trip_count`` (None where only the data decide), its ``parents`` and
``op_name``: the path of Python scopes and Flax modules that it was traced from. A
:class:`Collective` has ``kind`` (``all-gather``, ``all-reduce``, ``reduce-scatter``,
``all-to-all``, ``collective-permute``, …), ``dtype``, ``shapes``, ``bytes`` (that arrive on one
device in one execution), ``loops`` (those it stands in, outermost first), ``op_name``, and
``executions``. ``Program.instructions`` walks everything with its loops, for questions that are
not answered here.

All figures are those of one device: the module is the program that every device runs.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

from adacm2_jax.plan.hlo_cost import arriving_bytes, bytes_moved, product_flops, scattered
from adacm2_jax.plan.hlo_text import Computation, Instruction, Shape, parse
from adacm2_jax.plan.hlo_trips import trip_count

#: Instructions that devices exchange data in; ``…-start`` counts, ``…-done`` does not.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A ``while`` of the program.

    Attributes:
      name: of the instruction.
      op_name: where it was traced: scopes and modules, divided by slashes.
      trip_count: how often its body runs each time; None if that depends on data.
      parents: the loops that it stands in, outermost first.
      body: the name of its body's computation.
    """

    name: str
    op_name: str
    trip_count: int | None
    parents: tuple["Loop", ...]
    body: str

    @property
    def executions(self) -> int | None:
        """How often its body runs in one run of the program; None where a trip count is unknown."""
        return executions((*self.parents, self))


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction by which devices exchange data.

    Attributes:
      kind: without ``-start``.
      name: of the instruction.
      dtype: of the first array.
      shapes: of the arrays that it yields on one device.
      bytes: that arrive on one device in one execution; of these arrays where it is not told how
        many devices exchange them.
      loops: those that it stands in, outermost first.
      op_name: where it was traced.
    """

    kind: str
    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    loops: tuple[Loop, ...]
    op_name: str

    @property
    def executions(self) -> int | None:
        """How often it runs in one run of the program; None where a trip count is unknown."""
        return executions(self.loops)

    def inside(self, scope: str) -> bool:
        """Whether it stands in a loop whose ``op_name`` contains ``scope``."""
        return any(scope in loop.op_name for loop in self.loops)


def executions(loops: tuple[Loop, ...], unknown: int | None = None) -> int | None:
    """The product of the trip counts, with ``unknown`` where one is not known."""
    counts = [unknown if loop.trip_count is None else loop.trip_count for loop in loops]
    known = [count for count in counts if count is not None]
    return math.prod(known) if len(known) == len(counts) else None


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimised module.

    Attributes:
      computations: by name.
      entry: the name of the one that is called.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def visited(self) -> tuple[tuple[Instruction, tuple[Loop, ...], bool], ...]:
        """Every instruction that runs, the loops that it stands in (outermost first), and whether
        it is within a fusion. A computation that is called twice appears twice."""
        return tuple(self._walk(self.computations[self.entry], (), False))

    def instructions(self) -> Iterator[tuple[Instruction, tuple[Loop, ...]]]:
        """Every instruction that runs, and the loops that it stands in."""
        return ((instruction, loops) for instruction, loops, _ in self.visited)

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """All loops, outer ones before those inside them."""
        found: dict[Loop, None] = {}
        for _, loops, _ in self.visited:
            for loop in loops:
                found.setdefault(loop)
        return tuple(found)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """All collectives. Of one that the compiler spreads over several fusions, to overlap it
        with what else they compute, the first of the fewest loops stands for all."""
        found: list[Collective] = []
        spread: dict[str, int] = {}
        for instruction, loops, fused in self.visited:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            shapes = self._received(instruction)
            if fused and kind == "all-reduce" and (part := scattered(instruction)):
                kind, shapes = "reduce-scatter", part.shapes
            each = Collective(
                kind=kind,
                name=instruction.name,
                dtype=shapes[0].dtype,
                shapes=tuple(shape.dims for shape in shapes),
                bytes=arriving_bytes(kind, instruction, sum(shape.bytes for shape in shapes)),
                loops=loops,
                op_name=instruction.op_name,
            )
            channel = instruction.attribute("channel_id")
            if fused and channel in spread:
                place = spread[channel]
                if len(loops) < len(found[place].loops):
                    found[place] = each
                continue
            if fused and channel:
                spread[channel] = len(found)
            found.append(each)
        return tuple(found)

    def flops(self, unknown_trips: int = 1) -> float:
        """Floating-point operations of matrix products and convolutions, two a multiplication.

        Args:
          unknown_trips: what a loop counts whose number of rounds depends on data.
        """
        return sum(count for count, _, _ in self.products(unknown_trips))

    def products(
        self, unknown_trips: int = 1
    ) -> Iterator[tuple[float, Instruction, tuple[Loop, ...]]]:
        """The FLOPs of every matrix product, all its executions together."""
        for instruction, loops, _ in self.visited:
            count = product_flops(instruction, self.computations)
            if count:
                yield count * (executions(loops, unknown_trips) or 0), instruction, loops

    def bytes_accessed(self, unknown_trips: int = 1) -> float:
        """Bytes that instructions read and write, what stays inside a fusion apart.

        A slice of an array counts with its own size, as does an update in place. What the hardware
        holds in a cache between two instructions counts each time.
        """
        total = 0
        for instruction, loops, fused in self.visited:
            if not fused:
                moved = bytes_moved(instruction, self.computations)
                total += moved * (executions(loops, unknown_trips) or 0)
        return total

    def _received(self, instruction: Instruction) -> tuple[Shape, ...]:
        """What a collective yields on this device."""
        shapes = instruction.shapes
        if instruction.opcode.endswith("-start"):
            # Operands, results, and sometimes scalars for synchronisation.
            inputs = len(instruction.operands)
            if instruction.opcode == "all-reduce-start":
                return shapes
            arrays = shapes[inputs : 2 * inputs]
            return arrays or shapes
        return shapes

    def _walk(
        self, computation: Computation, loops: tuple[Loop, ...], fused: bool
    ) -> Iterator[tuple[Instruction, tuple[Loop, ...], bool]]:
        for instruction in computation.instructions.values():
            yield instruction, loops, fused
            if instruction.opcode == "while":
                body = instruction.called["body"][0]
                loop = Loop(
                    name=instruction.name,
                    op_name=instruction.op_name,
                    trip_count=trip_count(instruction, computation, self.computations),
                    parents=loops,
                    body=body,
                )
                yield from self._walk(self.computations[body], (*loops, loop), False)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                for name in (*instruction.called["calls"], *instruction.called["to_apply"]):
                    inside = fused or instruction.opcode == "fusion"
                    yield from self._walk(self.computations[name], loops, inside)
            elif instruction.opcode == "conditional":
                for name in instruction.called["branches"]:
                    yield from self._walk(self.computations[name], loops, fused)


def read(compiled) -> Program:
    """The program of a ``jax.stages.Compiled``, or of its text.

    Raises:
      ValueError: if this is no text of an HLO module.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = parse(text)
    return Program(computations, entry)
