"""Compiles an experiment for accelerators that are not here, and says what it needs there.

    python -m adacm2_jax.plan --config configs/lvu.py --topology v5e:4x4
    python -m adacm2_jax.plan --config configs/lvu.py --topology h100 --step stream --json
    python -m adacm2_jax.plan --config configs/lvu.py --topology v5p:4x4x4 --mesh 32,2 --estimate

Exit status: 0 if every step fits, 1 if one does not, 2 for what its reader can mend.
"""

import json
import re
import sys

import jax

from adacm2_jax.errors import UserError
from adacm2_jax.plan.estimate import abstract_mesh, estimate
from adacm2_jax.plan.report import compile_step, render
from adacm2_jax.plan.search import largest_batch
from adacm2_jax.plan.steps import STEPS, make_plan
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.runs import app
from adacm2_jax.sharding import make_mesh


def define_flags() -> None:
    """Flags of the command."""
    from absl import flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("topology", None, "Such as v5e:4x4, v5p:4x4x4, h100, a100-40 or h100:8.")
    flags.DEFINE_string("step", "all", "train, stream, decode, several with commas, or all.")
    flags.DEFINE_string("mesh", None, "Devices along data and model, such as 8,2 or -1,1.")
    flags.DEFINE_boolean("json", False, "Print JSON.")
    flags.DEFINE_boolean("estimate", False, "From shapes alone, without compiling.")
    flags.DEFINE_boolean("largest", True, "Also find the largest batch that fits.")


def main() -> int:
    """Runs the command; returns its exit status."""
    from absl import flags

    given = flags.FLAGS
    for name in ("config", "topology"):
        if getattr(given, name) is None:
            example = {"config": "configs/lvu.py", "topology": "v5e:4x4"}[name]
            raise UserError(f"--{name} is missing; give one, such as --{name} {example}")
    topology = parse_topology(given.topology)
    shape = _mesh_shape(given.mesh, given.config)
    plans = [make_plan(given.config, step) for step in _steps(given.step)]
    if given.estimate:
        mesh = abstract_mesh(shape, topology)
    else:
        mesh = make_mesh(shape, topology_devices(topology))
    results = []
    for plan in plans:
        if given.estimate:
            result = estimate(plan, topology, mesh)
            found = largest_batch(plan, topology, shape, compiled=False) if given.largest else None
        else:
            print(f"compiling {plan.step} for {topology.name} …", file=sys.stderr, flush=True)
            result = compile_step(plan, topology, mesh).to_json()
            found = largest_batch(plan, topology, shape) if given.largest else None
        if found is not None:
            result |= found
        results.append(result)
        if not given.json:
            print(render(result), flush=True)
    if given.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["fits"] for result in results) else 1


def _steps(text: str) -> list[str]:
    """The steps of a list with commas, each once; ``all`` stands for every one."""
    named = [STEPS if name == "all" else (name,) for name in text.split(",")]
    return list(dict.fromkeys(step for steps in named for step in steps))


def _mesh_shape(text: str | None, config) -> tuple[int, int]:
    if text is None:
        return tuple(config.mesh)
    if not re.fullmatch(r"(-1|\d+),\d+", text):
        raise UserError(f"--mesh {text}: give devices along data and model, such as 8,2 or -1,1")
    data, model = text.split(",")
    return int(data), int(model)


if __name__ == "__main__":
    # The process needs no device: those that it compiles for are not here.
    jax.config.update("jax_platforms", "cpu")
    define_flags()
    app.run(main, sys.argv, ())
