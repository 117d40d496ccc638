"""The server over HTTP, in this process: what callers send, and what they get."""

import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import time

import jax
import numpy as np
import PIL.Image
import pytest

from adacm2_jax.inference.session import push_together
from tests.serving.conftest import LIMITS, TOKEN
from tests.small import QUESTION, quick_compilation


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def picture(seed: int = 0, size: int = 40, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    target = io.BytesIO()
    PIL.Image.fromarray(pixels).save(target, kind)
    return target.getvalue()


def data(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video_part(address: str) -> dict:
    return {"type": "video_url", "video_url": {"url": address}}


def chat(*parts, question=QUESTION, **more) -> dict:
    content = [*parts, {"type": "text", "text": question}]
    return {"model": "small", "messages": [{"role": "user", "content": content}]} | more


def message(answer) -> str:
    status, body = answer
    assert status >= 400 and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    return body["error"]["message"]


def test_a_video_is_answered_as_in_python(call, loaded, clips):
    session = loaded.session(QUESTION)
    session.push(clips / "clip.mp4")
    expected = session.ask(QUESTION)
    assert expected.answer == loaded.ask(clips / "clip.mp4", QUESTION).answer
    content = (clips / "clip.mp4").read_bytes()
    status, uploaded = call(
        "POST",
        "/v1/files",
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="clip.mp4"\r\n\r\n'
        + content
        + b"\r\n--x--\r\n",
        "multipart/form-data; boundary=x",
    )
    assert status == 200 and uploaded["bytes"] == len(content)
    for part in (
        video_part(f"file://{clips}/clip.mp4"),
        video_part(data(content, "video/mp4")),
        {"type": "file", "file": {"file_id": uploaded["id"]}},
    ):
        status, answer = call("POST", "/v1/chat/completions", chat(part))
        assert status == 200, answer
        choice, evidence = answer["choices"][0], answer["adacm2"]
        assert choice["message"]["content"] == expected.answer
        assert choice["finish_reason"] in ("stop", "length") and answer["model"] == "small"
        assert evidence["frames"] == expected.frames == 12
        assert evidence["kept_tokens"] == expected.kept_tokens
        assert evidence["moments"] == [
            {"time": moment.time, "tokens": moment.tokens, "score": pytest.approx(moment.score)}
            for moment in expected.moments
        ]
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    listed = call("GET", "/v1/files")[1]
    assert [file["id"] for file in listed["data"]] == [uploaded["id"]]
    assert listed["has_more"] is False  # without it OpenAI's client asks for the next page for ever
    assert call("GET", f"/v1/files/{uploaded['id']}")[1]["filename"] == "clip.mp4"
    assert call("DELETE", f"/v1/files/{uploaded['id']}")[0] == 200
    assert "no such upload" in message(call("GET", f"/v1/files/{uploaded['id']}"))


def test_pieces_are_the_answer(call, clips):
    asked = chat(video_part(f"file://{clips}/clip.mp4"))
    whole = call("POST", "/v1/chat/completions", asked)[1]["choices"][0]["message"]["content"]
    status, text = call(
        "POST",
        "/v1/chat/completions",
        asked | {"stream": True, "stream_options": {"include_usage": True}},
    )
    lines = text.strip().split("\n\n")
    assert status == 200 and lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0] for event in events[:-1]]
    assert deltas[0]["delta"]["role"] == "assistant" and deltas[-1]["finish_reason"]
    assert "".join(each["delta"].get("content", "") for each in deltas) == whole
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] > 0


def test_pictures_are_frames_of_one_stream(call, loaded):
    parts = [{"type": "image_url", "image_url": {"url": data(picture(seed))}} for seed in range(5)]
    status, answer = call("POST", "/v1/chat/completions", chat(*parts, fps=2))
    assert status == 200 and answer["adacm2"]["frames"] == 5
    session = loaded.session(QUESTION, seconds_per_frame=0.5)
    for seed in range(5):
        session.push(np.asarray(PIL.Image.open(io.BytesIO(picture(seed)))))
    assert answer["choices"][0]["message"]["content"] == session.ask(QUESTION).answer


