"""The command ``adacm2 serve``: what it refuses at once, and how it begins and ends."""

import http.client
import json
import signal
import subprocess
import sys

import pytest

from adacm2_jax.runs.lock import locked
from tests.small import ROOT, error_line, process_environment, run_script


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "set a token in ADACM2_TOKEN"),
        (["--port", "99999"], "--port 99999 of --host 127.0.0.1 cannot be listened on"),
        (["--rows", "0"], "--rows is 0"),
        (["--decoder-seconds", "nan"], "--decoder-seconds is nan"),
        (["--token-file", "none.txt"], "--token-file none.txt cannot be read"),
        (["--state", "file.txt/state"], "--state file.txt/state"),
        (["--connections", "1000000000000"], "--connections 1,000,000,000,000 needs"),
        (["--allow", "none"], "--allow none is no directory"),
        (["--model", "none"], "none"),
        (["--policy", "full"], "keeps every token"),
    ],
)
def test_what_cannot_be_is_one_line(small_run, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADACM2_TOKEN", raising=False)
    given = ["--model", small_run, "--port", "0", *flags]
    assert run_script("serve", *given) == 2
    assert words in error_line(capsys.readouterr().err)


def test_a_directory_that_another_server_uses_is_named_by_its_flag(small_run, tmp_path, capsys):
    with locked(tmp_path):
        given = ("--model", small_run, "--port", "0", "--state", tmp_path)
        assert run_script("serve", *given) == 2
    line = error_line(capsys.readouterr().err)
    assert line.endswith("another server uses it; wait for it, stop it, or use another --state")


def test_it_serves_until_it_is_told_to_stop_and_saves(small_run, compiled_once, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret\n")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "adacm2_jax.commands", "serve", "--model", small_run),
            *("--port", "0", "--state", tmp_path / "state", "--token-file", token),
            *("--rows", "2"),
        ],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("serving at http://127.0.0.1:"), process.communicate()[1]
        port = int(line.rsplit(":", 1)[1].split("/")[0])

        def call(token: str):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
            connection.request("POST", "/v1/sessions", b"{}", headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

        assert call("wrong")[0] == 401
        status, opened = call("secret")
        assert status == 200
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    # Where it takes a while, loading is told, too.
    lines = [line for line in err.splitlines() if not line.startswith("loading the model")]
    assert lines[0].startswith("compiling what every request needs") and not out
    assert lines[-1] == "stopped; sessions are saved" and len(lines) == 2, lines
    assert (tmp_path / "state" / "sessions" / f"{opened['id']}.session").is_file()
