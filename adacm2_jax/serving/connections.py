"""Connections: how many there may be, and how long one may be silent before its request."""

import asyncio
import json
import resource
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from adacm2_jax.errors import UserError
from adacm2_jax.serving.gate import error_body
from adacm2_jax.serving.limits import Limits

#: Descriptors beside those of connections: decoders, files that are written or read, the system's.
_BESIDE = 256
#: Seconds that requests which are being served get when the server is told to stop.
_GRACE = 10


def config(app: Any, limits: Limits) -> uvicorn.Config:
    """What uvicorn serves with."""
    return uvicorn.Config(
        app,
        http=_protocol(limits),
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE,
        lifespan="off",
    )


def check_descriptors(limits: Limits) -> None:
    """Makes sure that so many connections can be open; raises the soft limit where it may.

    Raises:
      UserError: if the system allows fewer.
    """
    need = limits.connections + _BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or need <= soft:
        return
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UserError(
            f"--connections {limits.connections:,} needs {need:,} open files and the system allows "
            f"{hard:,} (ulimit -n): give at most {max(hard - _BESIDE, 1):,}, or raise it"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """HTTP/1.1 as uvicorn speaks it, for so many at a time, each in its time.

    uvicorn itself waits for ever for a first request, and for the rest of one that has begun.
    """

    class Timed(H11Protocol):
        """Closes a connection whose request's head has not come in ``limits.head_seconds``."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_refusal(503, "too many connections are open; try again later"))
                transport.close()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            """The time runs while no request is being served; what trickles in does not stop it."""
            serving = self.cycle is not None and not self.cycle.response_complete
            if serving or self.transport.is_closing():
                self._stop()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.head_seconds, self._late)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if self.transport.is_closing():
                return
            message = f"no whole request came in {limits.head_seconds:g} s"
            begun = bool(self.conn.trailing_data[0]) and self.conn.their_state is h11.IDLE
            if begun:
                self.transport.write(_refusal(408, message))
            self.transport.close()

    return Timed


def _refusal(status: int, message: str) -> bytes:
    """A whole answer, for who has not asked yet."""
    body = json.dumps(error_body(status, message)).encode()
    name = {408: "Request Timeout", 503: "Service Unavailable"}[status]
    return (
        f"HTTP/1.1 {status} {name}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    ).encode() + body
