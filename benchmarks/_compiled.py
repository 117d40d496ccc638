"""Reports of the planner for one experiment with a few fields changed; each is compiled once.

A full-size training step takes minutes to compile, so reports are kept in ``.cache/plan`` for as
long as the code and the compilers are the same.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "plan"


def experiment(config: str, overrides: dict):
    """The configuration ``configs/<config>.py`` with ``{"train.batch_size": 16}`` set."""
    found = importlib.import_module(f"configs.{config}").get_config()
    for path, value in overrides.items():
        *sections, field = path.split(".")
        section = found
        for name in sections:
            section = section[name]
        section[field] = value
    return found


@functools.cache
def version() -> str:
    """A hash of all that a report depends on but the experiment's fields: code and compilers."""
    files = sorted([*ROOT.glob("adacm2_jax/**/*.py"), *ROOT.glob("configs/*.py")])
    parts = [path.read_bytes() for path in files]
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "jax-cuda12-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            parts.append(f"{name} {importlib.metadata.version(name)}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def report(config: str, overrides: dict, topology: str, mesh: tuple[int, int], step: str) -> dict:
    """What the compiler says, as ``Report.to_json`` and :func:`beside` hold it."""
    case = [config, dict(sorted(overrides.items())), topology, list(mesh), step]
    name = hashlib.sha256(json.dumps([version(), *case]).encode()).hexdigest()[:16]
    path = CACHE / f"{name}.json"
    if not path.exists():
        # A process of its own: a compiler keeps gigabytes, and its messages are its own.
        done = subprocess.run(
            [sys.executable, __file__, repr(case)], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, case))}:\n{done.stderr[-3000:]}")
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps({"case": case, "report": json.loads(done.stdout)}, indent=1))
        os.replace(beside, path)
    return json.loads(path.read_text())["report"]


def beside(found, mesh) -> dict:
    """What the planner does not tell: whether the compiler computes or sends more than it should.

    Returns:
      ``sent_in_frame_loop``: kinds of collectives; ``flops_by_compiler``: those of XLA's cost
      analysis over those of the traced program, the body of every loop counted once (None where
      XLA has no such analysis, as for absent GPUs). Elementwise arithmetic adds to it, and a
      product that XLA takes to pieces to gather its weight meanwhile counts one piece alone.
    """
    from adacm2_jax.plan.flops import product_flops
    from adacm2_jax.plan.steps import trace
    from benchmarks._hlo import read

    if found.compiled is None:
        return {"sent_in_frame_loop": None, "flops_by_compiler": None}
    sent = [each.kind for each in read(found.compiled.as_text())[0] if each.in_frame_loop]
    computed = (found.compiled.cost_analysis() or {}).get("flops")
    counted = product_flops(trace(found.plan, mesh).jaxpr, loops_once=True) / mesh.size
    return {
        "sent_in_frame_loop": sent,
        "flops_by_compiler": computed / counted if computed else None,
    }


def main() -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    sys.path.insert(0, str(ROOT))
    from adacm2_jax.plan.report import compile_step
    from adacm2_jax.plan.steps import make_plan
    from adacm2_jax.plan.topology import parse_topology, topology_devices
    from adacm2_jax.runs.experiment import read
    from adacm2_jax.sharding import make_mesh

    config, overrides, name, mesh, step = ast.literal_eval(sys.argv[1])
    topology = parse_topology(name)
    devices = make_mesh(tuple(mesh), topology_devices(topology))
    plan = make_plan(read(experiment(config, overrides)), step)
    found = compile_step(plan, topology, devices)
    print(json.dumps(found.to_json() | beside(found, devices)))


if __name__ == "__main__":
    main()
