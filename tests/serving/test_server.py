"""Where a server may listen, and with which limits."""

import socket

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.serving import server
from adacm2_jax.serving.limits import Limits
from adacm2_jax.serving.listening import listen


def test_what_would_let_anybody_in_is_refused(tmp_path):
    for host in ("0.0.0.0", "::", "192.0.2.1", "host.example"):
        with pytest.raises(UserError, match="ADACM2_TOKEN"):
            server.Options(host, 0, (), "", (), tmp_path, "small").check()
        server.Options(host, 0, (), "token", (), tmp_path, "small").check()
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"):
        server.Options(host, 0, (), "", (), tmp_path, "small").check()
    with pytest.raises(UserError, match=r"--port 99999 of --host 127\.0\.0\.1 cannot"):
        listen("127.0.0.1", 99999)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"--port \d+ .*in use.*; give another"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="--rows is 0"):
        Limits(rows=0)
