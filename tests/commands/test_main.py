"""The command adacm2: every command is found and tells its flags."""

import subprocess
import sys

from adacm2_jax.commands.__main__ import ELSEWHERE
from tests.small import ROOT

PROGRAM = """
import sys
from absl import flags, logging  # whose flags stay
from adacm2_jax.commands.__main__ import main

for name in sys.argv[1:]:
    before = set(flags.FLAGS)
    print("===", name)
    try:
        main(["adacm2", name, "--help"])
    except SystemExit as done:
        assert not done.code, (name, done.code)
    for flag in set(flags.FLAGS) - before:  # the next command defines its own
        delattr(flags.FLAGS, flag)
"""
#: Command → what its help must name.
NAMED = {
    "train": ("--config", "--workdir", "--profile", "--distributed"),
    "eval": ("--workdir", "--video", "--question", "--output"),
    "prepare": ("--config", "--output", "--dtype", "--shards", "--rows", "--runner"),
    "port": ("import", "export", "--src", "--dst"),
    "plan": ("--config", "--topology", "--step", "--largest"),
}


def test_every_command_tells_its_flags():
    assert set(NAMED) == set(ELSEWHERE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *NAMED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("=== ")[1:])
    for name, words in NAMED.items():
        assert [word for word in words if word not in told[name]] == [], told[name]


def test_scripts_and_experiments_need_a_clone(tmp_path):
    for name in ("train", "eval"):
        done = subprocess.run(
            [sys.executable, "-m", "adacm2_jax.commands", name],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: adacm2 {name} ") and "clone" in done.stderr
