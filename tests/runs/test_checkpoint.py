"""What a run leaves on disk, complete or not at all."""

import errno
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.files import write_json
from adacm2_jax.runs.checkpoint import Checkpoints, restore_params
from adacm2_jax.runs.experiment import check_same
from adacm2_jax.runs.workdir import (
    check_path,
    find_base,
    read_config,
    read_link,
    saved_steps,
    write_config,
)
from adacm2_jax.training.step import TrainState

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(step: int) -> TrainState:
    learned = {"qformer/a": jnp.arange(6.0).reshape(2, 3) + step, "llm/b": jnp.full(4, step / 3)}
    return TrainState(
        step=jnp.int32(step),
        learned=learned,
        frozen={"vision/c": jnp.arange(5, dtype=jnp.bfloat16)},
        opt_state=({"mu": jax.tree.map(lambda leaf: leaf * 2, learned)}, jnp.int32(step)),
    )


def abstract(dtype=None) -> dict:
    def like(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=SHARDING)

    state = make_state(0)
    leaves = {name: like(leaf) for name, leaf in (state.learned | state.frozen).items()}
    return {
        part: {name.split("/")[1]: leaf for name, leaf in leaves.items() if name.startswith(part)}
        for part in ("qformer", "llm", "vision")
    }


@pytest.fixture
def run(tmp_path):
    """Steps 1, 2 and 3 saved, the newest two kept."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save_frozen(make_state(0).frozen)
    for step in (1, 2, 3):
        checkpoints.save(make_state(step), {"examples": 8 * step})
    checkpoints.close()
    return tmp_path


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_restored_state_is_the_saved_one_with_its_place_in_the_data(run):
    checkpoints = Checkpoints(run)
    assert checkpoints.latest_step == 3 and saved_steps(run) == [2, 3]
    restored, place = checkpoints.restore(make_state(0))
    checkpoints.close()
    assert_same(restored, make_state(3))
    assert place == {"examples": 24}


def test_every_nth_step_stays_for_ever(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4)
    for step in (2, 4, 5, 8, 10, 11):
        checkpoints.save(make_state(step), {})
    checkpoints.close()
    assert saved_steps(tmp_path) == [4, 8, 11]


def test_a_step_is_saved_once(run):
    checkpoints = Checkpoints(run)
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints" / "3").rglob("*")}
    checkpoints.save(make_state(3), {})
    checkpoints.close()
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints" / "3").rglob("*")} == before


def test_parameters_come_back_without_optimiser_and_data(run):
    params = restore_params(run, abstract())
    state = make_state(3)
    assert_same(params["qformer/a"], state.learned["qformer/a"])
    assert_same(params["vision/c"], state.frozen["vision/c"])
    assert params["vision/c"].dtype == jnp.bfloat16
    older = restore_params(run, abstract(), step=2)
    assert_same(older["llm/b"], make_state(2).learned["llm/b"])
    assert restore_params(run, abstract("float32"))["vision/c"].dtype == jnp.float32


def test_frozen_parameters_of_an_earlier_start_are_replaced(tmp_path):
    for value in (1, 2):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save_frozen({"vision/c": jnp.full(5, value, jnp.bfloat16)})
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(make_state(1), {})
    checkpoints.close()
    assert (restore_params(tmp_path, abstract())["vision/c"] == 2).all()


def make_base(path, fingerprint: str, value: float = 3.0):
    """A converted checkpoint as ``adacm2_jax.port`` leaves it, with all parameters of the model."""
    state = make_state(0)
    params = {name: jnp.full_like(leaf, value) for name, leaf in state.learned.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute() / "params", params | state.frozen)
    write_json(path / "base.json", {"fingerprint": fingerprint})
    return path


@pytest.fixture
def linked(tmp_path):
    """A run that started from a base, and the base."""
    base, run = make_base(tmp_path / "base", "a1b2"), tmp_path / "run"
    checkpoints = Checkpoints(run)
    checkpoints.save_frozen(make_state(0).frozen, str(base))
    checkpoints.save(make_state(1), {"examples": 8})
    checkpoints.close()
    return run, base


def test_a_run_from_a_base_names_it_instead_of_copying_it(linked):
    run, base = linked
    assert not (run / "frozen").exists()
    assert read_link(run) == {"path": str(base), "fingerprint": "a1b2"}
    params = restore_params(run, abstract())
    assert_same(params["vision/c"], make_state(0).frozen["vision/c"])
    # What learned is the run's, though the base has it too.
    assert_same(params["qformer/a"], make_state(1).learned["qformer/a"])


def test_what_a_base_lacks_is_written_by_the_run(tmp_path):
    base = make_base(tmp_path / "base", "a1b2")
    checkpoints = Checkpoints(tmp_path / "run")
    frozen = make_state(0).frozen | {"vision/d": jnp.arange(3.0)}
    checkpoints.save_frozen(frozen, str(base))
    checkpoints.save(make_state(1), {})
    checkpoints.close()
    wanted = abstract()
    wanted["vision"]["d"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=SHARDING)
    params = restore_params(tmp_path / "run", wanted)
    assert_same(params["vision/d"], jnp.arange(3.0))
    assert_same(params["vision/c"], frozen["vision/c"])


def test_a_base_that_moved_is_found_where_it_is_said_to_be(linked, tmp_path):
    run, base = linked
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"fingerprint a1b2 .* none at .*base; .*init_from=NEW"):
        restore_params(run, abstract())
    params = restore_params(run, abstract(), base=str(tmp_path / "moved"))
    assert_same(params["vision/c"], make_state(0).frozen["vision/c"])


def test_a_base_with_another_fingerprint_is_refused(linked, tmp_path):
    run, base = linked
    base.rename(tmp_path / "moved")
    other = make_base(base, "ffff")
    with pytest.raises(UserError, match=r"there is another one, fingerprint ffff at .*base"):
        restore_params(run, abstract())
    with pytest.raises(UserError, match="another one"):
        find_base(run, str(other))
    assert str(find_base(run, str(tmp_path / "moved"))) == str(tmp_path / "moved")


@pytest.mark.parametrize("name", ["a[1]", "[b]*?"])
def test_a_run_is_read_whatever_its_path_holds(run, tmp_path, name):
    """It was renamed, or copied to a place where brackets stand for what it is about."""
    moved = run.rename(run.with_name(f"{run.name}-{name}")) / "."
    assert saved_steps(moved) == [2, 3]
    params = restore_params(moved, abstract())
    assert_same(params, make_state(3).learned | make_state(0).frozen)
    checkpoints = Checkpoints(moved)
    assert_same(checkpoints.restore(make_state(0))[0], make_state(3))
    checkpoints.close()


def test_no_checkpoint_is_written_where_it_could_not_be_read(tmp_path):
    """Orbax would leave all arrays out of it."""
    for name in ("a[1]", "a[1]/run", "[!b]"):
        with pytest.raises(UserError, match=r"--workdir=w: .* for a pattern; rename it"):
            check_path(tmp_path / name, "--workdir=w")
    for name in ("a?", "b*", "a[", "]b["):  # as a pattern each is found by itself
        run = tmp_path / name
        check_path(run, "--workdir=w")
        checkpoints = Checkpoints(run)
        checkpoints.save(make_state(1), {})
        checkpoints.close()
        learned = {part: tree for part, tree in abstract().items() if part != "vision"}
        assert_same(restore_params(run, learned), make_state(1).learned)


def test_what_was_never_completed_is_no_step(run):
    (run / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    assert saved_steps(run) == [2, 3]
    checkpoints = Checkpoints(run)
    assert checkpoints.latest_step == 3
    checkpoints.close()


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("part", ["learned", "optimizer", "data"])
def test_damage_is_named_with_a_remedy(run, part):
    for path in (run / "checkpoints" / "3" / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(run)
    with pytest.raises(UserError, match=r"checkpoints/3.* is damaged.*move .*/3 away to go on"):
        checkpoints.restore(make_state(0))
    checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
        MemoryError(),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_what_is_no_fault_of_the_files_is_not_called_damage(run, monkeypatch, error):
    """Else a process that has lost another, or has no memory, tells people to delete a good one."""

    def fail(*_, **__):
        try:
            raise error
        except Exception as cause:
            raise ValueError("Encountered error while reading array") from cause

    checkpoints = Checkpoints(run)
    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(ValueError, match="while reading array") as caught:
        checkpoints.restore(make_state(0))
    assert not isinstance(caught.value, UserError)
    checkpoints.close()


def test_a_save_that_failed_in_the_background_is_noticed_without_the_next_one(run, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(run)
    checkpoints.check()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", fail)
        checkpoints.save(make_state(4), {"examples": 1})
        deadline = time.monotonic() + 60
        with pytest.raises(OSError, match="No space left"):
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
    checkpoints.close()


def test_other_parameters_are_listed_both_ways(run):
    other = abstract()
    other["llm"]["b"] = jax.ShapeDtypeStruct((9,), jnp.float32, sharding=SHARDING)
    with pytest.raises(UserError, match="another model") as caught:
        restore_params(run, other)
    assert " - llm/b (4,)\n + llm/b (9,)" in str(caught.value)
    del other["llm"]
    with pytest.raises(UserError, match=r" - llm/b \(4,\)"):
        restore_params(run, other)
    more = abstract()
    more["new"] = {"d": jax.ShapeDtypeStruct((1,), jnp.float32, sharding=SHARDING)}
    with pytest.raises(UserError, match="lacks 1 parameters of the model, the first is new/d"):
        restore_params(run, more)


def test_no_checkpoint_and_no_such_step_are_named(run, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 9; there are"):
        restore_params(run, abstract(), step=9)
    with pytest.raises(UserError, match="no checkpoint here; train first"):
        restore_params(tmp_path / "none", abstract())


def test_a_field_is_read_by_the_name_that_it_had(tmp_path):
    write_config(tmp_path, {"model": {"fused_attention": False, "remat": True}})
    assert read_config(tmp_path) == {"model": {"fused_vision": False, "remat": True}}


def test_a_configuration_is_written_whole(tmp_path):
    write_config(tmp_path, {"model": {"b": [1, None]}})
    write_config(tmp_path, {"model": {"b": [2, None]}})
    assert read_config(tmp_path) == {"model": {"b": [2, None]}}
    assert os.listdir(tmp_path) == ["config.json"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    assert json.loads((tmp_path / "config.json").read_text()) == {"model": {"b": [2, None]}}
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json here"):
        read_config(tmp_path / "none")


def test_differences_are_told_field_by_field():
    old = {"seed": 0, "train": {"steps": 5, "gone": 1}, "eval": {"every": 0}}
    new = {"seed": 0, "train": {"steps": 6, "new": None}, "eval": {"every": 7}}
    check_same(old, old, "run", ())
    with pytest.raises(UserError) as caught:
        check_same(old, new, "run", ("eval.",))
    lines = str(caught.value).split("\n")
    assert lines[1:] == [
        " - train.gone = 1",
        " + train.new = None",
        " - train.steps = 5",
        " + train.steps = 6",
    ]
    check_same(old, new, "run", ("eval.", "train."))
