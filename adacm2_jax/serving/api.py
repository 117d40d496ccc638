"""The server's routes. Each handler names what is to be done; ``calls.py`` does it in a thread."""

import asyncio
import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from adacm2_jax import __version__
from adacm2_jax.errors import DataError, UserError, printable
from adacm2_jax.serving import chat
from adacm2_jax.serving.calls import Call, check_question
from adacm2_jax.serving.decoders import Media
from adacm2_jax.serving.gate import BODY, error_body
from adacm2_jax.serving.limits import BusyError, LargeError, MissingError, StorageError
from adacm2_jax.serving.media import Upload
from adacm2_jax.serving.operations import CancelledError, Said, Wish
from adacm2_jax.serving.schemas import AskRequest, ChatRequest, FramesRequest, SessionRequest
from adacm2_jax.serving.waiting import Server, gone

_log = logging.getLogger(__name__)
_STATUS = (
    (BusyError, 429),
    (MissingError, 404),
    (LargeError, 413),
    (StorageError, 507),
    (DataError, 422),
)
#: Of an OSError: there is no room, or none for this user, or nothing may be written.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_FAULT = "the server failed; its log says why"
_NO_ROOM = "the server cannot write to its disk, which may be full; try again later"
_PATHS = (
    "/v1/chat/completions, /v1/models, /v1/files, /v1/sessions, /health, /metrics, /openapi.json"
)
_PICTURE_TYPES = ("image/jpeg", "image/png", "image/webp")


def build(server: Server) -> fastapi.FastAPI:
    """The application, without the gate before it."""
    app = fastapi.FastAPI(
        title="adacm2",
        version=__version__,
        description="Questions about long videos, with a visual memory of constant size.",
        docs_url=None,  # they have a browser fetch scripts from elsewhere
        redoc_url=None,
    )
    app.state.server = server
    app.include_router(_openai(server))
    app.include_router(_sessions(server))
    _errors(app)

    @app.get("/health")
    async def health() -> Response:
        """200 while the server can answer, else 503."""
        alive = server.service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, in Prometheus's format."""
        content, kind = server.metrics.text()
        return Response(content, media_type=kind)

    return app


