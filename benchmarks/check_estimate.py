"""Is ``--estimate`` within 10 % of the compiler, on twelve full-size configurations and more?

    python benchmarks/check_estimate.py

The 10 % are of the total. Prints a row a configuration, the worst error, and the worst of all but
the weights (activations, optimiser, batch), writes docs/estimate.md, and exits with 1 if the answer
is no. The compiler's figures are kept in ``.cache/plan``: the first run takes half an hour or more,
estimating takes seconds.
Needs the compilers: pip install 'adacm2-jax[plan]'. No accelerator.
"""

import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = "cpu"

from adacm2_jax.plan.estimate import abstract_mesh, estimate
from adacm2_jax.plan.steps import make_plan
from adacm2_jax.plan.topology import GIB, parse_topology
from benchmarks._compiled import ROOT, experiment, report
from benchmarks.memory_table import overrides

LIMIT = 0.10
#: Fields with which the ViT learns, too.
LEARNING = {"optim.groups": (("llm/.*", None), (".*", 1.0))}


def scanned(blocks: int) -> dict:
    """Fields of a step that differentiates through all frames, of a model with fewer layers: the
    optimiser of a full ViT fits no v5e."""
    return {"train.gradient": "scan", "model.vision.depth": blocks, "model.llm.depth": 4}


#: Topology, mesh, step and changed fields of configs/lvu.py.
CASES = (
    ("v5e:4x4", (-1, 1), "train", overrides("eq8", 100, "train", 16)),
    ("v5e:4x4", (-1, 1), "train", overrides("full", 100, "train", 16)),
    (
        "v5e:4x4",
        (8, 2),
        "train",
        overrides("eq6", 100, "train", 64) | {"train.accumulate": 4, "train.chunk": 20},
    ),
    ("h100:8", (-1, 1), "train", overrides("eq8", 100, "train", 8)),
    ("h100:8", (-1, 1), "train", overrides("merge", 100, "train", 8)),
    ("h100:8", (4, 2), "train", overrides("eq6", 100, "train", 64) | {"train.chunk": 20}),
    ("v5e:4x4", (-1, 1), "stream", overrides("eq8", 100, "stream", 16)),
    ("v5e:4x4", (-1, 1), "stream", overrides("full", 100, "stream", 16)),
    ("h100", (-1, 1), "stream", overrides("eq6", 100, "stream", 1)),
    ("h100", (-1, 1), "stream", overrides("eq8", 100, "stream", 64) | {"eval.chunk": 20}),
    ("h100", (-1, 1), "decode", overrides("eq8", 100, "stream", 32)),
    ("v6e:4x4", (1, 16), "decode", overrides("eq8", 100, "stream", 16)),
    ("v5e:2x2", (-1, 1), "train", overrides("eq8", 10, "train", 4) | scanned(8) | LEARNING),
    ("v5e:2x2", (-1, 1), "train", overrides("eq8", 40, "train", 4) | scanned(8) | LEARNING),
    ("v5e:2x2", (-1, 1), "train", overrides("eq6", 12, "train", 8) | scanned(12) | LEARNING),
    ("v5e:2x2", (-1, 1), "train", overrides("eq8", 10, "train", 4) | scanned(8)),
)


def main() -> int:
    lines = [
        "| topology | mesh | step | batch | chunk | policy | compiler GiB | estimate GiB | error "
        "| error without weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    errors, others, seconds = [], [], 0.0
    for name, mesh, step, fields in CASES:
        start = time.perf_counter()
        config, topology = experiment("lvu", fields), parse_topology(name)
        plan = make_plan(config, step)
        guess = estimate(plan, topology, abstract_mesh(mesh, topology))["memory"]["total"]
        seconds += time.perf_counter() - start
        found = report("lvu", fields, name, mesh, step)
        error = guess / found["memory"]["total"] - 1
        errors.append(abs(error))
        beside = found["memory"]["total"] - found["memory"]["parameters"]
        other = (guess - found["memory"]["total"]) / beside
        others.append(abs(other))
        policy = found["policy"]
        if policy == "adacm2":
            policy = "eq6" if plan.model.memory.recent_ratio == "0.9" else "eq8"
        chunk = plan.how.chunk if step == "train" else plan.frames
        told = step
        if "train.gradient" in fields:
            learns = "learns" if fields.items() >= LEARNING.items() else "is frozen"
            told, chunk = f"scan, ViT of {plan.model.vision.depth} {learns}", plan.frames
        lines.append(
            f"| {name} | {tuple(found['mesh'])} | {told} | {plan.batch} | {chunk} | `{policy}` | "
            f"{found['memory']['total'] / GIB:.2f} | {guess / GIB:.2f} | "
            f"{error:+.1%} | {other:+.1%} |"
        )
        print(lines[-1], flush=True)
    worst = f"Worst error {max(errors):.1%} of the total, {max(others):.1%} without weights."
    print(f"{worst} {seconds:.1f} s for {len(CASES)} estimates")
    title = "# The planner's estimate against the compiler\n\nWritten by `make check-estimate`.\n\n"
    (ROOT / "docs" / "estimate.md").write_text(title + "\n".join([*lines, "", worst]) + "\n")
    return 1 if max(errors) > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
