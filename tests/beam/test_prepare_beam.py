"""The pipeline writes what the local path writes, byte by byte, also when it was killed."""

import resource
import signal
import subprocess
import sys
import time

import pytest

from data.feature_cache.cache import read_manifest
from tests.data.test_prepare import arguments, shards
from tests.small import ROOT, error_line, process_environment, run_process

PREPARE = ("-m", "adacm2_jax.commands", "prepare")


@pytest.fixture(scope="module")
def prepared(compiled_once, data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "local"
    done = run_process(*PREPARE, *arguments(data_dir), f"--output={output}")
    assert done.returncode == 0, done.stderr
    return output


def test_the_pipeline_writes_what_the_local_path_writes(prepared, data_dir, tmp_path):
    output = tmp_path / "beam"
    command = [*PREPARE, *arguments(data_dir), f"--output={output}", "--runner=direct"]
    done = run_process(*command, "--beam=direct_num_workers=2")
    assert done.returncode == 0, done.stderr
    assert "192 frames of 48 clips" in done.stdout
    assert shards(output) == shards(prepared)
    assert read_manifest(output) == read_manifest(prepared)
    assert not list(output.glob(".*"))


def test_a_killed_pipeline_goes_on_with_the_shards_that_are_missing(prepared, data_dir, tmp_path):
    output = tmp_path / "killed"
    command = [*PREPARE, *arguments(data_dir), f"--output={output}", "--runner=direct"]
    started = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=process_environment())
    deadline = time.monotonic() + 240
    while not list(output.glob("features-*")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    left = {path: path.stat().st_mtime_ns for path in output.glob("features-*")}
    assert 0 < len(left) < 8 and "done" not in read_manifest(output)
    done = run_process(*command)
    assert done.returncode == 0, done.stderr
    assert shards(output) == shards(prepared)
    assert all(path.stat().st_mtime_ns == time for path, time in left.items())


def test_what_a_worker_cannot_write_is_one_line(prepared, data_dir, tmp_path):
    command = [*PREPARE, *arguments(data_dir), f"--output={tmp_path / 'full'}"]
    room = min(map(len, shards(prepared).values())) - 1
    done = subprocess.run(
        [sys.executable, *command, "--runner=direct"],
        cwd=ROOT,
        env=process_environment() | {"JAX_ENABLE_COMPILATION_CACHE": "0"},
        text=True,
        capture_output=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode == 2, done.stderr
    line = done.stderr[done.stderr.rindex("error: ") :]
    assert ".frames cannot be written" in line and "File too large" in line
    assert shards(tmp_path / "full") == {}


def test_an_unknown_runner_is_one_line(data_dir, tmp_path):
    output = tmp_path / "beam"
    done = run_process(*PREPARE, *arguments(data_dir), f"--output={output}", "--runner=nothing")
    assert done.returncode == 2
    assert "--runner=nothing" in error_line(done.stderr)
