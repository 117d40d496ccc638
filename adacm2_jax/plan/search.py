"""The largest batch that fits: looked for by the estimate, and from there by the compiler."""

import dataclasses
from collections.abc import Callable

from adacm2_jax.plan.estimate import abstract_mesh, estimate
from adacm2_jax.plan.report import compile_step
from adacm2_jax.plan.steps import Plan
from adacm2_jax.plan.topology import Topology, topology_devices
from adacm2_jax.sharding import make_mesh

#: How fine the compiler is asked, as a share of the estimate's answer: it takes minutes.
GRAIN = 0.05


def largest_batch(
    plan: Plan, topology: Topology, shape: tuple[int, int], compiled: bool = True
) -> dict:
    """The most rows that fit on all devices together.

    Args:
      plan: the step; its own batch does not count.
      topology: the devices.
      shape: of the mesh.
      compiled: whether the compiler says what fits, from the estimate's answer on, to within
        ``GRAIN`` of it; else the estimate does, to the row of a device.

    Returns:
      ``largest_batch`` (0 where not even the smallest fits), ``too_large_batch`` (the next that was
      tried, which does not fit), and ``largest_batch_confirmed``: both by the compiler.
    """
    mesh = abstract_mesh(shape, topology)
    unit = mesh.shape["data"] * (plan.how.accumulate if plan.step == "train" else 1)

    def sized(times: int) -> Plan:
        return dataclasses.replace(plan, batch=unit * times)

    low, high = bracket(lambda times: estimate(sized(times), topology, mesh)["fits"], 1, 1)
    if compiled:
        real = make_mesh(shape, topology_devices(topology))
        start = max(low, 1)
        grain = max(1, int(GRAIN * start))
        low, high = bracket(
            lambda times: compile_step(sized(times), topology, real).fits, start, grain
        )
    return {
        "largest_batch": low * unit,
        "too_large_batch": high * unit,
        "largest_batch_confirmed": compiled,
    }


def bracket(fits: Callable[[int], bool], start: int, grain: int) -> tuple[int, int]:
    """Two numbers at most ``grain`` apart, of which the smaller fits and the larger does not.

    From ``start`` up or down in steps of ``grain``, each twice the last, then by halves. 0 counts
    as what fits. Upwards it ends because the arguments grow with the batch.
    """
    low, high, step = 0, start, grain
    if fits(start):
        low, high = start, start + step
        while fits(high):
            step *= 2
            low, high = high, high + step
    else:
        while (lower := high - step) > 0 and not fits(lower):
            high, step = lower, 2 * step
        low = max(lower, 0)
    while high - low > grain:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high
