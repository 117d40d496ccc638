"""What a server says to mistakes, to full disks and to callers who leave, over HTTP."""

import asyncio
import contextlib
import gc
import json
import resource
import time
from collections.abc import Callable

import fastapi
import pytest

from adacm2_jax.inference.reply import Reply
from adacm2_jax.serving import api, chat
from adacm2_jax.serving.calls import Call
from adacm2_jax.serving.operations import CancelledError, Said
from tests.serving.conftest import LIMITS
from tests.serving.test_api import chat as conversation
from tests.serving.test_api import data, message, picture, video_part
from tests.small import quick_compilation


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def form(content: bytes) -> tuple[bytes, str]:
    """A file as the body of a request, and its type."""
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x"


def test_uploads_fill_all_of_their_room(call):
    """Two of 300,000 bytes fit in 700,000, for one is counted once."""
    size = LIMITS.upload_bytes - 200
    kept = [call("POST", "/v1/files", *form(b"x" * size)) for _ in range(2)]
    assert [status for status, _ in kept] == [200, 200]
    assert f"adacm2_held_bytes {2.0 * size}" in call("GET", "/metrics")[1]
    refused = call("POST", "/v1/files", *form(b"x" * size))
    assert refused[0] == 429 and "of 700,000" in message(refused)
    for _, file in kept:
        assert call("DELETE", f"/v1/files/{file['id']}")[0] == 200
    assert "adacm2_held_bytes 0.0" in call("GET", "/metrics")[1]


@contextlib.contextmanager
def no_room(size: int):
    """No file of this process grows beyond so many bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_without_a_path(call):
    at = f"/v1/sessions/{call('POST', '/v1/sessions', {})[1]['id']}"
    content = b"x" * 100_000
    asked = conversation(video_part(data(content, "video/mp4")))
    with no_room(4000):
        answers = [
            call("POST", "/v1/files", *form(content)),
            call("POST", f"{at}/frames", content, "video/mp4"),
            call("POST", "/v1/chat/completions", asked),
            call("POST", "/v1/chat/completions", asked | {"stream": True}),
            call("POST", f"{at}/save"),
        ]
    assert [answer[0] for answer in answers] == [507] * len(answers)
    told = [message(answer) for answer in answers]
    assert set(told[:-1]) == {
        "the server cannot write to its disk, which may be full; try again later"
    }
    assert told[-1].startswith("the session cannot be saved (File too large)")
    assert "/" not in told[-1]
    assert call("POST", f"{at}/save")[0] == 200
    assert call("DELETE", at)[0] == 200
    assert "adacm2_held_bytes 0.0" in call("GET", "/metrics")[1]


def test_a_mistake_is_answered_by_what_to_send(call):
    for body, kind, words in (
        (b"{}", "text/plain", "send the header Content-Type: application/json"),
        (b"", "application/json", "send a JSON object, {} at least"),
    ):
        answer = call("POST", "/v1/sessions", body, kind)
        assert answer[0] == 400 and words in message(answer)
    for path in ("/", "/v1", "/v1/nothing"):
        answer = call("GET", path)
        assert answer[0] == 404
        assert f"nothing at {path}; paths are /v1/chat/completions, /v1/models" in message(answer)
    at = f"/v1/sessions/{call('POST', '/v1/sessions', {})[1]['id']}"
    answer = call("POST", f"{at}/ask", {"questions": ["a"]})
    assert answer[0] == 400 and "no such field; fields are question, temp" in message(answer)
    answer = call("POST", f"{at}/frames", b"\0\0\0 ftypisom" + b"x" * 99, "image/jpeg")
    assert answer[0] == 422
    assert (
        message(answer) == "the picture: is no picture; give JPEG, PNG or WebP, and a video as one"
    )
    assert call("POST", f"{at}/frames", picture(), "image/jpeg")[1]["seen"] == 1
    call("DELETE", at)


# --- A stream, without a model -----------------------------------------------------------------


class Waits:
    """The part of a server that a stream needs: it runs its work in a thread."""

    async def run(self, call, work, *args):
        try:
            return await asyncio.to_thread(work, call, *args)
        except asyncio.CancelledError:
            call.leave()
            raise


def request(left: asyncio.Event) -> fastapi.Request:
    """One whose caller leaves when the event is set."""

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    return fastapi.Request({"type": "http"}, receive)


def until_given_up(call: Call, on_text: Callable[[str], None], *texts: str) -> Said:
    """Writes texts, and then nothing until its caller has gone."""
    for text in texts:
        on_text(text)
    deadline = time.monotonic() + 20
    while not call.gone:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    raise CancelledError("the request has been given up")


def test_a_stream_whose_caller_leaves_before_the_first_text_is_given_up():
    async def main():
        left = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, left.set)
        pieces = chat.Pieces("small", None, False)
        with pytest.raises(CancelledError):
            await asyncio.wait_for(
                api._streamed(Waits(), request(left), until_given_up, pieces), 10
            )

    asyncio.run(main())


def test_nothing_is_logged_of_a_stream_that_was_given_up(caplog):
    async def main():
        def work(call, on_text):
            return until_given_up(call, on_text, "a")

        response = await api._streamed(
            Waits(), request(asyncio.Event()), work, chat.Pieces("small", None, False)
        )
        events = response.body_iterator
        assert '"role"' in await anext(events) and '"a"' in await anext(events)
        await events.aclose()
        await asyncio.sleep(0.5)  # the thread notices
        del response, events
        gc.collect()

    asyncio.run(main())
    assert not caplog.messages


def test_a_stream_never_sends_what_is_no_json(caplog):
    reply = Reply(
        video="",
        question="why?",
        answer="a",
        score=float("nan"),
        n_best=(),
        policy="open",
        frames=1,
        kept_tokens=1,
        total_tokens=1,
        moments=(),
    )

    async def main():
        def work(call, on_text):
            on_text("a")
            return Said(reply, "stop", 1, 1)

        response = await api._streamed(
            Waits(), request(asyncio.Event()), work, chat.Pieces("small", None, False)
        )
        return [event async for event in response.body_iterator]

    def refuse(constant):
        raise AssertionError(constant)

    events = [
        json.loads(event.removeprefix("data: "), parse_constant=refuse)
        for event in asyncio.run(main())
    ]
    assert events[-1]["error"]["code"] == 500 and "an answer failed" in caplog.messages
