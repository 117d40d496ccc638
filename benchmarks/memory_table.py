"""Device memory of the full-size steps by memory policy and length of video, by the compiler.

    python benchmarks/memory_table.py

Compiles configs/lvu.py, one video a device, for 16 v5e chips and for H100s, at T = 20, 100, 500 and
1,000 frames under ``full``, ``merge`` (20 frames), ``eq8`` and ``eq6``. Where a step does not fit,
what XLA says it would need is marked so. Writes docs/memory_table.json, docs/memory_table.md and
docs/memory.png when all cells are there. Compiled reports are kept in ``.cache/plan``; the first
run takes hours. Needs the compilers: pip install 'adacm2-jax[plan]'. No accelerator.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from adacm2_jax.plan.topology import GIB
from benchmarks._compiled import ROOT, report

LENGTHS = (20, 100, 500, 1000)
POLICIES = ("full", "merge", "eq6", "eq8")
#: The language model does not fit one v5e chip, so sixteen share it; a single H100 holds all.
TARGETS = {
    "v5e": {"stream": ("v5e:4x4", 16), "train": ("v5e:4x4", 16)},
    "H100": {"stream": ("h100", 1), "train": ("h100:8", 8)},
}


def overrides(policy: str, frames: int, step: str, batch: int) -> dict:
    """The experiment's fields for one cell."""
    fields = {
        "full": {"policy": "full", "max_frames": frames},
        "merge": {"policy": "merge", "bank_frames": 20},
        "eq8": {"recent_ratio": "0.1", "conserve_ratio": "0.1"},
        "eq6": {"recent_ratio": "0.9", "conserve_ratio": "0.1"},
    }[policy]
    changed = {f"model.memory.{name}": value for name, value in fields.items()}
    if step == "stream":  # a chunk after the other: the length is not in the program
        return changed | {"eval.batch_size": batch}
    return changed | {"train.batch_size": batch, "train.num_frames": frames}


def measure(target: str, step: str, policy: str, frames: int) -> dict:
    """One cell: bytes on a device."""
    topology, batch = TARGETS[target][step]
    found = report("lvu", overrides(policy, frames, step, batch), topology, (-1, 1), step)
    memory = found["memory"]
    return {
        "target": target,
        "topology": topology,
        "step": step,
        "policy": policy,
        "frames": frames,
        "fits": found["fits"],
        "total": memory["total"],
        "without_weights": memory["total"] - memory["parameters"],
        "temporaries": memory["temporaries"],
    }


def savings(cells: list[dict]) -> None:
    """Adds what a cell saves against ``full`` and ``merge`` of the same length, in per cent."""
    by_key = {(c["target"], c["step"], c["policy"], c["frames"]): c for c in cells}
    for cell in cells:
        for other in ("full", "merge"):
            rival = by_key[cell["target"], cell["step"], other, cell["frames"]]
            for field in ("total", "without_weights"):
                saved = round(100 * (1 - cell[field] / rival[field]), 1)
                cell[f"saves_{field}_of_{other}"] = saved


def table(cells: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| target | step | T | policy | GiB | without weights | saves of `full` | of `merge` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        mark = "" if cell["fits"] else " (does not fit)"
        saved = [
            "–"
            if cell["policy"] == other
            else f"{cell[f'saves_total_of_{other}']:.0f} % "
            f"({cell[f'saves_without_weights_of_{other}']:.0f} %)"
            for other in ("full", "merge")
        ]
        lines.append(
            f"| {cell['target']} | {cell['step']} | {cell['frames']} | `{cell['policy']}` | "
            f"{cell['total'] / GIB:.2f}{mark} | {cell['without_weights'] / GIB:.2f} | "
            f"{saved[0]} | {saved[1]} |"
        )
    return "\n".join(lines) + "\n"


def draw(cells: list[dict], path: pathlib.Path) -> None:
    """Memory without weights against the length of the video."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.4), sharey=True)
    panels = [(target, step) for step in ("stream", "train") for target in TARGETS]
    for axis, (target, step) in zip(axes, panels, strict=True):
        for policy in POLICIES:
            line = [
                (cell["frames"], cell["without_weights"] / GIB, cell["fits"])
                for cell in cells
                if (cell["target"], cell["step"], cell["policy"]) == (target, step, policy)
            ]
            (drawn,) = axis.plot(*zip(*[each[:2] for each in line], strict=True), label=policy)
            for frames, size, fits in line:
                axis.plot(frames, size, "o" if fits else "x", color=drawn.get_color())
        axis.set(title=f"{step}, {target}", xlabel="frames", xscale="log", yscale="log")
    axes[0].set_ylabel("GiB a device, without weights")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    cells = []
    for step in ("stream", "train"):
        for target in TARGETS:
            for frames in LENGTHS:
                for policy in POLICIES:
                    cell = measure(target, step, policy, frames)
                    print(f"{target} {step} {frames} {policy}: {cell['total'] / GIB:.2f} GiB")
                    cells.append(cell)
    savings(cells)
    docs = ROOT / "docs"
    (docs / "memory_table.json").write_text(json.dumps(cells, indent=1) + "\n")
    title = "# Device memory by policy, by the compiler\n\nWritten by `make memory-table`.\n\n"
    (docs / "memory_table.md").write_text(title + table(cells))
    draw(cells, docs / "memory.png")


if __name__ == "__main__":
    main()
