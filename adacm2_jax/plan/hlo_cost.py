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
        return _fusion_bytes(instruction, computations[instruction.called["calls"][0]])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.bytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * instruction.operand(1).bytes
    if instruction.opcode == "scatter":
        return 3 * instruction.operand(2).bytes
    return instruction.bytes + sum(
        instruction.operand(place).bytes for place in range(len(instruction.operands))
    )


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


def _fusion_bytes(fusion: Instruction, fused: Computation) -> int:
    """What a fusion reads and writes: of an operand that it only slices, the slices."""
    total = 0
    for number, parameter in fused.parameters.items():
        total += min(_read_bytes(parameter, fused), fusion.operand(number).bytes)
    root = _origin(fused.root)
    results = [_origin(root.operand(place)) for place in range(len(root.operands))]
    for result in results if root.opcode == "tuple" else [root]:
        in_place = result.opcode == "dynamic-update-slice"
        total += result.operand(1).bytes if in_place else result.bytes
    return total


def _read_bytes(parameter: Instruction, fused: Computation) -> int:
    total = 0
    for reader in fused.readers[parameter.name]:
        if reader.opcode in ("dynamic-slice", "slice", "gather"):
            total += reader.bytes
        elif reader.opcode == "dynamic-update-slice" and reader.operands[0] == parameter.name:
            continue
        elif reader.opcode in ("bitcast", "convert"):
            total += _read_bytes(reader, fused)
        else:
            return parameter.bytes
    return total


def _origin(instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "copy", "convert"):
        instruction = instruction.operand(0)
    return instruction
