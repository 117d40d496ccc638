"""Do the full-size steps fit, compute what they need, and keep their memory for any length of clip?

    python benchmarks/check_full_size.py

Compiles configs/lvu.py (``eq8``, T = 100) without hardware: training for slices of 16 to 256 TPUs
and for eight H100s, evaluation for one H100. Each must fit and send nothing inside the frame loop,
and the compiler (of TPUs) may compute at most 1.10 times what the traced program does, the body of
every loop counted once: it would be more if it computed the same rows on several devices.
Then the training step at T = 16 and T = 1,024 on v5e:4x4, chunks of 16 frames: temporaries within
2 %; beside it the plain scan (``train.gradient=scan``). Writes docs/full_size.md and exits with 1
if something does not hold. Compiled reports are kept in ``.cache/plan``; the first run takes half
an hour or more. Needs the compilers: pip install 'adacm2-jax[plan]'. No accelerator.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from adacm2_jax.plan.topology import GIB
from benchmarks._compiled import ROOT, report
from benchmarks.memory_table import overrides

MOST_FLOPS, MOST_GROWTH = 1.10, 0.02
#: Topology, step and batch.
STEPS = (
    ("v5e:4x4", "train", 64),
    ("v6e:4x4", "train", 64),
    ("v5p:2x4x4", "train", 64),
    ("v5p:4x4x4", "train", 64),
    ("v5e:16x16", "train", 256),
    ("h100:8", "train", 64),
    ("h100", "stream", 8),
    ("h100", "decode", 8),
)


def step_rows(failures: list[str]) -> list[str]:
    """A row of the table for each of ``STEPS``; what does not hold is added to ``failures``."""
    lines = [
        "| topology | mesh | step | batch | arguments | of it weights | temporaries | total | of "
        "| TFLOP a device | rematerialised | sent in the frame loop |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for topology, step, batch in STEPS:
        found = report("lvu", overrides("eq8", 100, step, batch), topology, (-1, 1), step)
        memory = found["memory"]
        sizes = " | ".join(
            f"{memory[name] / GIB:.2f}"
            for name in ("arguments", "parameters", "temporaries", "total")
        )
        row = f"| {topology} | {tuple(found['mesh'])} | {step} | {batch} | {sizes} | "
        row += f"{found['hbm'] / GIB:.2f} | "
        if not found["fits"]:
            failures.append(f"{step} on {topology} does not fit")
            lines.append(row + "does not fit | | |")
            continue
        again, ratio = found["flops_rematerialised"], found["flops_by_compiler"]
        sent = sorted(set(found["sent_in_frame_loop"]))
        lines.append(
            row + f"{found['flops'] / 1e12:,.1f} | {again / found['flops']:.3f} | "
            f"{', '.join(sent) or 'nothing'} |"
        )
        print(lines[-1], "" if ratio is None else f"{ratio:.3f} of it by the compiler", flush=True)
        if ratio is not None and ratio > MOST_FLOPS:
            failures.append(f"{step} on {topology}: the compiler computes {ratio:.3f} × the step")
        if sent:
            failures.append(f"{step} on {topology} sends in the frame loop: {', '.join(sent)}")
    return lines


def length_rows(failures: list[str]) -> list[str]:
    """Memory of the training step at two lengths of clip, by each way to its gradient."""
    lines = [
        "| `train.gradient` | T | temporaries GiB | total GiB | fits |",
        "|---|---|---|---|---|",
    ]
    temporaries = {}
    for gradient in ("two_phase", "scan"):
        for frames in (16, 1024):
            fields = overrides("eq8", frames, "train", 16)
            fields |= {"train.gradient": gradient, "train.chunk": 16}
            found = report("lvu", fields, "v5e:4x4", (-1, 1), "train")
            memory = found["memory"]
            temporaries[gradient, frames] = memory["temporaries"]
            if gradient == "two_phase" and not found["fits"]:
                failures.append(f"training on {frames} frames does not fit")
            lines.append(
                f"| `{gradient}` | {frames:,} | {memory['temporaries'] / GIB:.3f} | "
                f"{memory['total'] / GIB:.2f} | {'yes' if found['fits'] else 'no'} |"
            )
            print(lines[-1], flush=True)
    growth = temporaries["two_phase", 1024] / temporaries["two_phase", 16] - 1
    print(f"temporaries from T = 16 to T = 1,024: {growth:+.2%}")
    if abs(growth) > MOST_GROWTH:
        failures.append(f"temporaries grow by {growth:+.1%} from T = 16 to T = 1,024")
    return lines


def main() -> int:
    failures: list[str] = []
    parts = [step_rows(failures), length_rows(failures)]
    tables = "\n\n".join("\n".join(lines) for lines in parts)
    title = "# Full-size steps, by the compiler\n\nWritten by `make check-full-size`. GiB.\n\n"
    (ROOT / "docs" / "full_size.md").write_text(title + tables + "\n")
    for failure in failures:
        print(f"does not hold: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
