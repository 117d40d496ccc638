"""The text of an HLO module, taken apart: computations, instructions, shapes."""

import collections
import dataclasses
import functools
import math
import re

#: Bytes of an element; what is not here (tokens) has none.
ELEMENT_BYTES = {
    "pred": 1,
    **dict.fromkeys(("s4", "u4", "s2", "u2", "s1", "u1"), 1),
    **dict.fromkeys(("s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's element type and sizes."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        width = 1 if self.dtype.startswith("f8") else ELEMENT_BYTES.get(self.dtype, 0)
        return self.elements * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without its percent sign.
      opcode: such as ``fusion``.
      result: the text of its type.
      arguments: the text in its parentheses.
      attributes: the text behind them.
      computation: the one that it stands in.
      root: whether it is what the computation yields.
    """

    name: str
    opcode: str
    result: str
    arguments: str
    attributes: str
    computation: "Computation" = dataclasses.field(repr=False, compare=False, hash=False)
    root: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays that it yields; a tuple's one after the other."""
        return tuple(
            Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
            for dtype, dims in _ARRAY.findall(_without_layouts(self.result))
        )

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that it reads."""
        return () if self.opcode == "constant" else tuple(_NAME.findall(self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, list[str]]:
        """Names of computations by role; ``branches`` of a conditional."""
        found = collections.defaultdict(list)
        for role, name in _CALLED.findall(self.attributes):
            found["branches" if role.endswith("_computation") else role].append(name)
        for names in _BRANCHES.findall(self.attributes):
            found["branches"] += re.findall(r"[\w.\-]+", names)
        return found

    @property
    def op_name(self) -> str:
        """Where it was traced; empty if that is not known."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def bytes(self) -> int:
        """Of all that it yields."""
        return sum(shape.bytes for shape in self.shapes)

    def operand(self, index: int) -> "Instruction":
        """The instruction that it reads at this place."""
        return self.computation.instructions[self.operands[index]]

    def attribute(self, name: str) -> str | None:
        """The text of an attribute, braces included."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers of an attribute such as ``{0,2}``; empty if it is not there."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(name) or ""))


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        """What it yields."""
        return next(each for each in self.instructions.values() if each.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {
            int(each.arguments): each
            for each in self.instructions.values()
            if each.opcode == "parameter"
        }

    @functools.cached_property
    def readers(self) -> dict[str, list[Instruction]]:
        """Who reads an instruction, by its name."""
        found = collections.defaultdict(list)
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found[name].append(each)
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry.

    Raises:
      ValueError: if there is no entry.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is not None:
            if " = " in line:
                instruction = _instruction(line.strip(), current)
                current.instructions[instruction.name] = instruction
        elif line.endswith("{") and (header := _HEADER.match(line)):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _instruction(line: str, computation: Computation) -> Instruction:
    left, _, right = line.partition(" = ")
    root = left.startswith("ROOT ")
    if right.startswith("("):
        end = _closing(right, 0) + 1
    else:
        end = right.index(" ")
    result, rest = right[:end], right[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:opening],
        result=result,
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        computation=computation,
        root=root,
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at ``opening`` is closed."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:100]}")


def _without_layouts(text: str) -> str:
    return re.sub(r"\{[^}]*\}", "", text)
