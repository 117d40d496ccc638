"""Does a run survive whatever stops it? ``make check-faults``

Trains without interruption, in one process and in two. Then stops other runs at random moments,
each time going on with the same command, until enough faults have been counted:

* ``kill``: SIGKILL after a random step;
* ``kill in save``: SIGKILL while Orbax writes: its temporary directory is there before and after
  (``kill near save``: the save was complete by then);
* ``term``: SIGTERM after a random step, to the process and all that it has started;
* ``disk full``: a file system without room for the next checkpoint, until the process has ended;
* ``one of two``: SIGKILL of one of two processes; the other must end by itself, and say why;
* ``term one of two``: SIGTERM to one of two processes; both must save the same step.

Every turn prints a line: what was done, how the process ended, and the newest checkpoint. A run is
lost if its command does not go on, and damaged if a checkpoint that counts as complete cannot be
read, or has a value that is not finite. Every other command decodes in a process of its own, which
must end with it. At the end the runs must equal the uninterrupted one of as many processes bit for
bit: losses, parameters, optimiser and the place in the data. Exits with 1 if anything is not so.

Needs Linux with ``unshare`` (a private mount name space, for the small disk).
"""

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import jax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks._runs import check_finite, differences, losses, read_step, steps_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
OVERRIDES = {
    "train.log_every": 1,
    "checkpoint.every": 5,
    "eval.limit": 2,
}
#: Seconds in which the process that is left must have ended: heartbeat and shutdown, and slack.
BOUND = 150
PRIVATE = "ADACM2_PRIVATE_MOUNTS"


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Starts a command of the repository, in a session of its own; its output is kept."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def left_behind(process: subprocess.Popen, timeout: float = 20) -> list[int]:
    """What a command has started and what still lives so many seconds after its end."""
    deadline = time.monotonic() + timeout
    while True:
        alive = []
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
                if int(session) == process.pid and state != "Z":
                    alive.append(int(stat.parent.name))
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def wait_for_step(
    processes: Sequence[subprocess.Popen], workdir: pathlib.Path, step: int, timeout: float = 600
) -> None:
    """Returns once one of these processes has logged ``step``."""
    rows, deadline = workdir / "metrics.jsonl", time.monotonic() + timeout
    logged = re.compile(rf'^{{"step": {step}, "(?!eval)', re.MULTILINE)
    # A resumed run puts a new file in place of the one that the process before it left.
    left = rows.stat().st_ino if rows.exists() else None
    while not (rows.exists() and rows.stat().st_ino != left and logged.search(rows.read_text())):
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            stop(processes)
            outputs = "\n".join(process.communicate()[0] for process in processes)
            raise RuntimeError(f"no step {step}: {outputs}")
        time.sleep(0.005)


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, or half of one was left."""
    return any((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))


def wait_for_save(process: subprocess.Popen, workdir: pathlib.Path) -> None:
    """Returns while a checkpoint is being written, or when the process has ended."""
    while process.poll() is None and not is_saving(workdir):
        time.sleep(0.0005)


def signal_at_step(
    process: subprocess.Popen, workdir: pathlib.Path, step: int, number: int, timeout: float = 600
) -> int:
    """Sends a signal once this process has logged ``step``; returns its exit status."""
    wait_for_step([process], workdir, step, timeout)
    process.send_signal(number)
    process.communicate(timeout=timeout)
    return process.returncode


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Kills what still runs."""
    for process in processes:
        if process.poll() is None:
            process.kill()


@contextlib.contextmanager
def small_disk(directory: pathlib.Path, megabytes: int = 64) -> Iterator[None]:
    """A file system of that size, within a block."""
    directory.mkdir(parents=True)
    size = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(directory: pathlib.Path, leave: int) -> pathlib.Path:
    """Takes all the room of a small disk but ``leave`` bytes; returns the file to be removed."""
    disk, path = os.statvfs(directory), directory / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        file.write(bytes(max(disk.f_bavail * disk.f_frsize - leave, 0)))  # the run writes too
    return path


class Report:
    """Counts faults and finds what they have damaged."""

    def __init__(self):
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        print(f"{'':3} {'fault':16} {'step':>5} {'exit':>9} {'seconds':>7}  newest checkpoint")

    def add(self, kind: str, step: int, status, began: float, workdir: pathlib.Path) -> None:
        """One fault, after it: also tries to read every checkpoint that counts as complete."""
        self.counts[kind] += 1
        steps = steps_of(workdir)
        for saved in steps:
            try:
                check_finite(read_step(workdir, saved))
            except Exception as error:
                self.wrong.append(f"{kind} at {step}: checkpoint {saved} is damaged: {error}")
        seconds, total = time.perf_counter() - began, sum(self.counts.values())
        newest = max(steps, default="none")
        line = f"{total:3} {kind:16} {step:5} {status!s:>9} {seconds:7.1f}  {newest}"
        print(line, flush=True)

    def expect(self, good: bool, message: str) -> None:
        if not good:
            print(f"    NOT SO: {message}", flush=True)
            self.wrong.append(message)


