"""The command ``adacm2 demo`` where it cannot serve; `make check-demo` has the page itself."""

import socket
import sys

import pytest

from tests.small import error_line, run_script


@pytest.fixture
def no_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "adacm2_jax.demo.page", raising=False)


def test_without_gradio_it_says_what_to_install(small_run, no_gradio, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_script("demo", "--model", small_run, "--port", port) == 2
    assert error_line(capsys).endswith(
        "the package gradio is not installed: pip install 'adacm2-jax[demo]', "
        "or in a clone pip install --editable '.[demo]'"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--fps", "0"], "--fps 0 must be above 0 and at most 30"),
        (["--fps", "nan"], "--fps nan must be above 0"),
        (["--port", "70000"], "--port 70000 must be from 1 to 65535"),
        (["--host", ""], "--host is empty"),
        (["--host", "203.0.113.1"], "--port 7860 of --host 203.0.113.1 cannot be listened on"),
        (["--max-upload", "lots"], "--max-upload lots is no size; give one such as 200mb"),
    ],
)
def test_wrong_flags_are_one_line(no_gradio, capsys, given, message):
    assert run_script("demo", "--model", "gone", *given) == 2
    assert message in error_line(capsys)


def test_a_port_that_is_taken_is_told_before_the_model_is_opened(no_gradio, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run_script("demo", "--model", "gone", "--port", port) == 2
    assert f"--port {port} of --host 127.0.0.1 cannot be listened on" in error_line(capsys)
