"""Several processes that compute together: how they meet, and what only one of them does.

Every process runs the same script. They are joined by ``jax.distributed`` before anything is
computed; a plain TCP meeting at the coordinator's address comes first, because a process of JAX
that waits in vain is aborted and does not say who is missing.

Arrays are spread over the devices of all processes, so all of them take every step, evaluation
included. Files of a run belong to process 0 (:func:`is_main`); checkpoints are written by all.

**Preemption.** Schedulers announce the end of a job by SIGTERM: SLURM at its time limit, Kubernetes
when a pod is evicted, and GKE so for maintenance events of TPU and GPU nodes, which cannot be moved
alive (docs.cloud.google.com/kubernetes-engine/docs/concepts/handle-disruption-gpu-tpu). Often only
one process is told: :class:`Preemption` lets all of them stop after the same step.
"""

import contextlib
import errno
import itertools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from adacm2_jax.errors import LostProcessError, UserError, causes, printable

T = TypeVar("T")

#: Seconds after which a process that gives no sign of life is given up, and all others end.
HEARTBEAT = 60
#: Seconds that a process which ends in an error waits for the others.
SHUTDOWN = 15

#: What lies at most between two agreements of several processes on whether to stop. An agreement is
#: a collective: it comes after the step that runs, and the host waits for both.
AGREE_STEPS, AGREE_SECONDS = 8, 10.0

_BARRIERS = itertools.count()