class Runs:
    """Commands of one experiment."""

    def __init__(self, base: pathlib.Path, config: str, steps: int, overrides: Sequence[str]):
        self.steps, self._config, self._given = steps, config, list(overrides)
        self._values = OVERRIDES | {"train.steps": steps, "data.data_dir": base / "data"}
        self.started: list[subprocess.Popen] = []

    def command(self, workdir: pathlib.Path, *flags: str) -> list[str]:
        given = [f"--config.{name}={value}" for name, value in self._values.items()]
        recipe = [f"--config={self._config}", f"--workdir={workdir}"]
        return [sys.executable, "train.py", *recipe, *given, *self._given, *flags]

    def start(self, workdir: pathlib.Path) -> subprocess.Popen:
        """One process, and every other time one that decodes for it."""
        workers = f"--config.data.workers={len(self.started) % 2}"
        self.started.append(start(self.command(workdir, workers)))
        return self.started[-1]

    def start_two(self, workdir: pathlib.Path) -> list[subprocess.Popen]:
        """Two processes with a device each."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "32"}
        both = [
            start(
                self.command(
                    workdir,
                    f"--coordinator=localhost:{port}",
                    "--num_processes=2",
                    f"--process_id={number}",
                ),
                environment,
            )
            for number in range(2)
        ]
        self.started += both
        return both

    def finish(self, workdir: pathlib.Path, report: Report, two: bool = False) -> None:
        """Runs to the end without a fault: a run that cannot is lost."""
        processes = self.start_two(workdir) if two else [self.start(workdir)]
        outputs = [process.communicate()[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            report.expect(process.returncode == 0, f"{workdir.name} is lost: {output[-2000:]}")


#: The last steps are not hit: a signal that comes late would meet the evaluation instead.
REST = 8


def near_the_end(workdir: pathlib.Path, steps: int) -> bool:
    """Whether the newest checkpoint leaves no step to be hit."""
    return max(steps_of(workdir), default=0) >= steps - REST


def after(workdir: pathlib.Path, steps: int, rng: random.Random) -> int:
    """A step to be hit, after the newest checkpoint."""
    newest = max(steps_of(workdir), default=0)
    return min(newest + rng.randint(1, 16), steps - REST)


def one_process(runs: Runs, base: pathlib.Path, report: Report, count: int, seed: int) -> list:
    """``count`` faults over as many runs as that takes; returns their directories."""
    rng, kinds = random.Random(seed), itertools.cycle(["kill", "kill in save", "kill", "term"])
    done, number, left = [], 0, count
    while left:
        workdir = base / f"run{number}"
        while left and not near_the_end(workdir, runs.steps):
            kind, step = next(kinds), after(workdir, runs.steps, rng)
            began, process = time.perf_counter(), runs.start(workdir)
            wait_for_step([process], workdir, step)
            if kind == "kill in save":
                wait_for_save(process, workdir)
                time.sleep(rng.random() * 0.02)
            if kind == "term":
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.kill()
            process.wait()
            alive = left_behind(process)
            report.expect(not alive, f"{kind} at {step}: processes {alive} live on")
            for each in alive:
                os.kill(each, signal.SIGKILL)  # they hold the pipe that is read next
            output = process.communicate()[0]
            status = process.returncode
            if kind == "kill in save" and not is_saving(workdir):
                kind = "kill near save"
            expected = 128 + signal.SIGTERM if kind == "term" else -signal.SIGKILL
            report.add(kind, step, status, began, workdir)
            report.expect(status == expected, f"{kind} at {step}: exit {status}: {output[-1500:]}")
            if kind == "term":
                saved = max(steps_of(workdir), default=0)
                report.expect(saved >= step, f"term at {step} saved step {saved}")
            left -= 1
        runs.finish(workdir, report)
        done.append(workdir)
        number += 1
    caught = report.counts["kill in save"] or count < 2
    report.expect(caught, "no kill hit a save: more --kills are needed")
    return done


def full_disk(runs: Runs, base: pathlib.Path, report: Report, count: int, seed: int) -> None:
    """A disk that has less room than a checkpoint needs; with room again the run goes on."""
    rng, workdir = random.Random(seed), base / "small" / "run"
    for _ in range(count):
        began, process = time.perf_counter(), runs.start(workdir)
        step = min(max(steps_of(workdir), default=0) + 1, runs.steps - 1)
        wait_for_step([process], workdir, step)
        filler = fill(base / "small", rng.randrange(0, 200_000))
        output = process.communicate()[0]
        report.expect(
            process.returncode == 2 and "error: no room on the disk" in output,
            f"disk full: exit {process.returncode}: {output[-1500:]}",
        )
        filler.unlink()
        report.add("disk full", step, process.returncode, began, workdir)
        # With room again: on to some step beyond the next checkpoint.
        if max(steps_of(workdir), default=0) + 7 < runs.steps:
            began, process = time.perf_counter(), runs.start(workdir)
            wait_for_step([process], workdir, max(steps_of(workdir), default=0) + 6)
            process.send_signal(signal.SIGTERM)
            process.communicate()
            report.add("term", step, process.returncode, began, workdir)
    runs.finish(workdir, report)


def two_processes(runs: Runs, base: pathlib.Path, report: Report, count: int, seed: int) -> list:
    """One of two is killed or asked to stop; both must be gone soon, and know why. Returns the
    directories of the runs."""
    rng, done = random.Random(seed), [base / "two0"]
    for turn in range(count):
        if near_the_end(done[-1], runs.steps):
            runs.finish(done[-1], report, two=True)
            done.append(base / f"two{len(done)}")
        workdir = done[-1]
        target = turn % 2  # process 0 coordinates: its loss is noticed otherwise
        kind = ("one of two", "term one of two")[turn // 2 % 2]
        step = after(workdir, runs.steps, rng)
        began, processes = time.perf_counter(), runs.start_two(workdir)
        wait_for_step(processes, workdir, step)
        sent = time.monotonic()
        hit, other = processes[target], processes[1 - target]
        hit.send_signal(signal.SIGTERM if kind.startswith("term") else signal.SIGKILL)
        try:
            output = other.communicate(timeout=BOUND)[0]
        except subprocess.TimeoutExpired:
            stop(processes)
            output = other.communicate()[0]
            report.expect(False, f"{kind}: the other ran on for {BOUND} s: {output[-1500:]}")
        hit.communicate()
        seconds = time.monotonic() - sent
        status = f"{hit.returncode}, {other.returncode}"
        report.add(kind, step, status, began, workdir)
        if kind.startswith("term"):
            wanted = 128 + signal.SIGTERM
            report.expect(
                hit.returncode == other.returncode == wanted
                and max(steps_of(workdir), default=0) >= step,
                f"{kind} {target}: {status}: {output[-1500:]}",
            )
        else:
            said = "lost one of the 2 processes" in output or "another task died" in output
            report.expect(
                other.returncode != 0 and said, f"{kind} {target}: {status}: {output[-1500:]}"
            )
            print(f"    the other process ended after {seconds:.1f} s", flush=True)
    runs.finish(done[-1], report, two=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="faults of one process (40)")
    parser.add_argument("--full", type=int, default=4, help="times the disk is full (4)")
    parser.add_argument("--pairs", type=int, default=8, help="faults of one of two processes (8)")
    parser.add_argument("--steps", type=int, default=60, help="training steps (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--config", default="tests/small.py")
    parser.add_argument(
        "overrides", nargs="*", help="for train.py, such as --config.seed=1, after --"
    )
    args = parser.parse_args()
    if min(args.kills, args.full, args.pairs) < 0 or args.steps < 20:
        parser.error("numbers of faults are 0 or more, and --steps is 20 or more")
    if args.full and PRIVATE not in os.environ:
        if not shutil.which("unshare"):
            parser.error("unshare is missing (package util-linux); --full 0 leaves the disk out")
        os.environ[PRIVATE] = "1"
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv]
        os.execvp(command[0], command)
    jax.config.update("jax_platforms", "cpu")  # this process only reads checkpoints
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as at_end:
        base = pathlib.Path(scratch)
        runs = Runs(base, args.config, args.steps, args.overrides)
        at_end.callback(stop, runs.started)
        print(f"{args.steps} steps without interruption", flush=True)
        report = Report()
        runs.finish(base / "whole", report)
        if args.pairs:
            runs.finish(base / "whole_two", report, two=True)
        if report.wrong:
            return 1
        done = one_process(runs, base, report, args.kills, args.seed)
        if args.full:
            with small_disk(base / "small"):
                full_disk(runs, base, report, args.full, args.seed)
                done.append(shutil.copytree(base / "small" / "run", base / "from_small_disk"))
        pairs = two_processes(runs, base, report, args.pairs, args.seed) if args.pairs else []
        for run in done + pairs:
            whole = base / ("whole_two" if run in pairs else "whole")
            found = differences(whole, run)
            if losses(run) != losses(whole):
                found.append("losses")
            report.expect(not found, f"{run.name} is not the uninterrupted run: {found[:5]}")
    counts = ", ".join(f"{number} {kind}" for kind, number in report.counts.items())
    print(
        f"{sum(report.counts.values())} faults ({counts}) in {time.monotonic() - began:.0f} s over "
        f"{len(done) + len(pairs)} runs: {len(report.wrong)} problem(s)"
    )
    print("\n".join(report.wrong) or "all runs are bitwise the uninterrupted ones")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
