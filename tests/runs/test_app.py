"""What scripts and commands share: how they end."""

import subprocess
import sys

from tests.small import ROOT, process_environment

PRINTING = """
from adacm2_jax.runs.app import guarded

def main():
    while True:
        print("line", flush=True)

guarded(main)
"""


def test_a_command_whose_output_nobody_reads_ends_silently():
    with subprocess.Popen(
        [sys.executable, "-c", PRINTING],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
