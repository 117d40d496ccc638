"""What the compiler makes of a step: memory, arithmetic, communication, and whether it fits."""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from adacm2_jax.errors import UserError
from adacm2_jax.plan.hlo import Program, executions, read
from adacm2_jax.plan.loops import frame_loops, loop_path
from adacm2_jax.plan.need import need
from adacm2_jax.plan.steps import Plan, device_bytes, lower, params_bytes, program
from adacm2_jax.plan.topology import GIB, Topology

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

#: There is no GPU to time kernels on, and without timing Triton's may have no tiles that fit.
_GPU_OPTIONS: Any = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device.

    Attributes:
      arguments: all that a step is called with: parameters, state and batch.
      temporaries: what the compiler sets aside while it runs.
      output: its results.
      aliased: of these, what takes the place of an argument.
      code: the program.
      parameters: of the arguments, the weights.
      total: what must be free at once; where the program does not fit, what XLA says it would need.
      exact: false where XLA refused and said the total alone.
    """

    arguments: int
    temporaries: int
    output: int
    aliased: int
    code: int
    parameters: int
    total: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Report:
    """One step on one topology, compiled.

    Attributes:
      plan: the step.
      topology: the devices.
      mesh: devices along ``data`` and ``model``.
      memory: bytes on a device.
      fits: whether ``memory.total`` is within the device's HBM.
      flops: of matrix products, on a device; None where it does not fit.
      bytes_accessed: read and written, on a device.
      collectives: rows of kind, loop, count, bytes, and whether they stand in the frame loop.
      seconds: that compiling took.
      program: the optimised module.
    """

    plan: Plan
    topology: Topology
    mesh: tuple[int, int]
    memory: Memory
    fits: bool
    flops: float | None = None
    bytes_accessed: float | None = None
    collectives: tuple[dict, ...] = ()
    seconds: float = 0.0
    program: Program | None = dataclasses.field(default=None, repr=False)

    def to_json(self) -> dict:
        """For machines; bytes and FLOPs are those of one device."""
        wanted = need(self.plan)
        devices = self.topology.count
        result = {
            "step": self.plan.step,
            "topology": self.topology.name,
            "devices": devices,
            "mesh": list(self.mesh),
            "batch_size": self.plan.batch,
            "frames": self.plan.frames,
            "policy": self.plan.model.memory.policy,
            "memory": dataclasses.asdict(self.memory),
            "hbm": self.topology.chip.hbm,
            "fits": self.fits,
            "compile_seconds": round(self.seconds, 1),
        }
        if self.flops is not None and self.bytes_accessed is not None:
            needed, again = wanted.total / devices, wanted.remat / devices
            result |= {
                "flops": self.flops,
                "flops_needed": needed,
                "flops_rematerialised": again,
                "flops_ratio": (self.flops - again) / needed,
                "bytes_accessed": self.bytes_accessed,
                "arithmetic_intensity": self.flops / max(self.bytes_accessed, 1),
                "ridge": self.topology.chip.flops / self.topology.chip.bandwidth,
                "collectives": list(self.collectives),
            }
        return result


def compile_step(plan: Plan, topology: Topology, mesh: Mesh) -> Report:
    """Compiles a step; one that does not fit gives a report, too.

    Raises:
      UserError: if plan and mesh do not fit together.
    """
    start = time.perf_counter()
    lowered = lower(plan, mesh)
    shape = (mesh.shape["data"], mesh.shape["model"])
    options = _GPU_OPTIONS if topology.chip.platform == "cuda" else None
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(str(error), plan, mesh)
        if memory is None:
            raise
        seconds = time.perf_counter() - start
        return Report(plan, topology, shape, memory, False, seconds=seconds)
    seconds = time.perf_counter() - start
    module = read(compiled)
    memory = _memory(compiled, plan, mesh)
    unknown = plan.generation.max_new_tokens - 1 if plan.step == "decode" else 1
    return Report(
        plan=plan,
        topology=topology,
        mesh=shape,
        memory=memory,
        fits=memory.total <= topology.chip.hbm,
        flops=module.flops(unknown),
        bytes_accessed=module.bytes_accessed(unknown),
        collectives=_collectives(module, unknown),
        seconds=seconds,
        program=module,
    )


def _memory(compiled, plan: Plan, mesh: Mesh) -> Memory:
    found = compiled.memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        output=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
        parameters=params_bytes(plan, mesh),
        total=found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + new
        + found.generated_code_size_in_bytes,
    )


def _refused(message: str, plan: Plan, mesh: Mesh) -> Memory | None:
    """What XLA says about a program that does not fit; None if it complains of something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    arguments = device_bytes(program(plan, mesh)[1])
    total = None
    # What it calls temporaries has the arguments in it.
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of",
        r"[Tt]otal hbm usage >= ([\d.]+)([KMGT]?)",
        r"total memory required[^(]*\(([\d.]+)([KMGT]?)\)",
    ):
        if found := re.search(pattern, message):
            total = int(float(found[1]) * _UNITS[found[2]])
            break
    if total is None:
        line = message.splitlines()[0]
        raise UserError(f"the compiler ran out of something that is not told: {line}")
    parameters = params_bytes(plan, mesh)
    return Memory(arguments, max(0, total - arguments), 0, 0, 0, parameters, total, exact=False)


