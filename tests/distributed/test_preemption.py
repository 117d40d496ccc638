"""When a signal becomes known to the processes of a job."""

import json
import signal

import pytest

from adacm2_jax import distributed
from adacm2_jax.distributed import Preemption, steps_between
from tests.distributed.conftest import finish, free_port, start

#: Two processes that take steps, the second one slowly; it gets SIGTERM before its twelfth.
PROGRAM = """
import json, signal, sys, time
from adacm2_jax import distributed

number, coordinator = int(sys.argv[1]), sys.argv[2]
distributed.AGREE_SECONDS = 0.9
distributed.initialize(coordinator=coordinator, num_processes=2, process_id=number)
turns, heard = [], 0
with distributed.Preemption() as preemption:
    gather = distributed.multihost_utils.process_allgather
    def noting(values):
        turns.append(step)
        return gather(values)
    distributed.multihost_utils.process_allgather = noting
    for step in range(1, 40):
        time.sleep(0.2 * number)
        if (number, step) == (1, 12):
            signal.raise_signal(signal.SIGTERM)
        if heard := preemption.polled():
            break
print(json.dumps([turns, step, heard]), flush=True)
distributed.leave_together(0)
"""


def test_processes_agree_at_the_same_steps_and_stop_after_the_same_one():
    coordinator = f"localhost:{free_port()}"
    both = start(2, lambda number: ["-c", PROGRAM, number, coordinator])
    outputs = finish(both)
    assert [process.returncode for process in both] == [0, 0], outputs
    first, second = (json.loads(text.strip().splitlines()[-1]) for text in outputs)
    assert first == second
    turns, step, heard = first
    assert heard == signal.SIGTERM and turns[-1] == step
    # 0.9 seconds are at most four steps of 0.2 seconds, which only the second process knows of.
    gaps = [late - early for early, late in zip([0, *turns], turns, strict=False)]
    assert gaps[0] == 1 and all(1 <= gap <= 4 for gap in gaps) and max(gaps) > 1
    assert 12 <= step <= 15


def test_a_process_alone_learns_of_a_signal_after_the_very_step():
    with Preemption() as preemption:
        assert [preemption.polled(), preemption.polled()] == [0, 0]
        signal.raise_signal(signal.SIGTERM)
        assert preemption.polled() == preemption.agreed() == signal.SIGTERM


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(0.0, 8), (0.01, 8), (1.25, 8), (1.3, 7), (3.4, 2), (5.1, 1), (10.0, 1), (600.0, 1)],
)
def test_an_agreement_comes_every_eight_steps_or_ten_seconds(seconds, steps):
    assert steps_between(seconds) == steps
    assert steps == 1 or steps * seconds <= distributed.AGREE_SECONDS