def _openai(server: Server) -> fastapi.APIRouter:
    """Routes that OpenAI's clients call."""
    router = fastapi.APIRouter(prefix="/v1", tags=["openai"])
    service, files = server.service, server.files

    def described() -> dict[str, Any]:
        return {
            "id": server.name,
            "object": "model",
            "created": server.created,
            "owned_by": "adacm2",
        }

    @router.get("/models")
    async def models() -> Any:
        """The one model."""
        return {"object": "list", "data": [described()]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> Any:
        """The model, if it is called so."""
        _check_model(server, name)
        return described()

    @router.post("/chat/completions")
    async def completions(body: ChatRequest, request: fastapi.Request) -> Any:
        """Answers a question about a video, pictures, or what a session has seen."""
        _check_model(server, body.model)
        work = functools.partial(_chat, server, body)
        if not body.stream:
            said = await server.run_while_connected(request, work, lambda _: None)
            return chat.completion(said, server.name, body.session)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await _streamed(server, request, work, chat.Pieces(server.name, body.session, usage))

    @router.post("/files")
    async def upload(request: fastapi.Request) -> Any:
        """Keeps a file for later requests: multipart, fields ``file`` and ``purpose``."""
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get("file")
            if file is None or isinstance(file, str):
                raise UserError("the form has no file in its field file; send one")
            size = 0
            with files.new_file() as path:
                with path.open("wb") as target:
                    while piece := await file.read(1 << 20):
                        await asyncio.to_thread(target.write, piece)
                        size += len(piece)
                if not size:
                    raise UserError("the file is empty; send its bytes")
                kept = files.keep(path, file.filename or "", size)
                request.scope[BODY].hand_over(size)  # whose bytes have been counted as they came
                return _file(kept)

    @router.get("/files")
    async def uploads() -> Any:
        """Files that are kept, all on one page: OpenAI's client asks for more until it is told."""
        kept = [_file(each) for each in files.uploads()]
        return {"object": "list", "data": kept, "has_more": False}

    @router.get("/files/{name}")
    async def one_upload(name: str) -> Any:
        """One of them."""
        return _file(files.upload(name))

    @router.delete("/files/{name}")
    async def delete_upload(name: str) -> Any:
        """Forgets one."""
        files.delete(name)
        return {"id": name, "object": "file", "deleted": True}

    del models, model, completions, upload, uploads, one_upload, delete_upload, service
    return router


def _sessions(server: Server) -> fastapi.APIRouter:
    """Routes of sessions: streams that may be asked at any moment."""
    router = fastapi.APIRouter(prefix="/v1/sessions", tags=["sessions"])
    service = server.service

    @router.post("")
    async def open_session(body: SessionRequest) -> Any:
        """Opens a session."""
        if len(body.questions) > service.limits.questions:
            raise UserError(
                f"{len(body.questions)} questions are known, the limit is "
                f"{service.limits.questions}; ask the others late"
            )
        for question in body.questions:
            check_question(question)
        if len(set(body.questions)) < len(body.questions):
            raise UserError("one of the questions stands twice; give each once")

        made = body.questions, body.seconds_per_frame, body.open_tokens
        return await server.run(Call(), service.open, *made)

    @router.get("")
    async def list_sessions() -> Any:
        """All sessions, oldest first."""

        def act(table: Any, _: Any) -> Any:
            return {"object": "list", "data": [entry.describe() for entry in table.named()]}

        return await server.run(Call(), service.on_table, act)

    @router.get("/{name}")
    async def show_session(name: str) -> Any:
        """One session, as it is now."""

        def act(table: Any, _: Any) -> Any:
            return table.get(name).describe()

        return await server.run(Call(), service.on_table, act)

    @router.delete("/{name}")
    async def close_session(name: str) -> Any:
        """Forgets a session, also on disk."""

        def act(table: Any, entry: Any) -> Any:
            table.close(entry)
            return {"id": name, "object": "session", "deleted": True}

        return await server.run(Call(), service.on_session, name, act)

    @router.post("/{name}/fork")
    async def fork_session(name: str) -> Any:
        """Another session with the same past."""

        def act(table: Any, entry: Any) -> Any:
            return table.fork(entry).describe()

        return await server.run(Call(), service.on_session, name, act)

    @router.post("/{name}/save")
    async def save_session(name: str) -> Any:
        """Writes the session to disk now."""

        def act(table: Any, entry: Any) -> Any:
            table.save(entry)
            return entry.describe()

        return await server.run(Call(), service.on_session, name, act)

    @router.post("/{name}/frames")
    async def push(
        name: str, request: fastapi.Request, start: float | None = None, end: float | None = None
    ) -> Any:
        """Frames: addresses in JSON, or the bytes of one picture or video as the body.

        The body's type says which: ``application/json``, ``image/…`` or ``video/…``.
        """
        with contextlib.ExitStack() as stack:
            media = await _frames(server, name, request, stack, start, end)
            seen = await server.run_while_connected(request, service.push, name, media)
        return {"id": name, "object": "session.frames", "seen": seen}

    @router.post("/{name}/ask")
    async def ask(name: str, body: AskRequest, request: fastapi.Request) -> Any:
        """Answers now, with what the answer rests on; the stream goes on."""
        longest = service.engine.longest
        wish = Wish(
            question=body.question,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed % 2**31,
            max_tokens=min(body.max_tokens or longest, longest),
            moments=body.moments,
        )
        said = await server.run_while_connected(request, service.ask, name, wish, lambda _: None)
        question, answer = said.reply.question, said.reply.answer
        return {"question": question, "answer": answer} | chat.evidence(said, name)

    del open_session, list_sessions, show_session, close_session, fork_session, save_session
    del push, ask
    return router


# --- Pieces of handlers ------------------------------------------------------------------------


def _chat(server: Server, body: ChatRequest, call: Call, on_text: Callable[[str], None]) -> Said:
    """One conversation, from its media to the last token."""
    service = server.service
    with contextlib.ExitStack() as stack:
        longest, most = service.engine.longest, service.limits.frames
        read = chat.read_chat(body, server.files, stack, longest, most)
        if body.session:
            return service.ask(call, body.session, read.wish, on_text)
        return service.answer(call, read.media, read.wish, 1 / body.fps, on_text)


async def _streamed(
    server: Server, request: fastapi.Request, work: Callable[..., Said], pieces: chat.Pieces
) -> Response:
    """The answer as it is written. What fails before the first text is an error with its status."""
    call, loop = Call(), asyncio.get_running_loop()
    texts: asyncio.Queue = asyncio.Queue()

    def on_text(text: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(texts.put_nowait, text)

    def ended(task: asyncio.Future) -> None:
        texts.put_nowait(None)
        error = None if task.cancelled() else task.exception()
        if call.gone and error is not None and not isinstance(error, UserError):
            _log.error("a request that was given up failed", exc_info=error)

    task = asyncio.ensure_future(server.run(call, work, on_text))
    task.add_done_callback(ended)
    # From the first text on the response itself notices that the caller has left.
    watcher = asyncio.ensure_future(gone(request))
    watcher.add_done_callback(lambda it: None if it.cancelled() else call.leave())
    try:
        first = await texts.get()
        if first is None:
            await task  # raises what went wrong; an empty answer goes on
    except BaseException:
        call.leave()
        raise
    finally:
        watcher.cancel()

    async def events() -> AsyncIterator[str]:
        try:
            yield pieces.first()
            text = first
            while text is not None:
                yield pieces.text(text)
                text = await texts.get()
            try:
                yield pieces.last(await task)
            except UserError as error:
                yield chat.line(error_body(500, str(error)))
            except Exception as error:
                _log.error("an answer failed", exc_info=error)
                yield chat.line(error_body(500, _FAULT))
        finally:
            call.leave()

    return StreamingResponse(events(), media_type="text/event-stream")


async def _frames(
    server: Server,
    name: str,
    request: fastapi.Request,
    stack: contextlib.ExitStack,
    start: float | None,
    end: float | None,
) -> Media:
    """The media that a body brings or names."""

    def spacing(table: Any, _: Any) -> float:
        return table.get(name).seconds_per_frame

    seconds = await server.run(Call(), server.service.on_table, spacing)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind in _PICTURE_TYPES or kind.startswith("video/"):
        path = stack.enter_context(server.files.new_file())
        with path.open("wb") as target:
            async for piece in request.stream():
                await asyncio.to_thread(target.write, piece)
        if kind in _PICTURE_TYPES:
            return Media("pictures", (str(path),), "the picture")
        return Media("video", (str(path),), "the video", 1 / seconds, start, end)
    if kind != "application/json":
        raise HTTPException(
            415,
            "the body's Content-Type is none that is taken; send application/json, "
            f"{', '.join(_PICTURE_TYPES)}, or a video's, such as video/mp4",
        )
    try:
        body = FramesRequest.model_validate_json(await request.body())
    except pydantic.ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    if (body.frames is None) == (body.video is None):
        raise UserError("give frames (pictures) or video, one of both")
    if body.video is not None:
        named = await asyncio.to_thread(server.files.resolve, body.video, stack, "video")
        return Media("video", (named,), "video", 1 / seconds, body.start, body.end)
    assert body.frames is not None
    if not body.frames:
        raise UserError("frames are empty; send at least one")
    if len(body.frames) > server.service.limits.frames:
        raise LargeError(f"the request has more than {server.service.limits.frames:,} frames")

    def resolve() -> tuple[str, ...]:
        assert body.frames is not None
        return tuple(
            server.files.resolve(address, stack, f"frames[{number}]")
            for number, address in enumerate(body.frames)
        )

    return Media("pictures", await asyncio.to_thread(resolve), "one of the frames")


def _check_model(server: Server, name: str) -> None:
    if name != server.name:
        raise MissingError(f"the model {printable(name[:60])!r} is not here, but {server.name!r}")


def _file(upload: Upload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "object": "file",
        "bytes": upload.size,
        "created_at": int(upload.created),
        "filename": upload.name,
        "purpose": "user_data",
        "status": "processed",
    }


def _errors(app: fastapi.FastAPI) -> None:
    """Every error as OpenAI's API writes it."""

    @app.exception_handler(UserError)
    async def user(_: fastapi.Request, error: UserError) -> Response:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 400)
        if isinstance(error, CancelledError):
            status = 499
        headers = {"retry-after": "1"} if status == 429 else None
        return JSONResponse(error_body(status, str(error)), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: fastapi.Request, error: RequestValidationError) -> Response:
        return JSONResponse(error_body(400, _first_fault(request, error.errors())), 400)

    @app.exception_handler(HTTPException)
    async def http(request: fastapi.Request, error: HTTPException) -> Response:
        told = str(error.detail)
        if error.status_code == 404:
            told = f"there is nothing at {printable(request.url.path[:60])}; paths are {_PATHS}"
        body = error_body(error.status_code, told)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(OSError)
    async def disk(request: fastapi.Request, error: OSError) -> Response:
        if error.errno not in _FULL:
            return await fault(request, error)
        _log.error("a request failed: %s", error)
        return JSONResponse(error_body(507, _NO_ROOM), 507)

    @app.exception_handler(Exception)
    async def fault(_: fastapi.Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return JSONResponse(error_body(500, _FAULT), 500)

    del user, invalid, http, disk


def _first_fault(request: fastapi.Request, faults: Any) -> str:
    """What is wrong with a body, in one line, and what to send."""
    first = faults[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    told = first["msg"]
    if not place and first["type"] == "missing":
        told = "is empty; send a JSON object, {} at least"
    elif not place and "json" not in request.headers.get("content-type", ""):
        told = "is not taken for JSON; send the header Content-Type: application/json"
    elif first["type"] == "extra_forbidden":
        kinds: dict[str, type[pydantic.BaseModel]] = {"ask": AskRequest, "frames": FramesRequest}
        fields = kinds.get(request.url.path.rpartition("/")[2], SessionRequest).model_fields
        told = f"there is no such field; fields are {', '.join(fields)}"
    return printable(f"{place or 'the body'}: {told}"[:300])
