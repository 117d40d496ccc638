"""What a person reads of what is logged."""

import subprocess
import sys

from tests.small import ROOT

PROGRAM = """
import logging
from absl import flags, logging as absl
from adacm2_jax.errors import show_warnings

logging.basicConfig()  # as some libraries do
show_warnings()
show_warnings()
flags.FLAGS(["program"])
for _ in range(3):
    logging.warning("skipped %s: %s", 2, "a.mp4: no such file")
    logging.getLogger("jax").warning("no GPU here")
    absl.warning("a checkpoint was handled in a way that nobody asked about")
    logging.info("nothing")
absl.error("the disk is gone")
"""


def test_warnings_are_lines_each_once_and_libraries_only_tell_errors():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr == (
        "warning: skipped 2: a.mp4: no such file\nwarning: no GPU here\nerror: the disk is gone\n"
    )
