"""Engines over the small model, and a running server for the tests that send it requests."""

import contextlib
import dataclasses
import http.client
import json
import threading

import pytest
import uvicorn

import adacm2_jax
from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.inference.session import Session, open_memory
from adacm2_jax.serving import connections, server
from adacm2_jax.serving.engine import Engine
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.listening import listen
from adacm2_jax.serving.table import Table
from tests.inference.test_session import CONFIG, OTHER, make_model, make_params
from tests.small import QUESTION
from tests.video.make_videos import encode, numbered_frames

ROWS = 3
LATE = "what else?"
TOKEN = "a token"
LIMITS = Limits(
    rows=2,
    waiting=6,
    decoders=1,
    request_bytes=200_000,
    upload_bytes=300_000,
    upload_total=700_000,
    receive_seconds=1,
    frames=50,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    texts = [QUESTION, OTHER, LATE]
    processor = train_tokenizers(texts, CONFIG, tmp_path_factory.mktemp("tokenizers"))
    return dataclasses.replace(make_model(make_params(1), processor), narrowest=24)


@pytest.fixture(scope="module")
def size(model) -> int:
    """Bytes of a session with one known question."""
    tokens = 2 * CONFIG.vision.tokens_per_frame
    return Session(model, (QUESTION,), 1.0, open_memory(tokens)).size


@pytest.fixture
def start(model, tmp_path):
    """Starts engines, and stops them."""
    running = []

    def begin(directory="sessions", model=model, watch=lambda name, value: None, **limits):
        bounds = Limits(**({"rows": ROWS} | limits))
        made = lambda: Table(model, bounds, tmp_path / directory)  # noqa: E731
        engine = Engine(model, bounds, made, watch)
        engine.start()
        running.append(engine)
        return engine

    yield begin
    for engine in running:
        engine.stop()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    encode(root / "clip.mp4", numbered_frames(120), fps=10)
    (root / "text.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def loaded(small_run):
    return adacm2_jax.load(small_run)


@pytest.fixture(scope="module")
def port(loaded, clips, tmp_path_factory):
    """A running server."""
    options = server.Options(
        host="127.0.0.1",
        port=0,
        names=("video.example",),
        token=TOKEN,
        allowed=(str(clips),),
        state=tmp_path_factory.mktemp("state"),
        model_name="small",
    )
    bound = listen(options.host, options.port)
    app, engine, decoders = server.make(loaded.sessions(), options, LIMITS)
    bound.listen()
    running = uvicorn.Server(connections.config(app, LIMITS))
    thread = threading.Thread(target=lambda: running.run(sockets=[bound]))
    thread.start()
    yield bound.getsockname()[1]
    running.should_exit = True
    thread.join()
    decoders.close()
    engine.stop()


@pytest.fixture
def call(port):
    """Sends a request; returns its status and its JSON, or its text."""

    def send(method, path, body=None, kind="application/json", **headers):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        given = {"authorization": f"Bearer {TOKEN}"} | (
            {} if body is None else {"content-type": kind}
        )
        headers = given | {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        is_json = answer.headers["content-type"].startswith("application/json")
        return answer.status, json.loads(text) if is_json else text

    return send
