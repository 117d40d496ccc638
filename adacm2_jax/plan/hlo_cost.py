"""What one HLO instruction computes and moves."""

import math
import re

import numpy as np

from adacm2_jax.plan.hlo_text import Computation, Instruction

#: Instructions that move nothing by themselves.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
    "partition-id replica-id iota async-start async-update async-done optimization-barrier "
    "copy-done all-gather-done all-reduce-done collective-permute-done".split()
)

_WINDOW = re.compile(r"(\w+)=([\d_x\-]+)")


def product_flops(instruction: Instruction, computations: dict[str, Computation]) -> float:
    """Floating-point operations of a matrix product or convolution, 0 of anything else."""
    if instruction.opcode == "dot":
        return _dot(instruction, instruction.numbers("lhs_contracting_dims"))
    if instruction.opcode == "convolution":
        return _convolution(instruction)
    if instruction.opcode == "custom-call":
        return _library_call(instruction)
    return 0


def bytes_moved(instruction: Instruction, computations: dict[str, Computation]) -> int:
    """Bytes that an instruction outside a fusion reads and writes in one execution."""
    if instruction.opcode in FREE:
        return 0
    if instruction.opcode == "fusion":
        return _fusion_bytes(instruction, computations)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.bytes
    if instruction.opcode == "copy-start":  # its result names the source, too
        return 2 * instruction.operand(0).bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * instruction.operand(1).bytes
    if instruction.opcode == "scatter":
        return 3 * instruction.operand(2).bytes
    return instruction.bytes + sum(
        instruction.operand(place).bytes for place in range(len(instruction.operands))
    )


def arriving_bytes(kind: str, instruction: Instruction, result: int) -> int:
    """Bytes that arrive on one device in one execution of a collective, sent as on a ring.

    Args:
      kind: of the collective, without ``-start``.
      instruction: whose ``replica_groups`` say how many devices exchange data.
      result: bytes that it yields on the device.

    Returns:
      ``result`` where the size of a group cannot be read.
    """
    size = group_size(instruction)
    if size is None:
        return result
    others = size - 1
    if kind == "reduce-scatter":  # the device's part, of every other
        return result * others
    if kind == "all-reduce":  # a reduce-scatter, then an all-gather
        return 2 * result * others // size
    if kind in ("all-gather", "all-to-all", "ragged-all-to-all"):  # its own part is there
        return result * others // size
    return result


def group_size(instruction: Instruction) -> int | None:
    """How many devices exchange data; None if it is not told.

    ``replica_groups`` is one of ``{{0,1},{2,3}}``; ``[2,4]<=[4,2]T(1,0)``: groups, their size, and
    how devices are numbered; ``mesh['a'=4,'b'=2] {'a'}``: along these axes, or parts of them
    (``{'a':(1)2}``: what lies before the part, and its size).
    """
    found = re.search(
        r"\breplica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\]<=|mesh\[([^\]]*)\][^{]*\{([^}]*)\})",
        instruction.attributes,
    )
    if found is None:
        return None
    devices, size, mesh, axes = found.groups()
    if devices:
        return devices.count(",") + 1
    if size:
        return int(size)
    sizes = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", mesh)}
    named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes)
    if not named or any(name not in sizes for name, _ in named):
        return None
    return math.prod(int(part) if part else sizes[name] for name, part in named)


def scattered(reduction: Instruction) -> Instruction | None:
    """Of an all-reduce in a fusion, the slice that alone is kept: so TPUs write a reduce-scatter;
    None if more is kept."""
    readers = reduction.computation.readers[reduction.name]
    while len(readers) == 1 and readers[0].opcode == "bitcast":
        readers = readers[0].computation.readers[readers[0].name]
    return readers[0] if [each.opcode for each in readers] == ["dynamic-slice"] else None


def _dot(instruction: Instruction, contracted: tuple[int, ...]) -> float:
    left = instruction.operand(0).shapes[0]
    shared = math.prod(left.dims[axis] for axis in contracted)
    return 2.0 * instruction.shapes[0].elements * shared


