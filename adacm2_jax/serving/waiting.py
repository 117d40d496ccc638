"""How a request waits: in a thread, as long as whoever sent it is there."""

import asyncio
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import fastapi

from adacm2_jax.serving.calls import Call, Service
from adacm2_jax.serving.limits import BusyError
from adacm2_jax.serving.media import Media as Files
from adacm2_jax.serving.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Server:
    """What the routes need.

    Attributes:
      name: of the model.
      created: seconds since 1970.
      service: that computes.
      files: that requests bring.
      metrics: of the server.
      threads: in which requests wait.
      room: a place for each request that may be in a thread.
    """

    name: str
    created: int
    service: Service
    files: Files
    metrics: Metrics
    threads: concurrent.futures.ThreadPoolExecutor
    room: threading.Semaphore

    async def run(self, call: Call, work: Callable[..., Any], *args: Any) -> Any:
        """Does it in a thread; if the caller goes away, it ends soon.

        Raises:
          BusyError: if as many requests as may wait are waiting.
        """
        if not self.room.acquire(blocking=False):
            most = self.service.limits.waiting
            raise BusyError(
                f"{most} requests wait, which is the limit (--waiting); try again later"
            )
        try:
            return await self._thread(work, call, *args)
        except asyncio.CancelledError:
            call.leave()
            raise

    async def run_while_connected(
        self, request: fastapi.Request, work: Callable[..., Any], *args: Any
    ) -> Any:
        """As :meth:`run`, and looks whether the caller is still there."""
        call = Call()
        task = asyncio.ensure_future(self.run(call, work, *args))
        watcher = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                call.leave()
            return await task
        finally:
            watcher.cancel()

    def _thread(self, work: Callable[..., Any], *args: Any) -> Any:
        def leave_room() -> Any:
            try:
                return work(*args)
            finally:
                self.room.release()

        return asyncio.get_running_loop().run_in_executor(self.threads, leave_room)


async def gone(request: fastapi.Request) -> None:
    """Returns when whoever sent the request has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.5)
