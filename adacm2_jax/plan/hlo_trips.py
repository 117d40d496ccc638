"""How often a loop of HLO runs."""

import re

from adacm2_jax.plan.hlo_text import Computation, Instruction

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
#: What hands on a scalar as it is.
_ALIASES = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")


def trip_count(
    loop: Instruction, computation: Computation, computations: dict[str, Computation]
) -> int | None:
    """The rounds of a ``while``: as the compiler noted them, else read from its condition.

    Returns:
      None where the condition does not compare a counter with a constant.
    """
    known = _KNOWN.search(loop.attributes)
    if known:
        return int(known[1])
    condition = computations[loop.called["condition"][0]]
    body = computations[loop.called["body"][0]]
    test = _inlined(condition.root, computations)
    if test is None:
        return None
    direction, left, right = test
    counter, limit = _tuple_index(left), _constant(right, loop, body)
    if counter is None or limit is None:
        counter, limit = _tuple_index(right), _constant(left, loop, body)
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if counter is None or limit is None:
        return None
    start = _initial(loop, counter)
    step = _step(body, counter, computations, loop)
    if start is None or not step:
        return None
    span = {
        "LT": limit - start,
        "LE": limit - start + 1,
        "NE": limit - start,
        "GT": start - limit,
        "GE": start - limit + 1,
    }.get(direction)
    return None if span is None else max(0, -(-span // abs(step)))


def _inlined(
    root: Instruction, computations: dict[str, Computation]
) -> tuple[str, Instruction, Instruction] | None:
    """The direction of a comparison and both its sides, as they are outside its fusion."""
    root = _origin(root)
    if root.opcode == "fusion":
        fused = computations[root.called["calls"][0]]
        test = _origin(fused.root)
        if test.opcode != "compare":
            return None
        sides = [_origin(test.operand(place)) for place in (0, 1)]
        left, right = (
            root.operand(int(side.arguments)) if side.opcode == "parameter" else side
            for side in sides
        )
        return str(test.attribute("direction")), left, right
    if root.opcode != "compare":
        return None
    return str(root.attribute("direction")), root.operand(0), root.operand(1)


def _origin(instruction: Instruction) -> Instruction:
    while instruction.opcode in _ALIASES:
        instruction = instruction.operand(0)
    return instruction


def _tuple_index(instruction: Instruction) -> int | None:
    """Which entry of the loop's state this is."""
    origin = _origin(instruction)
    if origin.opcode != "get-tuple-element" or origin.operand(0).opcode != "parameter":
        return None
    return origin.numbers("index")[0]


def _literal(instruction: Instruction | None) -> int | None:
    if instruction is None:
        return None
    origin = _origin(instruction)
    if origin.opcode != "constant" or not re.fullmatch(r"-?\d+", origin.arguments):
        return None
    return int(origin.arguments)


def _initial(loop: Instruction, index: int) -> int | None:
    """A constant entry of the state that the loop starts from."""
    state = _origin(loop.operand(0))
    if state.opcode != "tuple":
        return None
    entry = _origin(state.operand(index))
    if entry.opcode == "get-tuple-element":
        before = _origin(entry.operand(0))
        place = entry.numbers("index")[0]
        # What an earlier loop handed on unchanged.
        if before.opcode == "while":
            return _initial(before, place)
        if before.opcode == "tuple":
            return _literal(before.operand(place))
        return None
    return _literal(entry)


def _constant(instruction: Instruction, loop: Instruction, body: Computation) -> int | None:
    """A constant, also one that the loop carries along unchanged."""
    index = _tuple_index(instruction)
    if index is None:
        return _literal(instruction)
    if body.root.opcode != "tuple" or _tuple_index(body.root.operand(index)) != index:
        return None
    return _initial(loop, index)


def _step(
    body: Computation, index: int, computations: dict[str, Computation], loop: Instruction
) -> int | None:
    """What a round adds to an entry of the state."""
    if body.root.opcode != "tuple":
        return None
    new = _origin(body.root.operand(index))
    if new.opcode == "get-tuple-element" and _origin(new.operand(0)).opcode == "fusion":
        fusion = _origin(new.operand(0))
        root = computations[fusion.called["calls"][0]].root
        place = new.numbers("index")[0]
        if root.opcode != "tuple":
            return None
        return _added(_origin(root.operand(place)), fusion, index, loop, body)
    if new.opcode == "fusion":
        root = _origin(computations[new.called["calls"][0]].root)
        return _added(root, new, index, loop, body)
    return _added(new, None, index, loop, body)


def _added(
    new: Instruction,
    fusion: Instruction | None,
    index: int,
    loop: Instruction,
    body: Computation,
) -> int | None:
    if new.opcode not in ("add", "subtract"):
        return None
    sides = [_origin(new.operand(place)) for place in (0, 1)]
    if fusion is not None:
        sides = [
            fusion.operand(int(side.arguments)) if side.opcode == "parameter" else side
            for side in sides
        ]
    for counter, other in (sides, sides[::-1]):
        step = _constant(other, loop, body)
        if _tuple_index(counter) == index and step is not None:
            return step if new.opcode == "add" else -step
    return None
