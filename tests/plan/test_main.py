"""``python -m adacm2_jax.plan`` as a command."""

import json

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.plan import of_run
from adacm2_jax.plan.__main__ import _mesh_shape, _steps
from adacm2_jax.plan.steps import STEPS, make_plan
from adacm2_jax.runs.experiment import read, to_dict
from adacm2_jax.runs.workdir import write_config
from tests.plan.small import small_config, small_plan
from tests.small import error_line, run_process

PLAN = ("-m", "adacm2_jax.plan")


@pytest.fixture
def run(tmp_path):
    """The directory of a run that has its experiment, and nothing else."""
    write_config(tmp_path, to_dict(read(small_config())))
    return tmp_path


def test_the_experiment_of_a_run_is_planned_for_machines_to_read(run):
    done = run_process(
        *PLAN,
        f"--config={run / 'config.json'}",
        *("--topology", "v5e:1x1", "--step", "decode", "--nolargest", "--json"),
        "--config.eval.batch_size=2",
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert (result["step"], result["batch_size"], result["fits"]) == ("decode", 2, True)
    assert 0 < result["memory"]["parameters"] < result["memory"]["total"] < result["hbm"]
    assert "largest_batch" not in result


def test_the_stored_experiment_gives_the_plan_of_the_original(run):
    stored = of_run.get_config(str(run))
    for step in STEPS:
        assert make_plan(read(stored), step) == small_plan(step)


@pytest.mark.parametrize("given", ["{run}", "{run}/config.json", "{run}/"])
def test_a_run_or_its_config_is_read_by_a_file_for_ml_collections(run, given):
    path = given.format(run=run)
    named = f"{of_run.__file__}:{run}"
    assert of_run.named(["plan", f"--config={path}"]) == ["plan", f"--config={named}"]
    words = ["plan", "--config", path, "--config.seed=1"]
    assert of_run.named(words) == ["plan", "--config", named, "--config.seed=1"]


def test_a_file_of_configs_is_left_as_it_is():
    words = ["plan", "--config", "configs/lvu.py:weights", "--topology=h100"]
    assert of_run.named(words) == words
    assert of_run.named(["plan", "--config"]) == ["plan", "--config"]


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"other\.json: give a run's directory"):
        of_run.named(["plan", "--config=other.json"])
    with pytest.raises(UserError, match=r"no config\.json here"):
        of_run.named(["plan", f"--config={tmp_path}"])
    with pytest.raises(UserError, match=r"no config\.json here"):
        of_run.named(["plan", "--config", "nowhere/config.json"])


def test_a_converted_checkpoint_is_planned_as_it_is_asked(tmp_path):
    write_config(tmp_path, {"model": to_dict(read(small_config()))["model"]})
    (tmp_path / "base.json").write_text("{}")
    stored = read(of_run.get_config(str(tmp_path)))
    assert stored.model == small_plan("decode").model and stored.generation.num_beams == 5


def test_all_stands_for_every_step_in_a_list():
    assert _steps("all") == _steps("all,train") == list(STEPS)
    assert _steps("decode,all") == ["decode", "train", "stream"]
    assert _steps("stream,stream") == ["stream"]


def test_help_names_every_flag():
    done = run_process(*PLAN, "--config", "configs/lvu.py", "--help")
    assert done.returncode == 0, done.stderr
    for flag in (
        "config",
        "topology",
        "step",
        "mesh",
        "json",
        "largest",
        "peak",
        "loader",
        "config.FIELD",
    ):
        assert f"--{flag}" in done.stdout


@pytest.mark.parametrize("text", ["16", "a,b", "-2,1", "8,2,1"])
def test_a_mesh_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=f"--mesh {text}: give devices along data and model"):
        _mesh_shape(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology is missing"),
        (
            ("--topology", "v5e:4x4", "--config.train.nope=0"),
            "--config.train.nope: there is no such field; those of train are accumulate, ",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message):
    done = run_process(*PLAN, "--config", "configs/lvu.py", *arguments)
    assert done.returncode == 2
    assert message in error_line(done.stderr)
