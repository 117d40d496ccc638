"""A run that is stopped, killed or moved goes on as if nothing had been; another one is refused."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

from adacm2_jax.files import write_json
from adacm2_jax.runs.checkpoint import Checkpoints
from adacm2_jax.runs.lock import locked
from adacm2_jax.runs.workdir import read_config, read_link, saved_steps
from benchmarks._runs import differences
from benchmarks.check_faults import signal_at_step, start, wait_for_step
from tests.small import (
    STEPS,
    arguments,
    error_line,
    learned_of,
    process_environment,
    rows_of,
    run_process,
    run_script,
)
from tests.video.make_videos import encode, numbered_frames


def test_killed_and_terminated_a_run_ends_bitwise_as_if_nothing_had_been(
    small_run, data_dir, tmp_path
):
    command = [sys.executable, "train.py", *arguments(tmp_path / "run", data_dir)]
    process = start(command, process_environment())
    assert signal_at_step(process, tmp_path / "run", 4, signal.SIGKILL) == -signal.SIGKILL
    process = start(command, process_environment())
    assert signal_at_step(process, tmp_path / "run", 5, signal.SIGTERM) == 128 + signal.SIGTERM
    assert saved_steps(tmp_path / "run")[-1] in range(5, STEPS)  # not a multiple of three alone
    done = run_process(*command[1:])
    assert done.returncode == 0 and "resumed" in done.stdout
    assert differences(small_run, tmp_path / "run") == []
    assert rows_of(tmp_path / "run") == rows_of(small_run)


def test_ctrl_c_saves_and_says_so_and_the_same_command_goes_on(small_run, data_dir, tmp_path):
    command = [sys.executable, "train.py", *arguments(tmp_path / "run", data_dir)]
    process = start(command, process_environment())
    wait_for_step([process], tmp_path / "run", 4)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopping after this step, which is saved" in output
    assert saved_steps(tmp_path / "run")[-1] in range(4, STEPS)
    assert run_script("train.py", *command[2:]) == 0
    assert differences(small_run, tmp_path / "run") == []


def test_a_finished_run_is_extended_to_more_steps(small_run, data_dir, tmp_path, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    command = arguments(tmp_path / "run", data_dir, train__steps=STEPS + 2)
    assert run_script("train.py", *command) == 0
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 3)]
    assert rows[:STEPS] == [row for row in rows_of(small_run) if "loss" in row]
    # The cosine is that of the new length: 2 of 9 steps of it are left, after a warm-up of 2.
    peak, share = 3e-3, (STEPS - 2) / STEPS
    assert rows[STEPS]["learning_rate"] == pytest.approx(
        peak * (1 + np.cos(np.pi * share)) / 2, rel=1e-5
    )
    assert read_config(tmp_path / "run")["train"]["steps"] == STEPS + 2
    # What was predicted before is still there.
    before = (small_run / "predictions.jsonl").read_text()
    assert (tmp_path / "run" / "predictions.1.jsonl").read_text() == before
    capsys.readouterr()
    assert run_script("train.py", *arguments(tmp_path / "run", data_dir)) == 2
    assert f"train.steps = {STEPS}, but" in error_line(capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=-1", "optim.learning_rate = -1.0 must be at least 0"),
        ("optim.learning_rate=nan", "optim.learning_rate = nan must be"),
        ("optim.clip_norm=-0.5", "optim.clip_norm = -0.5 must be"),
        ("optim.b2=1", "optim.b2 = 1.0 must be in [0, 1)"),
        ("train.num_frames=2", "train.num_frames = 2 would cut off"),
        ("model.dtype=float16", "model.dtype is 'float16', which is for evaluation"),
        ("train.batch_size=16", "- train.batch_size = 8"),
    ],
)
def test_of_an_existing_run_an_invalid_value_is_the_error_not_the_difference(
    small_run, data_dir, capsys, override, message
):
    command = [*arguments(small_run, data_dir), f"--config.{override}"]
    assert run_script("train.py", *command) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert ("holds a run of another configuration" in errors) == message.startswith("-")


def test_a_second_training_in_the_same_directory_is_refused(
    compiled_once, data_dir, tmp_path, capsys
):
    tmp_path.joinpath("run").mkdir()
    with locked(tmp_path / "run"):
        assert run_script("train.py", *arguments(tmp_path / "run", data_dir)) == 2
    assert "another process is writing there" in error_line(capsys)
    assert not (tmp_path / "run" / "config.json").exists()
    with locked(tmp_path / "run"):  # it was let go of
        pass


def test_a_run_is_not_begun_where_its_checkpoints_could_not_be_read(data_dir, tmp_path, capsys):
    run = tmp_path / "run[1]"
    assert run_script("train.py", *arguments(run, data_dir)) == 2
    line = error_line(capsys)
    assert f"--workdir={run}: no checkpoint can be written there" in line and "rename" in line
    assert not run.exists()


@pytest.mark.parametrize("change", ["order", "answer", "window"])
def test_changed_training_data_is_refused(compiled_once, tmp_path, capsys, change):
    encode(tmp_path / "clip.mp4", numbered_frames(40), fps=10)
    rows = [
        {"id": str(i), "video": "clip.mp4", "question": "what?", "answer": a, "start": i}
        for i, a in enumerate("ab")
    ]

    def write() -> None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "train.jsonl").write_text(lines)

    def command(steps: int) -> list[str]:
        return [
            *arguments(tmp_path / "run", tmp_path, data__source="jsonl", train__steps=steps),
            "--config.train.batch_size=2",
            f"--config.data.jsonl.train={tmp_path / 'train.jsonl'}",
            f"--config.data.jsonl.test={tmp_path / 'train.jsonl'}",
        ]

    write()
    assert run_script("train.py", *command(1)) == 0
    if change == "order":
        rows.reverse()
    elif change == "answer":
        rows[0]["answer"] = "c"
    else:
        rows[0]["end"] = 2
    write()
    assert run_script("train.py", *command(2)) == 2
    assert "are not those that the checkpoint was written with" in error_line(capsys)


def test_with_cached_clips_a_killed_run_ends_the_same_too(compiled_once, data_dir, tmp_path):
    def command(name: str) -> list[str]:
        options = dict(data__cache=True, data__jitter=False, data__cache_dir=tmp_path / "cache")
        return arguments(tmp_path / name, data_dir, **options)

    assert run_script("train.py", *command("whole")) == 0
    process = start([sys.executable, "train.py", *command("killed")], process_environment())
    assert signal_at_step(process, tmp_path / "killed", 5, signal.SIGKILL) == -signal.SIGKILL
    assert run_script("train.py", *command("killed")) == 0
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    # What was decoded by threads, without a cache, is the same.
    uncached = [*command("uncached"), "--config.data.cache=False"]
    assert run_script("train.py", *uncached) == 0
    assert differences(tmp_path / "whole", tmp_path / "uncached") == []


def test_decoding_processes_change_nothing(small_run, data_dir, tmp_path):
    done = run_process("train.py", *arguments(tmp_path / "run", data_dir, data__workers=2))
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "run")
    assert config["data"]["workers"] == 2
    assert differences(small_run, tmp_path / "run") == []


def test_a_run_goes_on_without_what_it_started_from(small_run, data_dir, tmp_path):
    shutil.copytree(small_run, tmp_path / "given")
    command = arguments(
        tmp_path / "run",
        data_dir,
        init_from=tmp_path / "given",
        train__steps=2,
        checkpoint__every=1,
        optim__learning_rate=0.0,
    )
    command.append('--config.optim.groups=(("(llm|vision)/.*", None), (".*", 0.5))')
    assert run_script("train.py", *command) == 0
    start_values, values = learned_of(small_run), learned_of(tmp_path / "run")
    for name, leaf in start_values.items():
        np.testing.assert_array_equal(leaf, values[name], err_msg=name)
    for name in ("qformer_tokenizer", "llm_tokenizer"):
        own, given = (path / name / "tokenizer.json" for path in (tmp_path / "run", small_run))
        assert own.read_text() == given.read_text()
    shutil.rmtree(tmp_path / "given")
    assert run_script("train.py", *command) == 0


def make_base(run, base) -> None:
    """The model of a run as a converted checkpoint."""
    for name in ("qformer_tokenizer", "llm_tokenizer"):
        shutil.copytree(run / name, base / name)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(base.absolute() / "params", learned_of(run))
    write_json(base / "config.json", {"model": read_config(run)["model"]})
    write_json(base / "base.json", {"fingerprint": "a1b2"})


def test_a_run_from_a_converted_checkpoint_finds_it_where_it_has_moved(
    small_run, data_dir, tmp_path, capsys
):
    make_base(small_run, tmp_path / "base")
    options = dict(train__steps=2, checkpoint__every=1, eval__limit=2)

    def command(place: str) -> list[str]:
        return arguments(tmp_path / "run", data_dir, init_from=tmp_path / place, **options)

    assert run_script("train.py", *command("base")) == 0
    assert not (tmp_path / "run" / "frozen").exists()
    kept, given = learned_of(tmp_path / "run"), learned_of(small_run)
    assert all((kept[name] == given[name]).all() for name in kept if name.startswith("vision/"))
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run_script("train.py", *command("base")) == 2
    line = error_line(capsys)
    assert "fingerprint a1b2" in line and "--config.init_from=NEW" in line
    assert run_script("train.py", *command("moved")) == 0
    assert read_link(tmp_path / "run")["path"] == str(tmp_path / "moved")
    assert run_script("eval.py", f"--workdir={tmp_path / 'run'}") == 0


def test_before_its_first_checkpoint_a_run_keeps_to_what_it_starts_from(
    small_run, data_dir, tmp_path, capsys
):
    """Else parameters would come from one place, tokenizers from another."""
    make_base(small_run, tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    write_json(tmp_path / "other" / "base.json", {"fingerprint": "c3d4"})

    def command(place: str) -> list[str]:
        options = dict(init_from=tmp_path / place, train__steps=2, eval__limit=2)
        return arguments(tmp_path / "run", data_dir, **options)

    assert run_script("train.py", *command("base")) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed before
    assert run_script("train.py", *command("other")) == 2
    assert "init_from" in capsys.readouterr().err
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run_script("train.py", *command("moved")) == 0
    assert read_link(tmp_path / "run")["path"] == str(tmp_path / "moved")


def test_another_configuration_is_refused_with_the_difference(small_run, data_dir, capsys):
    before = rows_of(small_run)
    status = run_script("train.py", *arguments(small_run, data_dir, seed=7, train__num_frames=5))
    text = capsys.readouterr().err
    assert status == 2 and "another configuration" in error_line(text)
    assert " - seed = 0\n + seed = 7\n - train.num_frames = 4\n + train.num_frames = 5" in text
    assert rows_of(small_run) == before


@pytest.mark.parametrize(("options", "stopped"), [({"eval__every": 4}, 4), ({}, STEPS)])
def test_a_signal_while_it_waits_for_a_save_stops_it_before_the_evaluation(
    small_run, data_dir, tmp_path, capsys, monkeypatch, options, stopped
):
    wait, waited = Checkpoints.wait, []

    def wait_with_a_signal(self):
        if not waited:
            waited.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", wait_with_a_signal)
    command = arguments(tmp_path / "run", data_dir, **options)
    assert run_script("train.py", *command) == 128 + signal.SIGTERM
    assert f"stopped after step {stopped};" in capsys.readouterr().out
    assert waited and saved_steps(tmp_path / "run")[-1] == stopped
    assert not any("eval/adacm2/accuracy" in row for row in rows_of(tmp_path / "run"))
