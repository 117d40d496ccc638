"""What devices send each other, what a loop consists of: read in the text of an optimised program.

For checks of ours alone: a loop is recognised by where it was traced (XLA's ``op_name``).
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

#: Loops that run once a frame, or once a chunk of frames: the end of their ``op_name``.
FRAME_LOOPS = {
    "chunks of frames": re.compile(r"shard_map/while$"),
    "frames": re.compile(r"cross_attention/(.*/)?while$"),
    "ViT blocks": re.compile(r"vision/while$"),
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|true_computation|false_computation|branch_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
_WHILE = re.compile(r" = .* while\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPCODE = re.compile(r" = .*?[\])}] ([a-z][\w\-]*)\(")
#: Instructions of an optimised GPU program that start a kernel.
KERNELS = frozenset(
    ("fusion", "custom-call", "copy", "dot", "convolution", "sort", "scatter", "gather", "reduce")
    + (
        "dynamic-slice",
        "dynamic-update-slice",
        "slice",
        "concatenate",
        "transpose",
        "pad",
        "select",
    )
    + ("iota", "broadcast", "convert", "add", "compare", "reduce-window", "topk")
)
_DIMS = re.compile(r"[a-z]\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An instruction by which devices exchange data.

    Attributes:
      kind: such as ``all-gather``.
      shapes: of what it yields; where it is asynchronous, of its operands, too.
      loops: ``op_name`` of each that it stands in, outermost first.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    loops: tuple[str, ...]

    @property
    def in_frame_loop(self) -> bool:
        """Whether it is sent for every frame or chunk of frames."""
        return any(end.search(loop) for loop in self.loops for end in FRAME_LOOPS.values())


def read(text: str) -> tuple[list[Collective], set[str]]:
    """All collectives of a program, and the ``op_name`` of all its loops.

    Args:
      text: ``compiled.as_text()``.

    Raises:
      ValueError: if it has no entry.
    """
    computations, entry = _computations(text)
    found: list[Collective] = []
    every: set[str] = set()
    for line, loops in _walk(computations, entry, ()):
        every.update(loops)
        if sent := _COLLECTIVE.search(line):
            shapes = [
                tuple(int(size) for size in dims.split(",") if size)
                for dims in _DIMS.findall(re.sub(r"\{[^}]*\}", "", sent[1]))
            ]
            found.append(Collective(sent[2], tuple(shapes), loops))
    return found, every


def loop_body(text: str, end: re.Pattern) -> list[str]:
    """The instructions of the body of a loop, with those of what it calls, but no inner loop's.

    Args:
      text: ``compiled.as_text()``.
      end: of the loop's ``op_name``.

    Raises:
      ValueError: if there is not just one such loop.
    """
    computations, _ = _computations(text)
    bodies = {
        body[1]
        for lines in computations.values()
        for line in lines
        if _WHILE.search(line)
        and (traced := _OP_NAME.search(line))
        and end.search(traced[1])
        and (body := re.search(r"body=%?([\w.\-]+)", line))
    }
    if len(bodies) != 1:
        raise ValueError(f"{len(bodies)} loops end with {end.pattern}, not one")

    return list(_with_called(computations, bodies.pop()))


def entry(text: str) -> list[str]:
    """The instructions of a program's entry, with those of what it calls, but of no loop."""
    computations, name = _computations(text)

    return list(_with_called(computations, name))


def kernels(lines: list[str]) -> list[str]:
    """Of instructions those that a GPU is started for."""
    return [line for line in lines if (made := _OPCODE.search(line)) and made[1] in KERNELS]


def frame_loops(loops: set[str]) -> set[str]:
    """The names of those of :data:`FRAME_LOOPS` that are there."""
    return {name for name, end in FRAME_LOOPS.items() if any(end.search(loop) for loop in loops)}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of every computation, and which is the entry."""
    computations: dict[str, list[str]] = collections.defaultdict(list)
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            entry = name if header[1] else entry
        elif " = " in line:
            computations[name].append(line)
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return computations, entry


def _with_called(computations: dict[str, list[str]], name: str) -> Iterator[str]:
    for line in computations[name]:
        called = re.search(r" call\(.*to_apply=%?([\w.\-]+)", line)
        if called:
            yield from _with_called(computations, called[1])
        else:
            yield line


def _walk(
    computations: dict[str, list[str]], name: str, loops: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every instruction that runs, and the loops that it stands in."""
    for line in computations[name]:
        yield line, loops
        inside = loops
        if _WHILE.search(line):
            traced = _OP_NAME.search(line)
            inside = (*loops, traced[1] if traced else "")
        for called in _CALLED.findall(line):
            for inner in re.findall(r"[\w.\-]+", called):
                yield from _walk(computations, inner, inside)
