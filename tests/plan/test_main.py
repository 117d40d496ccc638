"""``python -m adacm2_jax.plan`` as a command."""

import json

import pytest

from adacm2_jax.plan.__main__ import _steps
from adacm2_jax.plan.steps import STEPS
from tests.small import error_line, run_process

LVU = ("-m", "adacm2_jax.plan", "--config", "configs/lvu.py")


def test_an_estimate_of_the_full_size_is_read_by_machines():
    done = run_process(*LVU, "--topology", "v5e:4x4", "--estimate", "--json")
    assert done.returncode == 0, done.stderr
    train, stream, decode = json.loads(done.stdout)
    assert (train["step"], stream["step"], decode["step"]) == ("train", "stream", "decode")
    assert train["fits"] and train["largest_batch"] >= train["batch_size"]
    assert train["memory"]["total"] < train["hbm"]


def test_what_does_not_fit_gives_status_1_and_says_so():
    done = run_process(
        *LVU,
        "--topology",
        "v5e:1x1",
        "--step",
        "train",
        "--estimate",
        "--config.train.batch_size=1",
    )
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout
    assert "largest batch that fits: 0" in done.stdout


def test_all_stands_for_every_step_in_a_list():
    assert _steps("all") == _steps("all,train") == list(STEPS)
    assert _steps("decode,all") == ["decode", "train", "stream"]
    assert _steps("stream,stream") == ["stream"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "v7:4x4"), "--topology v7:4x4"),
        ((), "--topology is missing"),
        (("--topology", "v5e:4x4", "--step", "evaluate"), "--step evaluate"),
        (("--topology", "v5e:3x5", "--estimate"), "v5e has no slice 3 chips long"),
        (
            ("--topology", "v5e:4x4", "--config.train.nope=0"),
            "--config.train.nope: there is no such field; those of train are accumulate, ",
        ),
        (("--topology", "v5e:4x4", "--mesh", "16"), "--mesh 16"),
        (("--topology", "v5e:4x4", "--mesh", "5,3", "--estimate"), "does not cover"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    done = run_process(*LVU, *arguments)
    assert done.returncode == 2
    assert message in error_line(done.stderr)
