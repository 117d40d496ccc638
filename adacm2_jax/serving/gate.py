"""Who may come in, and with how much: before a request reaches its handler."""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from adacm2_jax.errors import UserError
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.media import Media
from adacm2_jax.serving.metrics import Metrics

#: Who asks whether the server lives needs no token.
_OPEN = "/health"
#: Where a request's scope has its :class:`Body`.
BODY = "adacm2.body"
_PORT = re.compile(r":\d+$")


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class Gate:
    """Middleware (ASGI): the token, the host's name, sizes and times of bodies, and the count.

    Args:
      app: what comes behind.
      token: that callers must show; "" asks for none.
      hosts: names by which the server may be called, so that a page of another name, which a
        browser was made to take for this machine, is refused; empty takes any.
      limits: of bodies.
      media: where the bytes of all requests are counted.
      metrics: told of every answer.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        token: str,
        hosts: Sequence[str],
        limits: Limits,
        media: Media,
        metrics: Metrics,
    ):
        self._app, self._token, self._hosts = app, token.encode(), set(hosts)
        self._limits, self._media, self._metrics = limits, media, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = [500]

        async def noting(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            if refused := self._refused(scope["path"], headers):
                await self._answer(refused, scope, receive, noting)
                return
            body = scope[BODY] = Body(headers, receive, self._limits, self._media)
            try:
                await self._app(scope, body.receive, noting)
            finally:
                body.close()
        finally:
            route = scope.get("route")
            self._metrics.request(getattr(route, "path", "other"), status[0])

    def _refused(self, path: str, headers: dict[str, bytes]) -> tuple[int, str] | None:
        host = _PORT.sub("", headers.get("host", b"").decode("latin-1").lower())
        if self._hosts and host not in self._hosts:
            return 421, "the server is not called by that name; see --host and --called"
        if self._token and path != _OPEN:
            given = headers.get("authorization", b"")
            scheme, _, shown = given.partition(b" ")
            right = hmac.compare_digest(shown.strip(), self._token)
            if scheme.lower() != b"bearer" or not right:
                return 401, "send the server's token: Authorization: Bearer TOKEN"
        length = headers.get("content-length", b"0")
        if not length.isdigit():
            return 400, "content-length is no number"
        if int(length) > _most(headers, self._limits):
            return 413, _too_large(headers, self._limits)
        return None

    async def _answer(
        self, refused: tuple[int, str], scope: dict[str, Any], receive: Any, send: Any
    ) -> None:
        status, message = refused
        headers = {"connection": "close"}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        response = JSONResponse(error_body(status, message), status, headers)
        await response(scope, receive, send)


class Body:
    """A request's body while it comes: counted, limited, and not awaited for ever."""

    def __init__(self, headers: dict[str, bytes], receive: Any, limits: Limits, media: Media):
        self._receive, self._media, self._headers, self._limits = receive, media, headers, limits
        self._most, self._size = _most(headers, limits), 0
        self._deadline: float | None = None
        self._complete = False

    async def receive(self) -> dict[str, Any]:
        if self._complete:
            return await self._receive()  # waits for the end of the connection
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._limits.receive_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(
                408, f"the body did not come in {self._limits.receive_seconds:g} s"
            ) from None
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            if self._size + more > self._most:
                raise HTTPException(413, _too_large(self._headers, self._limits))
            try:
                self._media.reserve(more)
            except UserError as error:
                raise HTTPException(429, str(error), {"retry-after": "1"}) from None
            self._size += more
            self._complete = not message.get("more_body", False)
        return message

    def hand_over(self, size: int) -> None:
        """So many of its bytes are kept as an upload, and stay reserved when the request ends."""
        self._size -= size

    def close(self) -> None:
        """The request has ended."""
        self._media.release(self._size)


def _most(headers: dict[str, bytes], limits: Limits) -> int:
    kind = headers.get("content-type", b"").split(b";")[0].strip().lower()
    is_file = kind.startswith((b"image/", b"video/", b"multipart/", b"application/octet-stream"))
    return limits.upload_bytes if is_file else limits.request_bytes


def _too_large(headers: dict[str, bytes], limits: Limits) -> str:
    if _most(headers, limits) == limits.request_bytes:
        return (
            f"the request has more than {limits.request_bytes:,} bytes, the limit of one in JSON: "
            "send large files to /v1/files and name them by their id"
        )
    return f"the file has more than {limits.upload_bytes:,} bytes, the limit; send a smaller one"
