"""Starts jobs of one or more processes with eight virtual devices in all."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable

from tests.small import ROOT, process_environment

DEVICES = 8


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(processes: int) -> dict[str, str]:
    """Of a process that has its share of the devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} "
    flags += f"--xla_force_host_platform_device_count={DEVICES // processes}"
    return process_environment() | {
        "XLA_FLAGS": flags,
        "NPROC": "32",  # fewer threads than devices, and collectives wait for ever
    }


def start(processes: int, command: Callable[[int], list[str]]) -> list[subprocess.Popen]:
    """Starts a command for every process; their output is kept."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command(number))],
            cwd=ROOT,
            env=environment(processes),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number in range(processes)
    ]


def finish(started: list[subprocess.Popen], timeout: float = 900) -> list[str]:
    """Their outputs; kills all if one does not end."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def run_curves(tmp_path, processes: int, jobs: list[dict], **options) -> list[list[float]]:
    """The curves of jobs, see tests/distributed/curves.py."""
    out, coordinator = tmp_path / f"out{len(os.listdir(tmp_path))}.json", f"localhost:{free_port()}"
    task = {"processes": processes, "coordinator": coordinator, "out": str(out), "jobs": jobs}
    task |= {"start": str(tmp_path / "start")} | options
    started = start(
        processes,
        lambda number: ["-m", "tests.distributed.curves", json.dumps(task | {"process": number})],
    )
    outputs = finish(started)
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    return json.loads(out.read_text())
