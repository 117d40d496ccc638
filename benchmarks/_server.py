"""A real server as a process, for the checks that talk to it."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_START = 600


class Server:
    """``adacm2 serve`` in a process of its own.

    Args:
      model: directory of a run.
      state: directory of its sessions.
      flags: more of the command's flags.
    """

    def __init__(self, model: str, state: Path, *flags: str):
        self._log = (state.parent / f"{state.name}.log").open("ab")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "adacm2_jax.commands", "serve"),
                *("--model", model, "--port", "0", "--state", str(state), *flags),
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdout
        timer = threading.Timer(_START, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line.startswith("serving at "):
            raise SystemExit(f"the server did not start; see {self._log.name}")
        self.port = int(line.rsplit(":", 1)[1].split("/")[0])

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "application/json",
        timeout: float = 600,
    ) -> tuple[int, bytes]:
        """A status and the body."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(line):
            line.request(method, path, body, {} if body is None else {"content-type": kind})
            answer = line.getresponse()
            return answer.status, answer.read()

    def json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The same with JSON both ways."""
        content = None if body is None else json.dumps(body).encode()
        status, answer = self.request(method, path, content)
        return status, json.loads(answer)

    def metrics(self) -> dict[str, float]:
        """What ``/metrics`` tells, by name and labels."""
        _, text = self.request("GET", "/metrics")
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and its end."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit("the server did not stop in 60 s") from None


def resident(pid: int) -> int:
    """Bytes of memory of a process and all below it."""
    total, page = 0, os.sysconf("SC_PAGE_SIZE")
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = entry.read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        waiting += parents.get(each, [])
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * page
    return total


def wait_for(what: str, true: Any, seconds: float = 60) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(0.1)
