"""What is wrong with a command line or a configuration file is told in one line."""

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.runs.command_line import parse
from tests.small import arguments, error_line, run_script


def refused(capsys, *given: object) -> str:
    assert run_script("train.py", *given) == 2
    return error_line(capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF\x00\x00\xff", ["is no Python file"]),
        (b"\xff\xfe\x01", ["is no Python file"]),
        ("Dear all,\nplease train.\n", ["is no Python file (invalid syntax, line 1)"]),
        ('{"train": {"steps": 3}}', ["defines no get_config()"]),
        ('{"cache": true}', ["NameError at line 1: name 'true' is not defined"]),
        ("x = 1\nx.y\ndef get_config(): pass", ["AttributeError at line 2", "'y'"]),
        ("def get_config():\n    return 1 / 0", ["ZeroDivisionError at line 2: division by zero"]),
        ("def get_config(): return None", ["get_config() gives None", "ConfigDict"]),
        ("import nowhere", ["ModuleNotFoundError at line 1", "'nowhere'"]),
        ("raise ValueError('two\\nlines')", ["ValueError at line 1: two"]),
    ],
)
def test_a_file_that_is_no_experiment_is_named_with_the_reason(content, words, tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(capsys, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert line.startswith(f"error: --config {path}")
    for word in words:
        assert word in line, line


def test_what_an_experiment_says_of_itself_stays(tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from adacm2_jax.errors import UserError\ndef get_config(_):\n    raise UserError('mine')\n"
    )
    assert refused(capsys, "--config", f"{path}:a", f"--workdir={tmp_path}") == "error: mine"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--config.data.jitter=maybe", "--config.data.jitter=maybe: it must be true or false"),
        ("--config.train.steps=1.5", "--config.train.steps=1.5: it must be a whole number"),
        ("--config.train.steps=", "--config.train.steps=: it must be a whole number"),
        ("--config.optim.b1=high: 1", "--config.optim.b1=high: 1: it must be a number"),
        ("--config.mesh=(1, two", "--config.mesh=(1, two: it must be values in parentheses, such"),
        ("--profile=-1", "--profile=-1: it must be a whole number of at least 0"),
        ("--profile=x", "--profile=x: it must be a whole number of at least 0"),
        ("--debug=perhaps", "--debug=perhaps: it must be true or false"),
        ("--config.train=3", "--config.train=3: Failed to parse '3' as a ConfigDict"),
        ("--noconfig.data.jiter", "--noconfig.data.jiter: there is no such field; those of data"),
        ("--config.train.steps.a=1", "--config.train.steps.a: there is no such field; train.steps"),
    ],
)
def test_a_wrong_value_is_told_with_field_and_what_is_accepted(given, message, tmp_path, capsys):
    line = refused(capsys, *arguments(tmp_path / "run", tmp_path), given)
    assert line.startswith(f"error: {message}"), line
    assert "(" not in line.removeprefix(f"error: {message}").replace("\"('a', 'b')\"", "")


def test_without_a_configuration_nothing_is_run():
    with pytest.raises(UserError, match="Unknown command line flag 'nonsense'"):
        parse(["program", "--nonsense"])