def _collectives(module: Program, unknown: int) -> tuple[dict, ...]:
    """One row for each kind and loop, with what arrives on a device."""
    counts: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()
    largest: dict = {}
    watched = set(frame_loops(module))
    for each in module.collectives:
        inside = any(loop in watched for loop in each.loops)
        row = each.kind, loop_path(each.loops, module), bool(each.loops), inside
        times = executions(each.loops, unknown) or 0
        counts[row] += times
        sizes[row] += each.bytes * times
        largest[row] = max(largest.get(row, 0), each.bytes)
    return tuple(
        {
            "kind": row[0],
            "loop": row[1],
            "inside_loop": row[2],
            "inside_frame_loop": row[3],
            "count": counts[row],
            "bytes": sizes[row],
            "largest": largest[row],
        }
        for row in sorted(counts, key=lambda row: -sizes[row])
    )


def render(result: dict) -> str:
    """A report as text, from what ``to_json`` (or the estimate's) holds."""
    memory, hbm = result["memory"], result["hbm"]
    share = memory["total"] / hbm
    lines = [
        f"{result['step']}  {result['topology']} ({result['devices']} devices, mesh "
        f"data={result['mesh'][0]} model={result['mesh'][1]})  batch {result['batch_size']}, "
        f"{result['frames']} frames, policy {result['policy']}",
        "  bytes a device",
    ]
    rows = ["arguments", "temporaries", "output", "aliased", "code"]
    if not memory.get("exact", True):
        rows = ["arguments", "temporaries"]
    for name in rows:
        note = f"  of it parameters {_gib(memory['parameters'])}" if name == "arguments" else ""
        lines.append(f"    {name:<12}{_gib(memory[name]):>12}{note}")
    verdict = "fits" if result["fits"] else "does not fit"
    lines.append(
        f"    {'total':<12}{_gib(memory['total']):>12}  of {_gib(hbm)} ({share:.0%}): {verdict}"
    )
    if "flops" in result:
        needed, ratio = result["flops_needed"], result["flops_ratio"]
        bound = "compute" if result["arithmetic_intensity"] > result["ridge"] else "bandwidth"
        lines += [
            f"  {result['flops'] / 1e12:,.2f} TFLOP a device = {needed / 1e12:,.2f} needed × "
            f"({ratio:.3f} + {result['flops_rematerialised'] / needed:.3f} rematerialised); "
            f"{needed / result['flops']:.1%} of what is computed is needed",
            f"  {result['bytes_accessed'] / 1e9:,.1f} GB accessed; "
            f"{result['arithmetic_intensity']:.0f} FLOP a byte, the device's balance is "
            f"{result['ridge']:.0f}: bound by {bound}",
            "  collectives" + ("" if result["collectives"] else ": none"),
        ]
        for row in result["collectives"]:
            where = " (inside the frame loop)" if row["inside_frame_loop"] else ""
            lines.append(
                f"    {row['kind']:<20}{row['count']:>7} ×, {row['bytes'] / 1e6:>11,.2f} MB  "
                f"{row['loop']}{where}"
            )
    if "largest_batch" in result:
        by = "compiler" if result["largest_batch_confirmed"] else "estimate"
        lines.append(
            f"  largest batch that fits: {result['largest_batch']}; {result['too_large_batch']} "
            f"does not (by the {by})"
        )
    return "\n".join(lines)


def _gib(count: float) -> str:
    if count < GIB / 10:
        return f"{count / 2**20:,.2f} MiB"
    return f"{count / GIB:,.2f} GiB"