def initialize(
    automatic: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the processes of a job; does nothing if neither way of naming them is used.

    Args:
      automatic: take the three values below from the environment: a Cloud TPU slice, SLURM, Open
        MPI or Kubernetes (what JAX detects).
      coordinator: ``host:port`` of process 0, which all can reach.
      num_processes: how many there are.
      process_id: which this is, from 0.
      timeout: seconds until all must have come.

    Raises:
      UserError: if the values do not fit together.
      LostProcessError: if somebody is missing.
    """
    given = [coordinator, num_processes, process_id]
    if not automatic and given == [None] * 3:
        return
    local_devices = None
    if automatic:
        if given != [None] * 3:
            raise UserError(
                "--distributed finds the processes by itself; --coordinator, --num_processes and "
                "--process_id name them by hand: use one way"
            )
        coordinator, num_processes, process_id, local_devices = _detect(timeout)
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"--coordinator={coordinator} --num_processes={num_processes} "
            f"--process_id={process_id}: several processes need all three"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()):
        raise UserError(f"--coordinator={coordinator} must be host:port, such as 10.0.0.1:1234")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be 0 to {num_processes - 1}: "
            f"--num_processes={num_processes}"
        )
    meet((host.strip("[]"), int(port)), num_processes, process_id, timeout)
    # On hosts without accelerator; others take no notice.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would be in the way of ours; see Preemption.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids=local_devices,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )


def _detect(timeout: int) -> tuple:
    """Coordinator, number of processes, this process and its devices, as JAX would find them."""
    # JAX does not offer this by itself, only together with joining.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    if None in found[:3]:
        raise UserError(
            "--distributed: this is no Cloud TPU slice, SLURM, Open MPI or Kubernetes job that JAX "
            "knows; name the processes by --coordinator, --num_processes and --process_id"
        )
    return found


def meet(
    address: tuple[str, int], num_processes: int, process_id: int, timeout: float = 300
) -> None:
    """Returns when all processes have come.

    Process 0 listens at ``address`` until everybody has told its number, then lets them go.

    Raises:
      LostProcessError: if one is missing after ``timeout`` seconds: process 0 and those that came
        are told how many did, and which did not.
      UserError: if they were not started as parts of one run.
    """
    if num_processes == 1:
        return
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _receive(address, num_processes, deadline, timeout)
    else:
        _report(address, num_processes, process_id, deadline, timeout)


def _receive(address: tuple[str, int], count: int, deadline: float, timeout: float) -> None:
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", address[1]),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=count + 128,  # others may knock, too
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {address[1]} ({error.strerror}); is another run "
            "using it? Name another port in --coordinator"
        ) from None
    came: set[int] = set()
    connections: list[socket.socket] = []
    problem: UserError | None = None
    with server, contextlib.ExitStack() as open_sockets:
        while len(came) < count - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = open_sockets.enter_context(server.accept()[0])
                connection.settimeout(5)
                word, *numbers = connection.makefile().readline().split()
                number, total = map(int, numbers)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue  # somebody who says nothing
                problem = _missing(count, came, address, timeout)
                break
            except (OSError, ValueError):
                continue  # gone, or not one of ours
            if word != "process":
                continue
            if total != count:
                problem = UserError(
                    f"process {number} was started with --num_processes={total}, process 0 with "
                    f"{count}; start all with the same number"
                )
            elif number in came:
                problem = UserError(f"two processes were started with --process_id={number}")
            came.add(number)
            connections.append(connection)
        answer = "go"
        if problem:
            missing = isinstance(problem, LostProcessError)
            answer = f"{'missing' if missing else 'refused'} {problem}"
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(f"{answer}\n".encode())
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.recv(1)  # they hang up first, so that the port is free at once
    if problem:
        raise problem


def _missing(count: int, came: set[int], address: tuple[str, int], timeout: float) -> UserError:
    absent = [str(number) for number in range(1, count) if number not in came]
    some = ", ".join(absent[:8]) + (" …" if len(absent) > 8 else "")
    return LostProcessError(
        f"{len(came) + 1} of {count} processes came within {timeout:g} s, process {some} did not: "
        "look at its log, whether it was started on its host with the same --num_processes, and "
        f"whether that host reaches {address[0]}:{address[1]} (firewall)"
    )


def _report(
    address: tuple[str, int], count: int, number: int, deadline: float, timeout: float
) -> None:
    answer, reason = "", ""
    while not answer:
        left = deadline - time.monotonic()
        if left < 0:
            raise LostProcessError(
                f"process {number} of {count} could not meet process 0 at "
                f"{address[0]}:{address[1]} within {timeout:g} s ({reason}): look at its log, "
                "whether it was started, and whether its host and port are those of --coordinator "
                "and open (firewall)"
            )
        try:
            with socket.create_connection(address, timeout=min(left, 10)) as connection:
                connection.sendall(f"process {number} {count}\n".encode())
                # A little longer than process 0 waits: it knows more.
                connection.settimeout(max(deadline - time.monotonic(), 0) + 5)
                answer = connection.makefile().readline().strip()
                reason = "it hung up"
        except OSError as error:
            reason = error.strerror or str(error)
        if not answer:
            time.sleep(0.2)
    word, _, text = answer.partition(" ")
    if word != "go":
        raise (LostProcessError if word == "missing" else UserError)(text)


def is_main() -> bool:
    """Whether this process writes the files of a run and shows its progress."""
    return jax.process_index() == 0


def main_first(make: Callable[[], T]) -> T:
    """Calls ``make`` in process 0, and after it in all others: it finds there what was written.

    For data sets and other files that are prepared in a directory which all processes share.
    """
    if not jax.distributed.is_initialized():
        return make()
    if is_main():
        try:
            return make()
        finally:
            wait_for_all()  # also after an error, which the others then meet themselves
    wait_for_all()
    return make()


def wait_for_all(hours: float = 24) -> None:
    """Returns when every process is here; ends with an error if one is gone."""
    if jax.distributed.is_initialized():  # asked so that no script needs a device for it
        # Through the coordinator: a collective on the devices may not wait as long.
        wait = multihost.get_barrier_sync_fn()
        wait(key=f"adacm2_jax {next(_BARRIERS)}", timeout_ms=int(hours * 3600e3))


def connect(mesh: Mesh) -> None:
    """Connects the devices of a mesh with each other, along every axis and all together.

    Gloo, which joins hosts without accelerator, allows 30 seconds for that; within the first step
    it would fail where one process compiles longer than another.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    ones = np.ones(mesh.devices.shape, np.float32)
    place = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    array = jax.make_array_from_callback(ones.shape, place, lambda index: ones[index])
    for axes in (None, *range(ones.ndim)):
        total = jax.jit(jnp.sum, static_argnums=1)(array, axes)
        jax.block_until_ready(total)
    multihost_utils.sync_global_devices("connect")


class Preemption:
    """Notes SIGTERM and Ctrl-C within a block; all processes learn of it at the same step.

    A second Ctrl-C ends the process at once.

    JAX's own sync point (``multihost_utils.reached_preemption_sync_point``) is not used: it is told
    older steps by Orbax's background thread, which can put the agreed step into the past.
    """

    def __init__(self):
        self._number = 0
        self._before: dict = {}
        self._steps, self._turn, self._since = 0, 1, time.monotonic()

    def __enter__(self) -> "Preemption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if number == signal.SIGINT and self._number == signal.SIGINT:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
            return
        self._number = number
        if number == signal.SIGINT and is_main():
            line = "\nstopping after this step, which is saved; Ctrl-C again stops at once\n"
            os.write(sys.stderr.fileno(), line.encode())  # print is not safe in a handler

    def agreed(self) -> int:
        """The signal if any process has got one, else 0. All must call it after the same step."""
        if jax.process_count() == 1:
            return self._number
        seconds = (time.monotonic() - self._since) / max(self._steps, 1)
        # A signal that comes meanwhile stays noted for the next time.
        mine = np.array([self._number, seconds], np.float32)
        number, slowest = multihost_utils.process_allgather(mine).max(axis=0)
        # Of what all were told, so that it is the same in all, whatever their clocks say.
        self._turn = steps_between(float(slowest))
        self._steps, self._since = 0, time.monotonic()
        return int(number)

    def polled(self) -> int:
        """:meth:`agreed` where it is due; 0 else. All must call it, after every step.

        One process alone learns of its signal at once; several do after at most ``AGREE_STEPS``
        steps, or ``AGREE_SECONDS`` if that is earlier, by the pace of the steps before.
        """
        self._steps += 1
        if jax.process_count() > 1 and self._steps < self._turn:
            return 0
        return self.agreed()

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Both signals end the process at once, within a block that has nothing to lose."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        try:
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._note)