def test_a_session_from_beginning_to_end(call, loaded, clips):
    status, opened = call("POST", "/v1/sessions", {"questions": [QUESTION]})
    assert status == 200 and opened["seen"] == 0 and opened["bytes"] > 0
    at = f"/v1/sessions/{opened['id']}"
    assert call("POST", f"{at}/frames", picture(0), "image/png")[1]["seen"] == 1
    status, pushed = call("POST", f"{at}/frames", {"frames": [data(picture(1)), data(picture(2))]})
    assert (status, pushed["seen"]) == (200, 3)
    content = (clips / "clip.mp4").read_bytes()
    assert call("POST", f"{at}/frames?end=6", content, "video/mp4")[1]["seen"] == 9
    status, pushed = call(
        "POST", f"{at}/frames", {"video": f"file://{clips}/clip.mp4", "start": 6, "end": 12}
    )
    assert (status, pushed["seen"]) == (200, 15)

    session = loaded.session(QUESTION)
    for seed in range(3):
        session.push(np.asarray(PIL.Image.open(io.BytesIO(picture(seed)))))
    session.push(clips / "clip.mp4")
    for question in (None, "why?"):
        expected = session.ask(question or QUESTION)
        status, said = call("POST", f"{at}/ask", {"question": question, "moments": 2})
        assert status == 200 and said["answer"] == expected.answer, question
        assert said["policy"] == expected.policy and said["frames"] == 15
        assert len(said["moments"]) <= 2
    asked = {"model": "small", "session": opened["id"]} | {
        "messages": [{"role": "user", "content": "why?"}]
    }
    status, answer = call("POST", "/v1/chat/completions", asked)
    assert answer["choices"][0]["message"]["content"] == session.ask("why?").answer
    assert answer["adacm2"]["session"] == opened["id"]

    shown = call("GET", at)[1]
    assert (shown["seen"], shown["kept"], shown["bound"]) == (15, session.kept, session.bound)
    assert shown["bytes"] == session.size
    fork = call("POST", f"{at}/fork")[1]
    assert fork["seen"] == 15 and fork["id"] != opened["id"]
    call("POST", f"/v1/sessions/{fork['id']}/frames", picture(3), "image/png")
    assert call("GET", at)[1]["seen"] == 15
    assert call("POST", f"{at}/save")[1]["saved"] == 15
    names = {entry["id"] for entry in call("GET", "/v1/sessions")[1]["data"]}
    assert {opened["id"], fork["id"]} <= names
    assert call("DELETE", at)[1]["deleted"] is True
    assert "no such session" in message(call("POST", f"{at}/ask", {}))
    assert "no such session" in message(call("POST", f"{at}/frames", picture(0), "image/png"))


def test_one_program_reads_sessions_whatever_their_age(loaded, caplog):
    """One that has just begun beside one that has seen frames is no other kind of argument."""
    old, new, newest = (loaded.session(QUESTION) for _ in range(3))
    size = old.model.config.vision.image_size
    pictures = np.zeros((1, size, size, 3), np.uint8)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for together in ([old], [old], [old, new], [new, newest], [newest]):
            push_together(together, [pictures] * len(together), 2)
    compiled = [line for line in caplog.messages if "XLA compilation of jit(push_rows)" in line]
    assert len(compiled) == 1 and (old.seen, new.seen, newest.seen) == (3, 2, 2)


