"""Paths that name nothing that can be opened: one line that names the path and what is wrong."""

import os

import pytest

from tests.small import arguments, error_line, run_script

LONG = "x" * 300


@pytest.fixture
def places(tmp_path):
    """What a path may be, by a word."""
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    os.mkfifo(tmp_path / "fifo")
    return {
        **{name: str(tmp_path / name) for name in ("file", "loop", "dangling", "fifo")},
        "file/x": str(tmp_path / "file" / "x"),
        "null": "/dev/null",
        "long": str(tmp_path / LONG),
        "empty": "",
    }


@pytest.mark.parametrize("kind", ["file", "file/x", "null", "fifo", "loop", "dangling", "long"])
def test_a_place_for_data_sets_that_cannot_be_one_is_named(kind, places, tmp_path, capsys):
    command = arguments(tmp_path / "run", places[kind])
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    assert places[kind][:60] in line and "data.data_dir" in line and "directory" in line, line
    assert not (tmp_path / "run").exists()


def test_without_a_place_for_data_sets_nothing_is_written(tmp_path, capsys, monkeypatch):
    assert run_script("train.py", *arguments(tmp_path / "run", "")) == 2
    assert "data.data_dir is empty; name a directory" in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["file/x", "loop", "long", "dangling"])
def test_json_lines_that_cannot_be_opened_are_named(split, kind, places, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text('{"video": "a.mp4", "question": "which?", "answer": "1"}\n')
    files = {"train": good, "test": good, split: places[kind]}
    given = [f"--config.data.jsonl.{name}={file}" for name, file in files.items()]
    command = arguments(tmp_path / "run", tmp_path / "data", data__source="jsonl")
    assert run_script("train.py", *command, *given) == 2
    line = error_line(capsys)
    assert places[kind][:60] in line and "check the path" in line, line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["loop", "long"])
def test_features_that_cannot_be_opened_are_named(kind, places, data_dir, tmp_path, capsys):
    command = arguments(tmp_path / "run", data_dir, data__features=places[kind])
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    assert places[kind][:60] in line, line


@pytest.mark.parametrize("field", ["tokenizers", "init_from"])
def test_a_directory_to_start_from_with_too_long_a_name_is_named(
    field, places, data_dir, tmp_path, capsys
):
    command = arguments(tmp_path / "run", data_dir, **{field: places["long"]})
    assert run_script("train.py", *command) == 2
    line = error_line(capsys)
    assert places["long"][:60] in line, line


@pytest.mark.parametrize("kind", ["loop", "long", "dangling"])
@pytest.mark.parametrize("script", ["train.py", "eval.py", "ask"])
def test_a_run_that_cannot_be_opened_is_named(script, kind, places, data_dir, capsys):
    given = {
        "train.py": arguments(places[kind], data_dir),
        "eval.py": [f"--workdir={places[kind]}"],
        "ask": ["clip.mp4", f"--model={places[kind]}", "--question=which?"],
    }[script]
    assert run_script(script, *given) == 2
    line = error_line(capsys)
    assert places[kind][:60] in line, line


def test_a_bucket_without_what_opens_it_is_one_line(capsys):
    assert run_script("ask", "clip.mp4", "--model=gs://x/y", "--question=which?") == 2
    line = error_line(capsys)
    assert "gs://x/y" in line, line


def test_a_run_below_the_directory_that_was_named_is_proposed(tmp_path, capsys):
    run = tmp_path / "quickstart" / "main"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert run_script("ask", "a.mp4", "--model", run.parent, "--question", "?") == 2
    assert error_line(capsys).endswith(f"no config.json here; did you mean {run}?")
