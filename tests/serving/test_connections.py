"""Connections over real sockets: how many, how long they may be silent, and how a server ends."""

import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import uvicorn

from adacm2_jax.errors import UserError
from adacm2_jax.serving import connections
from adacm2_jax.serving.limits import Limits
from tests.small import ROOT, process_environment

LIMITS = Limits(connections=4, head_seconds=0.5)
REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def app(scope, receive, send):
    """Reads a request to its end and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


@pytest.fixture
def connect():
    """Opens connections to a server of :data:`LIMITS`."""
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(socket.socket())
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        running = uvicorn.Server(connections.config(app, LIMITS))
        thread = threading.Thread(target=lambda: running.run(sockets=[bound]))
        thread.start()
        address = bound.getsockname()
        stack.callback(thread.join)
        stack.callback(setattr, running, "should_exit", True)
        yield lambda: stack.enter_context(socket.create_connection(address, timeout=20))


def rest(line: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    while piece := line.recv(4096):
        found += piece
    return found


def test_a_silent_connection_and_half_a_head_are_closed_in_time(connect):
    began = time.monotonic()
    silent, half, trickling = connect(), connect(), connect()
    half.sendall(REQUEST[:-4])
    for letter in REQUEST[:8]:  # to go on sending gives no more time
        trickling.sendall(bytes([letter]))
        time.sleep(0.05)
    assert rest(silent) == b""
    for line in (half, trickling):
        head, body = rest(line).split(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"]["message"] == "no whole request came in 0.5 s"
    assert 0.4 < time.monotonic() - began < 10


def test_the_time_of_a_head_is_none_of_a_body_or_of_the_next_head(connect):
    line = connect()
    line.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n")
    time.sleep(0.8)
    line.sendall(b"ab")
    assert line.recv(4096).startswith(b"HTTP/1.1 200 ")
    time.sleep(0.3)
    line.sendall(REQUEST)
    assert b" 200 " in line.recv(4096)
    line.sendall(REQUEST[:9])  # the second head that is never finished
    assert b" 408 " in rest(line)


def test_more_connections_than_allowed_are_sent_away(connect):
    held = [connect() for _ in range(LIMITS.connections)]
    for line in held:  # all four have been taken in
        line.sendall(REQUEST)
        assert b" 200 " in line.recv(4096)
    head, body = rest(connect()).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after" in head
    assert "too many connections" in json.loads(body)["error"]["message"]
    held[0].close()
    deadline = time.monotonic() + 20
    while True:
        line = connect()
        line.sendall(REQUEST)
        with contextlib.suppress(ConnectionError):
            if b" 200 " in line.recv(4096):
                break
        assert time.monotonic() < deadline


def test_connections_for_which_the_system_has_no_files_are_refused():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 40
    with pytest.raises(UserError, match=rf"--connections {hard:,} needs .* \(ulimit -n\)"):
        connections.check_descriptors(Limits(connections=hard))
    connections.check_descriptors(Limits(connections=1))
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == soft


SAVES_SLOWLY = """
import signal, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from adacm2_jax.serving import server
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.listening import listen

class Engine:
    alive, failed, unsaved = True, None, []

    def stop(self):
        print("saving", flush=True)
        thread = threading.Thread(target=time.sleep, args=(2,))
        thread.start()
        thread.join()
        print("saved", flush=True)

class Decoders:
    def close(self): pass

server.run(None, Engine(), Decoders(), listen("127.0.0.1", 0), Limits())
"""


def test_ctrl_c_again_and_again_lets_sessions_be_saved():
    with subprocess.Popen(
        [sys.executable, "-c", SAVES_SLOWLY],
        cwd=ROOT,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline().startswith("serving at")  # perhaps before it is heard
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "saving\n"
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.3)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert out == "saved\n" and process.returncode == -signal.SIGINT
    assert err.startswith("sessions are being saved; wait for the end\n" * 2)
    assert "stopped; sessions are saved" in err
