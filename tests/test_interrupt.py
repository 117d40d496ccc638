"""Ctrl-C ends every command in one line, while it imports and whoever drops the exception."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from adacm2_jax import interrupt
from tests.small import ROOT

#: A module that never comes to an end, in place of those that take seconds.
SLOW = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
ENTRIES = {
    "train.py": ["train.py"],
    "eval.py": ["eval.py"],
    "quickstart.py": ["quickstart.py"],
    "adacm2 ask": ["-m", "adacm2_jax.commands", *"ask c.mp4 --model m --question q".split()],
    "adacm2 train": ["-m", "adacm2_jax.commands", "train"],
    "adacm2 prepare": ["-m", "adacm2_jax.commands", "prepare"],
    "adacm2 port": ["-m", "adacm2_jax.commands", "port", "import", "--src", "a", "--dst", "b"],
    "port": ["-m", "adacm2_jax.port", "import", "--src", "a", "--dst", "b"],
    "plan": ["-m", "adacm2_jax.plan"],
}
PROGRAM = """
import gc, os, signal, sys, time
from adacm2_jax import interrupt

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)

def in_garbage_collection():
    gc.callbacks.append(lambda phase, _: phase == "start" and not said and ctrl_c())
    gc.collect()
    said.append("dropped")

def in_a_library():
    try:
        ctrl_c()
    except BaseException:
        said.append("dropped")

def as_another_error():
    try:
        ctrl_c()
    except BaseException as error:
        raise ImportError("numpy failed to import") from error

def twice():
    try:
        ctrl_c()
    finally:
        ctrl_c()

said = []
try:
    with interrupt.raised():
        try:
            globals()[sys.argv[1]]()
            time.sleep(60)
        finally:
            print("closed", *said, flush=True)
except KeyboardInterrupt:
    interrupt.say()
    sys.exit(interrupt.STATUS)
"""


def start(*arguments: str, path: os.PathLike) -> subprocess.Popen:
    # A test run in the background of a shell ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_ends_the_imports_of_a_command(entry, tmp_path):
    for name in ("absl", "etils", "jax", "numpy"):
        tmp_path.joinpath(f"{name}.py").write_text(SLOW)
    process = start(*ENTRIES[entry], path=tmp_path)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip("\n")) == (130, "stopped by Ctrl-C")


@pytest.mark.parametrize(
    ("how", "closed"),
    [
        ("in_garbage_collection", "closed dropped\n"),
        ("in_a_library", "closed dropped\n"),
        ("as_another_error", "closed\n"),
        ("twice", ""),
    ],
)
def test_an_interrupt_that_is_dropped_or_translated_ends_the_process(how, closed, tmp_path):
    process = start("-c", PROGRAM, how, path=tmp_path)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors, output) == (130, "stopped by Ctrl-C\n", closed)


def test_errors_and_handlers_stay_what_they_are():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hook = sys.unraisablehook
    try:
        with contextlib.suppress(ZeroDivisionError), interrupt.raised():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            raise ZeroDivisionError
        with pytest.raises(KeyboardInterrupt), interrupt.raised():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert sys.unraisablehook is hook
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_a_shell_or_another_thread_has_decided_stays():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a job in the background
    try:
        interrupt.end_at_once()
        with interrupt.raised():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    thread = threading.Thread(target=interrupt.end_at_once)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
