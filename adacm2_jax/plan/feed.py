"""What a training step eats: frames of videos or stored features, a second and host."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from jax.sharding import Mesh

from adacm2_jax.errors import UserError
from adacm2_jax.models.params import split_params
from adacm2_jax.plan.report import Report, device_flops
from adacm2_jax.plan.steps import plan_params
from adacm2_jax.plan.topology import Topology

#: Bytes of a number of a feature, and of what a token has beside.
KEPT = {"bfloat16": (2, 0), "int8": (1, 4)}


def appetite(report: Report, topology: Topology, mesh: Mesh, share: float) -> dict:
    """What has to be read while the devices compute.

    Args:
      report: of the training step.
      topology: its devices.
      mesh: over them.
      share: of the devices' peak that the step reaches.

    Returns:
      For machines: ``frames_a_second`` that a host decodes, and ``features``, of a step without the
      ViT: ``clips_a_second`` and ``bytes_a_second`` of a host by dtype; none where the ViT learns.
    """
    plan, rate = report.plan, topology.chip.flops * share
    clips = plan.batch / topology.hosts
    found: dict[str, Any] = {
        "share": share,
        "hosts": topology.hosts,
        "frames_a_second": clips * plan.frames * rate / report.flops,
    }
    learned = split_params(plan_params(plan, mesh), plan.groups)[0]
    if not any(path.startswith("vision/") for path in learned):
        stored = dataclasses.replace(plan, stored=True)
        each = clips * rate / device_flops(stored, mesh)
        vision = plan.model.vision
        sizes = {
            dtype: plan.frames * vision.tokens_per_frame * (vision.width * number + more)
            for dtype, (number, more) in KEPT.items()
        }
        found["features"] = {
            "clips_a_second": each,
            "bytes_a_second": {dtype: each * size for dtype, size in sizes.items()},
        }
    return found


def read_loader(path: str) -> dict[str, float]:
    """What a core reads, from the results of ``benchmarks/loader.py --json``.

    Returns:
      By the name of a row: frames, or bytes of features, a core-second.

    Raises:
      UserError: if it is no such file.
    """
    again = "make it by python benchmarks/loader.py --json FILE"
    try:
        rows = json.loads(pathlib.Path(path).read_text())["rows"]
        rates = {row["name"]: row["ours"] * row.get("bytes", 1) for row in rows}
    except OSError as error:
        raise UserError(f"--loader {path}: {error.strerror}; correct the path") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"--loader {path} is no measurement of the loader; {again}") from None
    if not rates:
        raise UserError(f"--loader {path} has no rows; {again}")
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise UserError(f"--loader {path}: {name} at {rate!r} a core-second; {again}")
    return rates


def render(eaten: dict, loader: dict[str, float]) -> str:
    """:func:`appetite` as text, with the cores that it takes by :func:`read_loader`."""
    hosts, need = eaten["hosts"], eaten["frames_a_second"]
    lines = [
        f"  at {eaten['share']:.0%} of the peak each of {hosts} host{'s'[: hosts > 1]} eats",
        f"    {need:,.0f} frames/s of videos, "
        + _cores({name: need / rate for name, rate in loader.items() if "pixels" in name}),
    ]
    features = eaten.get("features", {"bytes_a_second": {}})
    for dtype, size in features["bytes_a_second"].items():
        rates = {name: size / rate for name, rate in loader.items() if name.endswith(f", {dtype}")}
        lines.append(
            f"    or {features['clips_a_second']:,.1f} clips/s of features, {size / 1e9:,.2f} GB/s "
            f"from storage in {dtype}, {_cores(rates)}"
        )
    return "\n".join(line.removesuffix(", ") for line in lines)


def _cores(needed: dict[str, float]) -> str:
    """Cores, by row of the loader's measurement; one of storage has no other name."""
    return ", ".join(
        f"{count:,.1f} cores" + (f" at {name.split(', ')[1]}" if "pixels" in name else "")
        for name, count in needed.items()
    )
