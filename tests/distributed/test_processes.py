"""Commands of several processes: how they meet, stop together, and end when one is gone."""

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from adacm2_jax.distributed import initialize, meet
from adacm2_jax.errors import LostProcessError, UserError
from adacm2_jax.runs.workdir import saved_steps
from benchmarks.check_faults import wait_for_step
from tests.distributed.conftest import finish, free_port, start
from tests.small import run_process


def command(workdir, data_dir, port: int, **values):
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    return lambda number: [
        "train.py",
        "--config=tests/small.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
        f"--process_id={number}",
        *given,
    ]


def rows_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_sigterm_to_one_process_stops_both_after_the_same_step_and_one_goes_on(
    compiled_once, data_dir, tmp_path
):
    workdir, steps = tmp_path / "run", 150
    options = dict(checkpoint__every=1000, train__steps=steps, eval__limit=2)
    both = start(2, command(workdir, data_dir, free_port(), **options))
    try:
        wait_for_step(both, workdir, 2)
        both[1].send_signal(signal.SIGTERM)
    finally:
        outputs = finish(both)
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, outputs
    (step,) = saved_steps(workdir)
    assert 2 <= step < steps
    assert all(f"stopped after step {step};" in output for output in outputs)
    # One process alone, with one device, goes on and evaluates.
    arguments = command(workdir, data_dir, 0, **options)(0)
    joining = ("--coordinator", "--num_processes", "--process_id")
    alone = [word for word in arguments if not word.startswith(joining)]
    done = run_process(*alone)
    assert done.returncode == 0 and f"at step {step}" in done.stdout, done.stderr
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [*range(1, steps + 1), steps]
    assert "eval/adacm2/accuracy" in rows[-1]
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 2  # one a start, of process 0 alone


def test_when_one_process_is_killed_the_other_ends_and_says_why(compiled_once, data_dir, tmp_path):
    workdir = tmp_path / "run"
    both = start(2, command(workdir, data_dir, free_port()))
    try:
        # By then the save of step 3 is complete: that of step 6 has waited for it.
        wait_for_step(both, workdir, 7)
        both[1].kill()
        began = time.monotonic()
    finally:
        outputs = finish(both)
    assert time.monotonic() - began < 120 and both[0].returncode not in (0, None)
    if "another task died" not in outputs[0]:  # then JAX's client ended the process by itself
        assert "lost one of the 2 processes" in outputs[0]
        assert both[0].returncode == LostProcessError.status
    assert saved_steps(workdir)


def test_a_missing_worker_is_counted_and_named(compiled_once, data_dir, tmp_path):
    arguments = command(tmp_path / "run", data_dir, free_port())(0)
    done = run_process(*arguments, "--join_timeout=2")
    assert done.returncode == LostProcessError.status and "Traceback" not in done.stderr
    assert "error: 1 of 2 processes came within 2 s, process 1 did not" in done.stderr
    assert not (tmp_path / "run").exists()


def run_meeting(
    count: int, present: list[tuple[int, int]], timeout: float = 2.0
) -> list[UserError | None]:
    """What each of some processes, ``(number, their count)``, hears at a meeting of ``count``;
    None: that all are there."""
    address = ("localhost", free_port())

    def attend(who) -> UserError | None:
        try:
            meet(address, who[1], who[0], timeout)
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(count + 1) as pool:
        return list(pool.map(attend, present))


def test_all_meet_whoever_comes_first():
    assert run_meeting(4, [(2, 4), (0, 4), (3, 4), (1, 4)], 20) == [None] * 4


def test_those_who_came_hear_who_is_missing():
    heard = run_meeting(4, [(0, 4), (2, 4)])
    words = "2 of 4 processes came within 2 s, process 1, 3 did not"
    assert all(type(each) is LostProcessError and words in str(each) for each in heard)


def test_a_number_that_two_have_and_another_count_are_refused():
    heard = run_meeting(3, [(0, 3), (1, 3), (1, 3)])
    words = "two processes were started with --process_id=1"
    assert all(type(each) is UserError and words in str(each) for each in heard)
    heard = run_meeting(3, [(0, 3), (1, 2)])
    words = "--num_processes=2, process 0 with 3"
    assert all(type(each) is UserError and words in str(each) for each in heard)


def test_strangers_at_the_port_are_not_counted():
    address = ("localhost", free_port())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, address, 2, 0, 60.0)
        for words in (b"\x80\xff\n", b"process x\n", b"process 1\n", b"GET / HTTP/1.1\n"):
            while True:
                try:
                    with socket.create_connection(address, 30) as stranger:
                        stranger.sendall(words)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
        meet(address, 2, 1, 60.0)
        first.result()


def test_without_process_0_the_others_say_where_they_looked():
    port = free_port()
    with pytest.raises(
        LostProcessError, match=rf"could not meet process 0 at localhost:{port} within 1"
    ):
        meet(("localhost", port), 2, 1, 1.0)


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at port {port}"):
            meet(("localhost", port), 2, 0, 1.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"coordinator": "a:1"}, "need all three"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be 0 to 1"),
        ({"automatic": True, "process_id": 0}, "use one way"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        initialize(**values)


def test_outside_a_cluster_there_is_nothing_to_detect(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="name the processes by --coordinator"):
        initialize(automatic=True, timeout=1)


def test_slurm_tells_who_is_there(monkeypatch):
    """With SLURM's variables alone: the first of two tasks waits for the second in vain."""
    slurm = {
        "SLURM_JOB_ID": "7001",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        LostProcessError, match="1 of 2 processes came within 1 s, process 1 did not"
    ):
        initialize(automatic=True, timeout=1)
