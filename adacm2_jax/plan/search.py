"""The largest batch that fits, by the compiler alone."""

import dataclasses
from collections.abc import Callable

from jax.sharding import Mesh

from adacm2_jax.plan.report import Report, compile_step
from adacm2_jax.plan.topology import Topology

#: How fine the answer is, as a share of it: each question takes the compiler a minute or more.
GRAIN = 0.02
#: Questions before what is still open is halved.
SECANTS = 7
#: How far beyond a batch that fits the next one may lie: enormous ones compile slowly.
FARTHEST = 8


def largest_batch(first: Report, topology: Topology, mesh: Mesh) -> dict:
    """The most rows that fit on all devices together.

    Args:
      first: the step, compiled with its own batch.
      topology, mesh: that it was compiled for.

    Returns:
      ``largest_batch`` (0 where not even the smallest fits) and ``too_large_batch`` (that does not
      fit): one row a device (times ``train.accumulate``) apart, or ``GRAIN`` of the batch.
    """
    plan, limit = first.plan, topology.chip.hbm
    unit = mesh.shape["data"] * (plan.options.accumulate if plan.step == "train" else 1)

    def total(times: int) -> int:
        sized = dataclasses.replace(plan, batch=times * unit)
        found = first if sized == plan else compile_step(sized, topology, mesh)
        # What XLA says of a program that it refuses is rounded.
        return found.memory.total if found.fits else max(found.memory.total, limit + 1)

    low, high = bracket(total, limit, max(1, plan.batch // unit))
    return {"largest_batch": low * unit, "too_large_batch": high * unit}


def bracket(total: Callable[[int], int], limit: int, start: int) -> tuple[int, int]:
    """The largest number whose total is within the limit, and a larger one whose total is not.

    What a step needs is very nearly a constant and so much a row, so the line through two totals
    says where to ask next, and the better the nearer these are.

    Args:
      total: asked once a number; it grows without bound.
      limit: that it may reach.
      start: asked first, at least 1.

    Returns:
      Two numbers at most ``GRAIN`` of the smaller apart, or neighbours; 0 and 1 if nothing fits.
    """
    known = {start: total(start)}
    while True:
        fitting = sorted(times for times in known if known[times] <= limit)
        beyond = sorted(times for times in known if known[times] > limit)
        low, high = max(fitting, default=0), min(beyond, default=None)
        step = max(1, int(GRAIN * low))
        if high is not None and high - low <= step:
            return low, high
        if len(known) == 1:
            times = 2 * start if high is None else start // 2
        elif high is None:
            line = fitting[-2], fitting[-1]
            times = min(_crossing(known, line, limit), FARTHEST * low)
        elif len(known) < SECANTS:
            line = (low, high) if fitting else (beyond[0], beyond[1])
            times = _crossing(known, line, limit)
        else:
            times = (low + high) // 2
        times = max(times, low + step)
        if high is not None:
            times = min(times, max(high - step, low + 1))
        known[times] = total(times)


def _crossing(known: dict[int, int], line: tuple[int, int], limit: int) -> int:
    """Where the line through two totals reaches the limit, rounded down."""
    one, other = line
    slope = (known[other] - known[one]) / (other - one)
    return int(one + (limit - known[one]) // slope) if slope > 0 else FARTHEST * other