def steps_between(seconds: float) -> int:
    """Steps from one agreement to the next, 1 to ``AGREE_STEPS``.

    Args:
      seconds: of a step, in the slowest process.
    """
    return int(min(max(AGREE_SECONDS / max(seconds, 1e-6), 1), AGREE_STEPS))


#: What is wrong with a path that somebody gave, and not with this program.
_OF_A_PATH = (
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


def explain(error: BaseException) -> UserError | None:
    """What to tell people of an error that is no fault of the program; None for all others."""
    chain = list(causes(error))
    text = "\n".join(map(str, chain))
    codes = {each.errno for each in chain if isinstance(each, OSError)}
    full = codes & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    if full or any(words in text for words in ("No space left", "Disk quota exceeded")):
        if any(map(_in_shared_memory, chain)):
            return UserError(
                f"no room in the shared memory /dev/shm ({_first_line(text)}): enlarge it (docker "
                "run --shm-size=8g), or lower data.workers; 0 decodes without it"
            )
        return UserError(
            f"no room on the disk ({_first_line(text)}): make room, then the same command goes on "
            "from the newest complete checkpoint"
        )
    for each in chain:
        if isinstance(each, OSError) and each.errno in _OF_A_PATH and each.filename:
            shown = printable(os.fsdecode(each.filename))
            shown = f"{shown[:80]} …" if len(shown) > 200 else shown
            return UserError(
                f"{shown}: {each.strerror}; correct the path, or what is there (--debug shows "
                "where it was used)"
            )
    gone = (
        *("Connection closed by peer", "Connection reset", "Gloo ", "coordination", "heartbeat"),
        "Timed out while waiting for",  # of Orbax, where another process did not finish its save
    )
    if jax.distributed.is_initialized() and any(words in text for words in gone):
        return LostProcessError(
            f"process {jax.process_index()} lost one of the {jax.process_count()} processes "
            f"({_first_line(text)}): look at the logs of the others for the cause, then start all "
            "again by the same command; they go on from the newest complete checkpoint"
        )
    return None


def _in_shared_memory(error: BaseException) -> bool:
    """Whether an error was raised where Python makes shared memory or semaphores."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ends = ("multiprocessing/shared_memory.py", "multiprocessing/synchronize.py")
    return "/dev/shm" in str(error) or any(name.endswith(ends) for name in frames)


def leave(status: int) -> None:
    """Ends this process; among several without waiting for others, who may be gone."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status)


def leave_together(status: int) -> None:
    """Ends this process with others that are about to end, too; after ``SHUTDOWN`` seconds alone.

    The end of ``jax.distributed`` waits for all, and where one does not come it aborts the rest:
    their status would be that of a crash, after which a job is started again.
    """
    if jax.distributed.is_initialized():
        wait = multihost.get_barrier_sync_fn()
        try:
            wait(key="adacm2_jax ends", timeout_ms=SHUTDOWN * 1000)
        except Exception:
            leave(status)
    raise SystemExit(status)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0][:200]
