"""Files of a run that were damaged on their way: one line that names the file and says so."""

import json

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.runs.checkpoint import Checkpoints
from adacm2_jax.runs.experiment import to_dict
from adacm2_jax.runs.workdir import read_base, read_link, saved_steps
from tests.small import arguments, error_line, run_script, small_experiment


def changed(**fields) -> bytes:
    """A good configuration with other values: ``data__sampling=None``."""
    values = to_dict(small_experiment())
    for name, value in fields.items():
        *sections, last = name.split("__")
        table = values
        for section in sections:
            table = table[section]
        table[last] = value
    return json.dumps(values).encode()


CONFIGS = {
    **{text: text.encode() for text in ("null", "5", "[]", "[1]", "{}", '"abc"', "", "{")},
    "deep": b"[" * 100_000,
    "binary": b"\xff\xfe\x00\x01",
    "no model": b'{"seed": 1}',
    "model": changed(model=5),
    "data is null": changed(data=None),
    "data is 5": changed(data=5),
    "sampling is null": changed(data__sampling=None),
    "sampling is a list": changed(data__sampling=[]),
    "max_frames": changed(data__sampling__max_frames="x"),
    "mode": changed(data__sampling__mode=[]),
    "jsonl": changed(data__jsonl={"train": 3}),
    "mesh": changed(mesh=[1]),
    "mesh is null": changed(mesh=None),
    "groups": changed(optim__groups=[["(", 1.0]]),
    "groups is a text": changed(optim__groups="all"),
    "policies": changed(eval__policies=[3]),
    "ratio": changed(model__memory__recent_ratio={}),
    "nan": changed(optim__learning_rate=float("nan")),
    "huge": changed(optim__learning_rate=10**400),
}


def commands(run, data_dir) -> dict[str, list[str]]:
    return {
        "train.py": arguments(run, data_dir),
        "eval.py": [f"--workdir={run}"],
        "ask": ["clip.mp4", f"--model={run}", "--question=which?"],
    }


def refused(run, data_dir, capsys, scripts=("train.py", "eval.py", "ask")) -> None:
    for script in scripts:
        assert run_script(script, *commands(run, data_dir)[script]) == 2
        line = error_line(capsys)
        assert f"{run}/config.json is damaged (" in line and "restore it" in line, line


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_configuration_is_named_by_every_command(damage, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(CONFIGS[damage])
    refused(tmp_path, tmp_path / "data", capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("kind", ["directory", "loop", "dangling"])
def test_what_is_no_file_in_the_place_of_a_configuration_is_named(kind, tmp_path, capsys):
    path = tmp_path / "config.json"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("config.json" if kind == "loop" else "nowhere")
    refused(tmp_path, tmp_path / "data", capsys)


LINKS = {
    "empty": b"",
    "cut": b'{"path": "/x", "fing',
    "binary": b"\x00\xff\x80",
    "list": b"[]",
    "no fingerprint": b'{"path": "/x"}',
    "no path": b'{"fingerprint": "x"}',
    "path is a number": b'{"path": 5, "fingerprint": "x"}',
    "fingerprint is null": b'{"path": "/x", "fingerprint": null}',
}


@pytest.mark.parametrize("damage", LINKS)
def test_a_damaged_link_to_a_converted_checkpoint_is_named(damage, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(changed())
    (tmp_path / "frozen.json").write_bytes(LINKS[damage])
    assert run_script("train.py", *arguments(tmp_path, tmp_path / "data")) == 2
    line = error_line(capsys)
    assert f"{tmp_path}/frozen.json is damaged (" in line and "restore it" in line, line
    with pytest.raises(UserError, match=r"frozen\.json is damaged"):
        read_link(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"fingerprint": 5}'])
def test_a_converted_checkpoint_that_does_not_say_which_is_named(content, tmp_path):
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        read_base(tmp_path)


def test_what_only_looks_like_a_number_is_no_step(tmp_path):
    for name in ("²", "٣", "7", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [7]


def test_checkpoints_beside_another_directory_can_be_opened(tmp_path):
    (tmp_path / "checkpoints" / "²").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step is None
    checkpoints.close()
