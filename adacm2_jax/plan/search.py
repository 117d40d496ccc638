"""The largest batch that fits: looked for by the estimate, confirmed by the compiler."""

import dataclasses

from adacm2_jax.plan.estimate import abstract_mesh, estimate
from adacm2_jax.plan.report import compile_step
from adacm2_jax.plan.steps import Plan
from adacm2_jax.plan.topology import Topology, topology_devices
from adacm2_jax.sharding import make_mesh

#: Rows a device beyond which nobody looks.
_MOST = 4096


def largest_batch(
    plan: Plan, topology: Topology, shape: tuple[int, int], compiled: bool = True
) -> dict:
    """The most rows that fit on all devices together.

    Args:
      plan: the step; its own batch does not count.
      topology: the devices.
      shape: of the mesh.
      compiled: whether the estimate's answer is compiled; where the compiler disagrees the batch is
        lowered until it does not.

    Returns:
      ``largest_batch`` (0 where not even the smallest fits) and ``largest_batch_confirmed``.
    """
    mesh = abstract_mesh(shape, topology)
    unit = mesh.shape["data"] * (plan.how.accumulate if plan.step == "train" else 1)

    def fits(times: int) -> bool:
        return estimate(_with_batch(plan, unit * times), topology, mesh)["fits"]

    low, high = 0, 1
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    high = min(high, _MOST + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not compiled:
        return {"largest_batch": low * unit, "largest_batch_confirmed": False}
    low = max(low, 1)  # the compiler has the last word
    real = make_mesh(shape, topology_devices(topology))
    while low:
        if compile_step(_with_batch(plan, unit * low), topology, real).fits:
            return {"largest_batch": low * unit, "largest_batch_confirmed": True}
        low = min(low - 1, int(low * 0.95))
    return {"largest_batch": 0, "largest_batch_confirmed": True}


def _with_batch(plan: Plan, batch: int) -> Plan:
    return dataclasses.replace(plan, batch=batch)
