"""Puts a server together, and runs it until it is told to stop."""

import concurrent.futures
import contextlib
import dataclasses
import ipaddress
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from typing import Any

from adacm2_jax.errors import UserError, printable, reason
from adacm2_jax.inference.session import SessionModel
from adacm2_jax.progress import compiling
from adacm2_jax.serving import api
from adacm2_jax.serving.calls import Service
from adacm2_jax.serving.decoders import Decoders
from adacm2_jax.serving.engine import Engine
from adacm2_jax.serving.gate import Gate
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.media import Media
from adacm2_jax.serving.metrics import Metrics
from adacm2_jax.serving.table import Table
from adacm2_jax.serving.waiting import Server

#: By which a server on this machine alone may be called.
_HERE = ("127.0.0.1", "localhost", "[::1]")
#: Tokens that questions are padded to at least.
_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """Where a server listens, and to whom.

    Attributes:
      host, port: to listen at; port 0 takes one that is free.
      names: by which it may be called besides ``host``.
      token: that callers must show; "" asks for none.
      allowed: directories whose files may be named.
      state: directory of saved sessions and uploads.
      model_name: as callers know it.
    """

    host: str
    port: int
    names: tuple[str, ...]
    token: str
    allowed: tuple[str, ...]
    state: pathlib.Path
    model_name: str

    def check(self) -> None:
        """Refuses what would let anybody in.

        Raises:
          UserError: for a host that others reach, without a token.
        """
        if not _is_here(self.host) and not self.token:
            raise UserError(
                f"--host {printable(self.host)} may be reached from other machines: set a token "
                "in ADACM2_TOKEN or --token-file, or listen on 127.0.0.1"
            )


def _is_here(host: str) -> bool:
    """Whether nobody on another machine can reach it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def make(model: SessionModel, options: Options, limits: Limits) -> tuple[Any, Engine, Decoders]:
    """The application, and what is to be stopped after it. Compiles before it returns.

    Raises:
      UserError: for a directory or a model that cannot be used.
    """
    metrics = Metrics()
    # Of one shape are all questions of usual length: one program reads them side by side.
    model = dataclasses.replace(model, narrowest=min(_WIDTH, model.config.max_text_len))
    files = Media(options.state, options.allowed, limits)
    engine = Engine(
        model, limits, lambda: Table(model, limits, options.state / "sessions"), metrics.watch
    )
    with compiling("what every request needs"):
        engine.start()
    decoders = Decoders(
        limits,
        model.config.vision.image_size,
        model.chunk,
        model.resize,
        model.on_truncated,
    )
    _show(metrics, engine, files, limits)
    server = Server(
        name=options.model_name,
        created=int(time.time()),
        service=Service(engine, decoders, limits),
        files=files,
        metrics=metrics,
        threads=concurrent.futures.ThreadPoolExecutor(limits.waiting, "request"),
        room=threading.BoundedSemaphore(limits.waiting),
    )
    hosts = () if options.host in ("0.0.0.0", "::") else (*_HERE, options.host)
    app = Gate(
        api.build(server),
        token=options.token,
        hosts=[*hosts, *options.names] if hosts or options.names else (),
        limits=limits,
        media=files,
        metrics=metrics,
    )
    return app, engine, decoders


def run(app: Any, engine: Engine, decoders: Decoders, bound: socket.socket, limits: Limits) -> None:
    """Serves until SIGTERM or Ctrl-C; then every session is saved, whatever else is pressed."""
    import uvicorn

    from adacm2_jax.serving import connections

    saving = pressed = False

    def stop(number: int, _: Any) -> None:
        # uvicorn ends in peace at a signal and then raises it again, which would end this process
        # before the sessions are saved.
        nonlocal pressed
        running.should_exit = True  # it may have come before uvicorn looked
        if saving:
            print("sessions are being saved; wait for the end", file=sys.stderr, flush=True)
        pressed |= number == signal.SIGINT

    running = uvicorn.Server(connections.config(app, limits))
    engine.on_end = lambda: setattr(running, "should_exit", True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        bound.listen(128)  # from here on callers are kept waiting, not sent away
        _announce(bound)
        if engine.alive:
            running.run(sockets=[bound])
    finally:
        saving = True
        decoders.close()
        engine.stop()
        print(_farewell(engine.unsaved), file=sys.stderr, flush=True)
        for number, handler in before.items():
            signal.signal(number, handler)
    if engine.failed is not None:
        why = reason(engine.failed)
        raise UserError(f"the engine has ended ({why}); the log above says where: start it again")
    if pressed:
        signal.raise_signal(signal.SIGINT)  # ends the command as Ctrl-C ends every other


def _farewell(unsaved: list[str]) -> str:
    """The last line: which sessions are not as they were left."""
    if not unsaved:
        return "stopped; sessions are saved"
    return f"stopped; {len(unsaved)} sessions are NOT saved: {', '.join(unsaved)}"


def _announce(bound: socket.socket) -> None:
    """Says where it listens."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{port}/v1", flush=True)


def _show(metrics: Metrics, engine: Engine, files: Media, limits: Limits) -> None:
    """What is looked up when somebody looks."""
    table = engine.table
    for name, text, value in (
        ("session_bytes", "Bytes of the sessions on the device", lambda: table.on_device),
        ("session_bytes_most", "The most that it has been", lambda: table.most),
        ("session_bytes_budget", "What it never exceeds", lambda: limits.session_bytes),
        ("sessions", "Sessions that are open, on the device or on disk", lambda: len(table)),
        ("sessions_put_away", "How often one went to disk", lambda: table.evicted),
        ("sessions_resumed", "How often one came back", lambda: table.resumed),
        ("waiting", "Requests that wait for the device", lambda: engine.waiting),
        ("held_bytes", "Bytes of bodies and uploads", lambda: files.held),
        ("resident_bytes", "Memory of the server's process", _resident),
    ):
        metrics.show(name, text, value)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
