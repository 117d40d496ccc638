"""What the compiler makes of a step: its memory, its arithmetic, and whether it fits."""

import dataclasses
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from adacm2_jax.errors import UserError
from adacm2_jax.plan.flops import product_flops
from adacm2_jax.plan.steps import Plan, device_bytes, lower, params_bytes, program, trace
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
      flops: of matrix products, on a device, see :func:`device_flops`.
      rematerialised: of these, what is computed a second time to spare memory.
      seconds: that compiling took.
      compiled: the program, for more questions; None where XLA refused it.
    """

    plan: Plan
    topology: Topology
    mesh: tuple[int, int]
    memory: Memory
    fits: bool
    flops: float
    rematerialised: float
    seconds: float
    compiled: jax.stages.Compiled | None = dataclasses.field(repr=False)

    def to_json(self) -> dict:
        """For machines; bytes and FLOPs are those of one device."""
        return {
            "step": self.plan.step,
            "topology": self.topology.name,
            "devices": self.topology.count,
            "mesh": list(self.mesh),
            "batch_size": self.plan.batch,
            "frames": self.plan.frames,
            "policy": self.plan.model.memory.policy,
            "memory": dataclasses.asdict(self.memory),
            "hbm": self.topology.chip.hbm,
            "fits": self.fits,
            "compile_seconds": round(self.seconds, 1),
            "flops": self.flops,
            "flops_rematerialised": self.rematerialised,
            "least_seconds": self.flops / self.topology.chip.flops,
        }


def compile_step(plan: Plan, topology: Topology, mesh: Mesh) -> Report:
    """Compiles a step; one that does not fit gives a report, too.

    Raises:
      UserError: if plan and mesh do not fit together.
    """
    traced = trace(plan, mesh)
    flops, again = device_flops(plan, mesh, traced), 0.0
    if plan.step == "train" and plan.model.remat:
        again = flops - device_flops(plan.keeping, mesh)
    start = time.perf_counter()
    memory, compiled = _compile(traced, plan, topology, mesh)
    return Report(
        plan=plan,
        topology=topology,
        mesh=(mesh.shape["data"], mesh.shape["model"]),
        memory=memory,
        fits=compiled is not None and memory.total <= topology.chip.hbm,
        flops=flops,
        rematerialised=again,
        seconds=time.perf_counter() - start,
        compiled=compiled,
    )


def device_flops(plan: Plan, mesh: Mesh, traced: jax.stages.Traced | None = None) -> float:
    """What a device computes: that of all devices together (``product_flops``), divided by them.

    Decoding is taken to its last token. A batch that does not divide over ``data`` is computed by
    every shard of it. Otherwise work counts as evenly divided, as the step asks for; whether the
    compiler does more is checked by ``benchmarks/check_full_size.py``.

    Args:
      plan: the step.
      mesh: of real or absent devices.
      traced: the step, if it is there.
    """
    traced = trace(plan, mesh) if traced is None else traced
    rounds = plan.generation.max_new_tokens - 1 if plan.step == "decode" else 1
    divides = plan.batch % mesh.shape["data"] == 0
    return product_flops(traced.jaxpr, rounds) / (mesh.size if divides else mesh.shape["model"])


def _compile(
    traced: jax.stages.Traced, plan: Plan, topology: Topology, mesh: Mesh
) -> tuple[Memory, jax.stages.Compiled | None]:
    """What the compiler says, and the program unless XLA refuses it."""
    options = _GPU_OPTIONS if topology.chip.platform == "cuda" else None
    try:
        compiled = lower(traced, mesh).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(str(error), plan, mesh)
        if memory is None:
            raise
        return memory, None
    return _memory(compiled, plan, mesh), compiled


def _memory(compiled: Any, plan: Plan, mesh: Mesh) -> Memory:
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


def render(result: dict) -> str:
    """A report as text, from what ``to_json`` holds, and ``largest_batch`` beside it."""
    memory, hbm = result["memory"], result["hbm"]
    share = memory["total"] / hbm
    lines = [
        f"{result['step']}  {result['topology']} ({result['devices']} devices, mesh "
        f"data={result['mesh'][0]} model={result['mesh'][1]})  batch {result['batch_size']}, "
        f"{result['frames']} frames, policy {result['policy']}",
        "  bytes a device",
    ]
    rows = ["arguments", "temporaries", "output", "aliased", "code"]
    for name in rows if memory["exact"] else rows[:2]:
        note = f"  of it parameters {_gib(memory['parameters'])}" if name == "arguments" else ""
        lines.append(f"    {name:<12}{_gib(memory[name]):>12}{note}")
    verdict = "fits" if result["fits"] else "does not fit"
    lines.append(
        f"    {'total':<12}{_gib(memory['total']):>12}  of {_gib(hbm)} ({share:.0%}): {verdict}"
    )
    again = result["flops_rematerialised"] / result["flops"]
    lines.append(
        f"  {result['flops'] / 1e12:,.2f} TFLOP a device ({again:.1%} rematerialised): at least "
        f"{result['least_seconds']:,.3f} s at the device's peak"
    )
    if "largest_batch" in result:
        lines.append(
            f"  largest batch that fits: {result['largest_batch']}; {result['too_large_batch']} "
            "does not"
        )
    return "\n".join(lines)


def _gib(count: float) -> str:
    if count < GIB / 10:
        return f"{count / 2**20:,.2f} MiB"
    return f"{count / GIB:,.2f} GiB"
