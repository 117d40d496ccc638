"""How a benchmark tells what it measured, and where."""

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path


def machine() -> dict:
    """Where the numbers come from; a package that is not installed is left out."""
    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = re.search(r"model name\s*: (.*)|$", info.read_text())[1] or cpu
    found = dict(cpu=cpu, cores=os.cpu_count(), python=platform.python_version())
    for name in ("jax", "torch", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ratio(row: dict) -> str:
    """A row's ratio with its quartiles, for the table."""
    return f"{row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f})"


def write_json(path: str | None, results: dict) -> None:
    """Writes the results where ``--json`` says, whole or not at all."""
    if path is None:
        return
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(path)
