"""The command adacm2: every command is found and tells its flags."""

import subprocess
import sys

import pytest

from adacm2_jax.commands.__main__ import ELSEWHERE
from adacm2_jax.inference.model import CAPTION
from tests.small import ROOT, error_line, run_script

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


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["ask", "a.mp4", "--model", "m", "--question", "q", "--nonsense"], "ask"),
        (["caption", "a.mp4", "b.mp4", "--model", "m"], "caption"),
        (["port", "import", "--src", "a", "--dst", "b", "--nonsense"], "port import"),
        (["port", "export", "--src", "a", "--dst", "b", "--format", "hf", "--x"], "port export"),
    ],
)
def test_a_flag_that_there_is_not_shows_the_usage_of_its_command(words, name, capsys):
    assert run_script(*words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"usage: adacm2 {name} ")
    assert f"adacm2 {name}: error: unrecognized arguments: " in errors


@pytest.mark.parametrize(
    "words",
    [
        ("caption", "--prompt", ""),
        ("choose", "--question", "", "--label", "a", "--label", "b"),
        ("choose", "--label", "a", "--label", ""),
    ],
)
def test_an_empty_text_is_refused(words, capsys):
    command, *given = words
    assert run_script(command, "a.mp4", "--model", "m", *given) == 2
    flag = given[given.index("") - 1]
    assert error_line(capsys) == (
        f"error: {flag} is empty; give a text, or leave it out where it may be"
    )


def test_the_default_prompt_is_told(capsys):
    for command in ("caption", "choose"):
        assert run_script(command, "--help") == 0
        assert CAPTION in " ".join(capsys.readouterr().out.split())