@pytest.mark.parametrize(
    ("status", "change", "words"),
    [
        (404, {"model": "other"}, "'other' is not here"),
        (400, {"model": None}, "model:"),
        (400, {"messages": []}, "messages:"),
        (400, {"messages": [{"role": "user", "content": "a"}]}, "no message holds a video"),
        (400, {"messages": [{"role": "assistant", "content": "a"}]}, "end with the user's"),
        (400, {"messages": [{"role": "king", "content": "a"}]}, "role"),
        (400, {"n": 2}, "n is 2"),
        (400, {"logprobs": True}, "logprobs"),
        (400, {"temperature": -1}, "temperature"),
        (400, {"temperature": "NaN"}, "temperature"),
        (400, {"top_p": 0}, "top_p"),
        (400, {"max_tokens": 0}, "max_tokens"),
        (400, {"max_tokens": True}, "max_tokens"),
        (400, {"n": True}, "n:"),
        (400, {"fps": 0}, "fps"),
        (400, {"session": "s-0123456789abcdef"}, "names a session and brings media"),
    ],
)
def test_a_conversation_that_cannot_be_had_says_why(call, clips, status, change, words):
    asked = chat(video_part(f"file://{clips}/clip.mp4")) | change
    answer = call("POST", "/v1/chat/completions", asked)
    assert words in message(answer) and answer[0] == status


def test_media_that_cannot_be_read_say_why(call, clips):
    for part, status, words in (
        (video_part(f"file://{clips}/text.mp4"), 422, "not a video"),
        (video_part(f"file://{clips}/none.mp4"), 400, "no video file below"),
        (video_part("http://127.0.0.1/a.mp4"), 400, "nothing is fetched"),
        ({"type": "image_url", "image_url": data(b"GIF89a")}, 422, "no picture"),
        ({"type": "image_url"}, 400, "names nothing"),
    ):
        answer = call("POST", "/v1/chat/completions", chat(part))
        told = message(answer)
        assert answer[0] == status and words in told and str(clips) not in told, part
    asked = chat(video_part(f"file://{clips}/clip.mp4"))
    for change, status, words in (
        ({"fps": 10}, 422, "120 frames at 10 a second, the limit is 50"),
        ({"start": 99}, 422, "99"),
    ):
        answer = call("POST", "/v1/chat/completions", asked | change)
        assert answer[0] == status and words in message(answer)
    answer = call(
        "POST", "/v1/chat/completions", chat(asked["messages"][0]["content"][0], question=" ")
    )
    assert answer[0] == 400 and "question is empty" in message(answer)
    long = call(
        "POST",
        "/v1/chat/completions",
        asked
        | {"stream": True}
        | chat(video_part(f"file://{clips}/clip.mp4"), question="word " * 99),
    )
    assert long[0] == 400 and "the limit is 24" in message(long)


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "JSON"),
        (b"[" * 20_000, "application/json", 400, ""),
        (b"\xff\xfe", "application/json", 400, ""),
        (b'{"frames": [], "video": null}', "application/json", 400, "empty"),
        (b'{"video": "a", "frames": ["a"]}', "application/json", 400, "one of both"),
        (b'{"cat": 1}', "application/json", 400, "cat"),
        (b"hello", "text/plain", 415, "application/json, image/jpeg, image/png, image/webp, or"),
        (b"hello", "image/png", 422, "no picture"),
        (b"", "image/png", 422, "no picture"),
        (b"", "video/mp4", 422, "empty"),
    ],
)
def test_frames_that_are_none_are_refused(call, body, kind, status, words):
    name = call("POST", "/v1/sessions", {})[1]["id"]
    answer = call("POST", f"/v1/sessions/{name}/frames", body, kind)
    assert answer[0] == status and words in message(answer)
    assert call("DELETE", f"/v1/sessions/{name}")[0] == 200


def test_sessions_that_cannot_be_opened_say_why(call):
    for body, words in (
        ({"questions": [f"{n}?" for n in range(9)]}, "the limit is 8"),
        ({"questions": ["a", "a"]}, "twice"),
        ({"questions": [" "]}, "empty"),
        ({"questions": ["word " * 99]}, "the limit is 24"),
        ({"seconds_per_frame": 0}, "seconds_per_frame"),
        ({"open_tokens": -1}, "open_tokens"),
        (
            {"question": ["a"]},
            "no such field; fields are questions, seconds_per_frame",
        ),
    ):
        answer = call("POST", "/v1/sessions", body)
        assert answer[0] == 400 and words in message(answer)
    name = call("POST", "/v1/sessions", {"questions": [QUESTION]})[1]["id"]
    assert "seen no frame" in message(call("POST", f"/v1/sessions/{name}/ask", {}))
    call("DELETE", f"/v1/sessions/{name}")