def _library_call(instruction: Instruction) -> float:
    """cuBLAS and its like: the axes are in the backend's configuration."""
    if not re.search(r"gemm|matmul|dot", instruction.attribute("custom_call_target") or "", re.I):
        return 0
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if found is None:
        return 0
    return _dot(instruction, tuple(int(axis) for axis in re.findall(r"\d+", found[1])))


def _convolution(instruction: Instruction) -> float:
    """Every pair of a kernel place and an output place that meets a real input.

    TPUs express the batch axes of a product as windows with much padding or dilation, which the
    hardware does not compute; so only real pairs count.
    """
    inputs, kernel = (instruction.operand(place).shapes[0].dims for place in (0, 1))
    output = instruction.shapes[0].dims
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    of_input, of_kernel, of_output = labels[1], labels[2], labels[3]
    window = dict(_WINDOW.findall(instruction.attribute("window") or ""))
    spatial = sorted(label for label in of_input if label.isdigit())
    pairs = 1
    for axis, label in enumerate(spatial):
        pairs *= _pairs(
            inputs[of_input.index(label)],
            kernel[of_kernel.index(label)],
            output[of_output.index(label)],
            stride=_along(window, "stride", axis, 1)[0],
            pad=_along(window, "pad", axis, 0)[0],
            input_dilation=_along(window, "lhs_dilate", axis, 1)[0],
            kernel_dilation=_along(window, "rhs_dilate", axis, 1)[0],
        )
    groups = max(instruction.numbers("batch_group_count") or (1,))
    return (
        2.0
        * pairs
        * kernel[of_kernel.index("i")]
        * output[of_output.index("f")]
        * (inputs[of_input.index("b")] / groups)
    )


def _along(window: dict[str, str], name: str, axis: int, default: int) -> list[int]:
    if name not in window:
        return [default]
    return [int(number) for number in window[name].split("x")[axis].split("_")]


def _pairs(
    inputs: int,
    kernel: int,
    output: int,
    stride: int,
    pad: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    places = np.arange(output)[:, None] * stride + np.arange(kernel) * kernel_dilation - pad
    real = (places >= 0) & (places <= (inputs - 1) * input_dilation)
    return int((real & (places % input_dilation == 0)).sum())


def _fusion_bytes(fusion: Instruction, computations: dict[str, Computation]) -> int:
    """What a fusion reads and writes: of an operand that it only slices, the slices."""
    fused = computations[fusion.called["calls"][0]]
    read = sum(
        min(_read_bytes(parameter, computations), fusion.operand(number).bytes)
        for number, parameter in fused.parameters.items()
    )
    return read + _written_bytes(fused.root, computations)


def _read_bytes(value: Instruction, computations: dict[str, Computation]) -> int:
    """What is read of a value inside a fusion. TPUs slice stacked weights in a fusion of its own,
    inside that of the product."""
    total = 0
    for reader in value.computation.readers[value.name]:
        if reader.opcode in ("dynamic-slice", "slice", "gather"):
            total += reader.bytes
        elif reader.opcode == "dynamic-update-slice" and reader.operands[0] == value.name:
            continue
        elif reader.opcode in ("bitcast", "convert"):
            total += _read_bytes(reader, computations)
        elif reader.opcode == "fusion":
            parameters = computations[reader.called["calls"][0]].parameters
            total += sum(
                min(_read_bytes(parameters[place], computations), value.bytes)
                for place, name in enumerate(reader.operands)
                if name == value.name
            )
        else:
            return value.bytes
    return total


def _written_bytes(result: Instruction, computations: dict[str, Computation]) -> int:
    """What a fusion writes: of an array that it updates in place, the update."""
    origin = _origin(result)
    if origin.opcode == "tuple":
        places = range(len(origin.operands))
        return sum(_written_bytes(origin.operand(place), computations) for place in places)
    if origin.opcode == "dynamic-update-slice":
        return origin.operand(1).bytes
    if origin.opcode == "fusion":
        return _written_bytes(computations[origin.called["calls"][0]].root, computations)
    return result.bytes


def _origin(instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy", "convert"):
        instruction = instruction.operand(0)
    return instruction
