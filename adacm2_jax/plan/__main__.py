"""Compiles an experiment for accelerators that are not here, and says what it needs there.

    adacm2 plan --config configs/lvu.py --topology v5e:4x4
    adacm2 plan --config configs/lvu.py --topology h100 --step stream --json
    adacm2 plan --config runs/lvu --topology v5p:4x4x4 --mesh 32,2 --nolargest

Exit status: 0 if every step fits, 1 if one does not, 2 for what its reader can mend.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports, too, which take seconds
    from adacm2_jax import interrupt

    interrupt.end_at_once()

import json
import re
import sys
from collections.abc import Sequence

import jax

from adacm2_jax.errors import UserError
from adacm2_jax.plan import feed, of_run
from adacm2_jax.plan.report import compile_step, render
from adacm2_jax.plan.search import largest_batch
from adacm2_jax.plan.steps import STEPS, make_plan
from adacm2_jax.plan.topology import parse_topology, topology_devices
from adacm2_jax.runs import app
from adacm2_jax.runs.experiment import read
from adacm2_jax.sharding import make_mesh


def main(argv: Sequence[str]) -> None:
    """Runs the command and exits with its status.

    Args:
      argv: the command's name, then its flags.
    """
    # The process needs no device: those that it compiles for are not here.
    jax.config.update("jax_platforms", "cpu")
    define_flags()
    app.run(run, argv, str(__doc__), of_run.named)


def define_flags() -> None:
    """Flags of the command."""
    from absl import flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file(
        "config", lock_config=True, help_string="A file of configs/, or a run's directory."
    )
    flags.DEFINE_string("topology", None, "Such as v5e:4x4, v5p:4x4x4, h100, a100-40 or h100:8.")
    flags.DEFINE_string("step", "all", "train, stream, decode, several with commas, or all.")
    flags.DEFINE_string("mesh", None, "Devices along data and model, such as 8,2 or -1,1.")
    flags.DEFINE_float("peak", 0.5, "Share of the devices' peak that training reaches, 0.01 to 1.")
    flags.DEFINE_string("loader", "", "What a host's core reads: of benchmarks/loader.py --json.")
    flags.DEFINE_boolean("json", False, "Print JSON.")
    flags.DEFINE_boolean(
        "largest", True, "Also find the largest batch; --nolargest spares minutes."
    )


def run() -> int:
    """Does what the flags ask for; returns the exit status."""
    from absl import flags

    given = flags.FLAGS
    for name in ("config", "topology"):
        if getattr(given, name) is None:
            example = {"config": "configs/lvu.py", "topology": "v5e:4x4"}[name]
            raise UserError(f"--{name} is missing; give one, such as --{name} {example}")
    if not 0.01 <= given.peak <= 1:
        raise UserError(f"--peak {given.peak:g} must be 0.01 to 1, a share of the devices' peak")
    topology, experiment = parse_topology(given.topology), read(given.config)
    loader = feed.read_loader(given.loader) if given.loader else {}
    shape = experiment.mesh if given.mesh is None else _mesh_shape(given.mesh)
    plans = [make_plan(experiment, step) for step in _steps(given.step)]
    mesh = make_mesh(shape, topology_devices(topology))
    results = []
    for plan in plans:
        print(f"compiling {plan.step} for {topology.name} …", file=sys.stderr, flush=True)
        report = compile_step(plan, topology, mesh)
        result = report.to_json()
        if plan.step == "train":
            result["eats"] = feed.appetite(report, topology, mesh, given.peak)
        if given.largest:
            print("looking for its largest batch …", file=sys.stderr, flush=True)
            result |= largest_batch(report, topology, mesh)
        results.append(result)
        if not given.json:
            print(render(result), flush=True)
            if plan.step == "train":
                print(feed.render(result["eats"], loader), flush=True)
    if given.json:
        print(json.dumps(results, indent=1))
    return 0 if all(result["fits"] for result in results) else 1


def _steps(text: str) -> list[str]:
    """The steps of a list with commas, each once; ``all`` stands for every one."""
    named = [STEPS if name == "all" else (name,) for name in text.split(",")]
    return list(dict.fromkeys(step for steps in named for step in steps))


def _mesh_shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"(-1|\d+),\d+", text):
        raise UserError(f"--mesh {text}: give devices along data and model, such as 8,2 or -1,1")
    data, model = text.split(",")
    return int(data), int(model)


if __name__ == "__main__":
    main(sys.argv)
