"""What a step needs of a device's memory, from shapes alone: nothing is compiled.

Arguments are exact up to the padding of tiles. Temporaries are the largest of the step's phases,
each with what is live in it at once (``phases.py``).
"""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from adacm2_jax.errors import UserError
from adacm2_jax.plan.phases import Phases
from adacm2_jax.plan.steps import Plan, device_bytes, params_bytes, program
from adacm2_jax.plan.topology import Topology


def abstract_mesh(shape: tuple[int, int], topology: Topology) -> Any:
    """The mesh of a topology without devices; for shapes and shardings it is as good as one.

    Raises:
      UserError: if the shape does not match the number of devices.
    """
    data, model = shape
    if data == -1 and model > 0:
        data = topology.count // model
    if data * model != topology.count or min(data, model) < 1:
        raise UserError(
            f"mesh = {tuple(shape)} does not cover the {topology.count} device(s) of "
            f"{topology.name}; the product must be {topology.count}, or the first entry -1"
        )
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on a device.

    Attributes:
      arguments: parameters, state and batch.
      parameters: of these, the weights.
      phases: temporaries of each phase of the step, by name and then by term.
    """

    arguments: int
    parameters: int
    phases: dict[str, dict[str, float]]

    @property
    def temporaries(self) -> int:
        """Of the largest phase."""
        return round(max(sum(terms.values()) for terms in self.phases.values()))

    @property
    def total(self) -> int:
        """All that must be free at once."""
        return self.arguments + self.temporaries


def estimate(plan: Plan, topology: Topology, mesh: Any) -> dict:
    """The estimate of a step, in the form of ``Report.to_json``.

    Raises:
      UserError: if plan and mesh do not fit together.
    """
    found = estimate_memory(plan, topology, mesh)
    return {
        "step": plan.step,
        "topology": topology.name,
        "devices": topology.count,
        "mesh": [mesh.shape["data"], mesh.shape["model"]],
        "batch_size": plan.batch,
        "frames": plan.frames,
        "policy": plan.model.memory.policy,
        "estimated": True,
        "memory": {
            "arguments": found.arguments,
            "temporaries": found.temporaries,
            "parameters": found.parameters,
            "total": found.total,
            "exact": False,
            "phases": {name: round(sum(terms.values())) for name, terms in found.phases.items()},
        },
        "hbm": topology.chip.hbm,
        "fits": found.total <= topology.chip.hbm,
    }


def estimate_memory(plan: Plan, topology: Topology, mesh: Any) -> Estimate:
    """Bytes on a device, term by term."""
    _, arguments = program(plan, mesh)
    count = device_bytes(arguments)
    of = Phases(plan, topology, mesh)
    phases = {"train": of.train, "stream": of.stream, "decode": of.decode}[plan.step]()
    return Estimate(count, params_bytes(plan, mesh), phases)