def test_nobody_comes_in_without_the_token_or_by_another_name(call):
    assert call("GET", "/health", authorization="")[0] == 200
    for authorization in ("", "Bearer other", f"Basic {TOKEN}", "Bearer", "Bearer \u00e9"):
        answer = call("GET", "/v1/models", authorization=authorization)
        assert answer[0] == 401 and "Bearer TOKEN" in message(answer)
    assert call("GET", "/v1/models", host="video.example:80")[0] == 200
    answer = call("GET", "/v1/models", host="evil.example")
    assert answer[0] == 421 and "--called" in message(answer)


def test_large_and_slow_bodies_are_refused(call, port):
    big = b'{"model": "' + b"x" * LIMITS.request_bytes + b'"}'
    answer = call("POST", "/v1/chat/completions", big)
    assert answer[0] == 413 and "/v1/files" in message(answer)
    answer = call("POST", "/v1/sessions/s/frames", b"x" * 300_001, "video/mp4")
    assert answer[0] == 413
    answer = call("POST", "/v1/chat/completions", chat(*[video_part("file-x")] * 50))
    assert answer[0] == 413 and "51 parts, the limit is 50" in message(answer)

    def raw(head: bytes, rest: bytes = b"", pause: float = 0) -> bytes:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer "
                + TOKEN.encode()
                + b"\r\ncontent-type: application/json\r\n"
                + head
                + b"\r\n\r\n"
            )
            time.sleep(pause)
            with contextlib.suppress(OSError):
                line.sendall(rest)
            return line.recv(4096)

    # Nobody said how much would come.
    chunk = b"%x\r\n" % 100_000 + b" " * 100_000 + b"\r\n"
    assert b" 413 " in raw(b"transfer-encoding: chunked", chunk * 3)
    assert b" 408 " in raw(b"content-length: 100", b"{", pause=0)
    assert b" 400 " in raw(b"content-length: 1e9")
    assert "adacm2_held_bytes 0.0" in call("GET", "/metrics")[1]


def test_a_caller_who_leaves_stops_the_work(call, port, clips):
    """The one decoder is free again for the next."""
    asked = json.dumps(chat(video_part(f"file://{clips}/clip.mp4"), fps=4)).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer "
                + TOKEN.encode()
                + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(asked)
                + asked
            )
    assert call("POST", "/v1/chat/completions", json.loads(asked))[0] == 200
    deadline = time.monotonic() + 20
    while "adacm2_waiting 0.0" not in (text := call("GET", "/metrics")[1]):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def test_metrics_count_by_route(call):
    call("GET", "/v1/none")
    text = call("GET", "/metrics")[1]
    assert 'adacm2_requests_total{path="other",status="404"}' in text
    assert 'adacm2_requests_total{path="/v1/chat/completions",status="200"}' in text
    assert "adacm2_frames_total" in text and "adacm2_first_token_seconds_bucket" in text


def test_more_requests_than_may_wait_are_sent_away(call, clips):
    """Each reads a video with the one decoder that there is."""
    asked = chat(video_part(f"file://{clips}/clip.mp4"), fps=4)
    with concurrent.futures.ThreadPoolExecutor(3 * LIMITS.waiting) as pool:
        sent = [
            pool.submit(call, "POST", "/v1/chat/completions", asked)
            for _ in range(3 * LIMITS.waiting)
        ]
        answers = [each.result() for each in sent]
    statuses = [status for status, _ in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= LIMITS.waiting
    told = next(answer for answer in answers if answer[0] == 429)
    assert "6 requests wait" in message(told)
