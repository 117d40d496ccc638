"""Accelerators that are not here: their names, what they have, and devices to compile for.

A TPU topology is ``type:shape`` such as ``v5e:4x4``; a GPU is ``h100``, ``a100`` (both of 80 GB) or
``a100-40`` (40 GB), with a number of GPUs behind a colon (hosts of eight). The compiler plugins are
all that is needed: libtpu for TPUs, the CUDA plugin for GPUs; neither a device nor a driver is.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from adacm2_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has, as its vendor states it.

    Attributes:
      platform: tpu or cuda.
      hbm: bytes that a program may use: what XLA reports for a TPU; of a GPU's memory, what a
        process gets with ``XLA_PYTHON_CLIENT_MEM_FRACTION=.95``.
      flops: bfloat16 operations a second, dense.
      bandwidth: bytes a second from HBM.
      axes: of a topology's shape.
      side: the most chips along an axis.
    """

    platform: str
    hbm: int
    flops: float
    bandwidth: float
    axes: int = 0
    side: int = 0


CHIPS = {
    "v4": Chip("tpu", int(30.75 * GIB), 275e12, 1228e9, 3, 16),
    "v5e": Chip("tpu", int(15.75 * GIB), 197e12, 819e9, 2, 16),
    "v5p": Chip("tpu", int(95.74 * GIB), 459e12, 2765e9, 3, 28),
    "v6e": Chip("tpu", int(31.25 * GIB), 918e12, 1640e9, 2, 16),
    "h100": Chip("cuda", int(0.95 * 84978434048), 989e12, 3352e9),
    "a100": Chip("cuda", int(0.95 * 85094825984), 312e12, 2039e9),
    "a100-40": Chip("cuda", int(0.95 * 42297786368), 312e12, 1555e9),
}

#: What XLA would read from the card.
_GPU = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {core_memory}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock}
  device_memory_size: {memory} shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""
_GPUS = {
    "h100": dict(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        cores=132,
        fpus=128,
        core_memory=233472,
        optin=232448,
        bandwidth=3352320000000,
        cache=52428800,
        clock=1.98,
        memory=84978434048,
    ),
    "a100": dict(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        cores=108,
        fpus=64,
        core_memory=167936,
        optin=166912,
        bandwidth=2039000000000,
        cache=41943040,
        clock=1.41,
        memory=85094825984,
    ),
}
_GPUS["a100-40"] = _GPUS["a100"] | dict(
    name="NVIDIA A100-SXM4-40GB", bandwidth=1555000000000, memory=42297786368
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices, by name.

    Attributes:
      name: as given, such as ``v5e:4x4``.
      kind: of its chips, a key of :data:`CHIPS`.
      shape: chips along each axis; (n,) for GPUs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Of which it is made."""
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """Its devices."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines that hold them: of eight GPUs, or of four chips."""
        return -(-self.count // (8 if self.chip.platform == "cuda" else 4))


def parse_topology(name: str) -> Topology:
    """Reads a name.

    Raises:
      UserError: if there is no such chip, or the shape is not one of its.
    """
    kind, colon, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology {name}: unknown; give {', '.join(CHIPS)}, with a shape such as v5e:4x4, "
            "v5p:4x4x4 or h100:8"
        )
    axes = CHIPS[kind].axes
    if not axes:
        if not re.fullmatch(r"[1-9]\d*", shape or ("" if colon else "1")):
            raise UserError(f"--topology {name}: give a number of GPUs, such as {kind}:8")
        count = int(shape or 1)
        if count > 8 and count % 8:
            raise UserError(f"--topology {name}: hosts have 8 GPUs; give a multiple of 8")
        return Topology(name, kind, (count,))
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), shape):
        example = "x".join(["4"] * axes)
        raise UserError(f"--topology {name}: {kind} has {axes} axes; write {kind}:{example}")
    sides = tuple(int(size) for size in shape.split("x"))
    _check_sides(name, kind, sides)
    return Topology(name, kind, sides)


def _check_sides(name: str, kind: str, sides: tuple[int, ...]) -> None:
    """Refuses a shape that no slice has: the estimate asks no compiler for one."""
    most = CHIPS[kind].side
    if len(sides) == 2:
        possible = [1, 2, 4, 8, 16]
        told = ", ".join(map(str, possible))
    else:
        possible = [1, 2, *range(4, most + 1, 4)]
        told = f"1, 2 and multiples of 4 up to {most}"
    wrong = [side for side in sides if side not in possible]
    if wrong:
        raise UserError(
            f"--topology {name}: {kind} has no slice {wrong[0]} chips long; sides are {told}"
        )


def topology_devices(topology: Topology) -> list:
    """Devices to compile for.

    Raises:
      UserError: if the compiler for them is not installed, or knows no such topology.
    """
    platform = topology.chip.platform
    modules, package = {
        "tpu": (["libtpu"], "jax[tpu]"),
        "cuda": (["jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"], "jax[cuda12]"),
    }[platform]
    if not any(map(_installed, modules)):
        raise UserError(
            f"--topology {topology.name}: the compiler for it is not installed; "
            f"pip install '{package}=={jax.__version__}'"
        )
    get = _tpu_devices if platform == "tpu" else _gpu_devices
    try:
        return list(get(topology))
    except Exception as error:  # XlaRuntimeError, RuntimeError, ValueError: by version of jax
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise UserError(
            f"--topology {topology.name} cannot be had: {reason}; give a shape that is sold, and "
            f"see that '{package}' fits jax {jax.__version__}"
        ) from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _tpu_devices(topology: Topology):
    # libtpu would ask a metadata server about the machine that it runs on.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    }.items():
        os.environ.setdefault(name, value)
    # At most four chips a host, also where a part of one is asked for.
    bounds = tuple(map(min, (2, 2, 1), (*topology.shape, 1)))
    options: dict = {"chips_per_host_bounds": bounds}
    if topology.kind in ("v4", "v5p"):  # one device a chip, as on a pod
        options |= {"chip_config_name": "megacore", "num_slices": 1}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, **options
    ).devices


def _gpu_devices(topology: Topology):
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to ask
    hosts, local = max(1, topology.count // 8), min(topology.count, 8)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.kind,
        target_config=_GPU.format(**_GPUS[topology.kind]),
        topology=f"1x{hosts}x{local}",
    ).devices
