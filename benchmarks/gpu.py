"""What one GPU does with the full-size model: is it right, how fast, how far from its limits?

    python benchmarks/gpu.py [--sections runs,…] [--only ROWS] [--seconds 450] [--output DIR]

Needs jax, flax, optax and this repository, and no weights: they are drawn on the card. Every
section is a process of its own and measures what is most wanted first, until its share of the
seconds is used; what it no longer measures it names. A row is printed and written to DIR/rows.jsonl
when it is measured. Programs are compiled into DIR/compiled.

========  ==========================================================================================
runs      the memory against its oracle (tests/memory), and the tiny model on the card against the
          CPU: a stream, an answer, a training step in float32; the ViT in bfloat16
ceilings  bytes a second of a copy, operations a second of a large product
stream    frames a second of the ViT, of projection, Q-Former and memory, and of all together
decode    seconds to the first token, tokens a second, by rows and beams
memory    bytes on the card by policy and length of video, beside the compiler's
train     seconds of a training step of configs/lvu.py; its memory by length of clip
torch     the same by PyTorch on the same card
trace     kernels of ten chunks by time
========  ==========================================================================================

``--only`` takes an expression over the names of rows. Several of these may run at once into one
folder: where ``GPU_BENCHMARK_LOCK`` names a file they compile side by side and measure in turn.

``--size tiny`` does all of it with the tiny model, also without a GPU: for tests.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Sections in the order of running; each may take its share of the seconds that are left then.
SHARES = {
    "ceilings": 0.1,
    "runs": 0.2,
    "stream": 0.35,
    "decode": 0.35,
    "train": 0.4,
    "memory": 0.4,
    "trace": 0.4,
    "torch": 1.0,
}


MODULES = {
    "ceilings": "_gpu_speed",
    "runs": "_gpu_right",
    "stream": "_gpu_speed",
    "decode": "_gpu_speed",
    "train": "_gpu_memory",
    "memory": "_gpu_memory",
    "trace": "_gpu_speed",
    "torch": "_gpu_torch",
}


def environment(output: pathlib.Path) -> dict[str, str]:
    """Of a section's process."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(output / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        # Sections come one after the other, and PyTorch must find the card empty.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95",
    }


def run_section(name: str, seconds: float, size: str, output: pathlib.Path, only: str) -> int:
    """Runs a section to its end; a little after its time it is killed."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--inside", "--size", size]
    command += ["--sections", name, "--seconds", f"{seconds:.0f}", "--output", str(output)]
    command += ["--only", only]
    try:
        return subprocess.run(
            command, env=environment(output), cwd=ROOT, timeout=seconds + 60
        ).returncode
    except subprocess.TimeoutExpired:
        return -1


def inside(name: str, seconds: float, size: str, output: pathlib.Path, only: str) -> int:
    """A section, in this process."""
    module = importlib.import_module(f"benchmarks.{MODULES[name]}")
    shared = importlib.import_module("benchmarks._gpu")
    rows = shared.Rows(name, output / "rows.jsonl", seconds, only)
    getattr(module, f"section_{name}")(rows, shared.Size.named(size))
    return 0


def read_rows(output: pathlib.Path) -> list[dict]:
    """All that has been measured into a folder."""
    path = output / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SHARES), help="some, with commas between")
    parser.add_argument("--seconds", type=float, default=450, help="for all together")
    parser.add_argument("--only", default="", help="of rows whose names match this from the start")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = options.sections.split(",")
    if unknown := [name for name in names if name not in SHARES]:
        parser.error(f"--sections: no section {unknown[0]!r}; there are {', '.join(SHARES)}")
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g} must be above 0")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    if options.inside:
        return inside(names[0], options.seconds, options.size, output, options.only)
    begun, failed = time.monotonic(), []
    for name in sorted(names, key=list(SHARES).index):
        left = options.seconds - (time.monotonic() - begun)
        if left < 5:
            print(f"{name}: no time is left", flush=True)
            failed.append(name)
            continue
        share = 1.0 if len(names) == 1 else SHARES[name]
        print(f"== {name}, {left * share:.0f} of {left:.0f} s", flush=True)
        if status := run_section(name, left * share, options.size, output, options.only):
            print(f"{name}: ended with {status}", flush=True)
            failed.append(name)
    wrong = [row for row in read_rows(output) if row.get("right") is False]
    for row in wrong:
        print(f"wrong: {json.dumps(row)}")
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
