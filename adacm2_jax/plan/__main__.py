"""Compiles an experiment for accelerators that are not here, and says what it needs there.

    python -m adacm2_jax.plan --config configs/lvu.py --topology v5e:4x4
    python -m adacm2_jax.plan --config configs/lvu.py --topology h100 --step stream --json
    python -m adacm2_jax.plan --config runs/lvu --topology v5p:4x4x4 --mesh 32,2 --nolargest

Exit status: 0 if every step fits, 1 if one does not, 2 for what its reader can mend.
"""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax

from adacm2_jax.errors import UserError
from adacm2_jax.plan import of_run
from adacm2_jax.plan.report import compile_step, render
from adacm2_jax.plan.search import largest_batch
from adacm2_jax.plan.steps import STEPS, make_plan
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.runs import app
from adacm2_jax.sharding import make_mesh

#: Flag → default, and what it is for.
FLAGS = {
    "topology": (None, "Such as v5e:4x4, v5p:4x4x4, h100, a100-40 or h100:8."),
    "step": ("all", "train, stream, decode, several with commas, or all."),
    "mesh": (None, "Devices along data and model, such as 8,2 or -1,1; else the experiment's."),
    "json": (False, "Print JSON."),
    "largest": (True, "Also find the largest batch that fits: --nolargest spares minutes."),
}


def main(argv: Sequence[str]) -> None:
    """Runs the command and exits with its status.

    Args:
      argv: the command's name, then its flags.
    """
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(_help())
        sys.exit(0)
    # The process needs no device: those that it compiles for are not here.
    jax.config.update("jax_platforms", "cpu")
    define_flags()
    app.run(run, argv, (), of_run.named)


def define_flags() -> None:
    """Flags of the command."""
    from absl import flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", lock_config=True)
    for name, (default, told) in FLAGS.items():
        define: Any = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, told)


def run() -> int:
    """Does what the flags ask for; returns the exit status."""
    from absl import flags

    given = flags.FLAGS
    for name in ("config", "topology"):
        if getattr(given, name) is None:
            example = {"config": "configs/lvu.py", "topology": "v5e:4x4"}[name]
            raise UserError(f"--{name} is missing; give one, such as --{name} {example}")
    topology = parse_topology(given.topology)
    shape = _mesh_shape(given.mesh, given.config)
    plans = [make_plan(given.config, step) for step in _steps(given.step)]
    mesh = make_mesh(shape, topology_devices(topology))
    results = []
    for plan in plans:
        print(f"compiling {plan.step} for {topology.name} …", file=sys.stderr, flush=True)
        report = compile_step(plan, topology, mesh)
        result = report.to_json()
        if given.largest:
            print("looking for its largest batch …", file=sys.stderr, flush=True)
            result |= largest_batch(report, topology, mesh)
        results.append(result)
        if not given.json:
            print(render(result), flush=True)
    if given.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["fits"] for result in results) else 1


def _help() -> str:
    rows = {"config": (None, "A file of configs/, or a run's directory."), **FLAGS}
    rows["config.FIELD"] = (None, "Any field of the experiment: --config.train.batch_size=16.")
    lines = [
        f"  --{name:<14}{told}" + (f" Default: {default}." if default else "")
        for name, (default, told) in rows.items()
    ]
    return "\n".join([str(__doc__), "Flags:", *lines])


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
    main(sys.argv)
