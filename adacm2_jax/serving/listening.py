"""Where a server listens: a socket that is bound before time is spent on a model."""

import socket

from adacm2_jax.errors import UserError, printable


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet.

    Raises:
      UserError: if that cannot be, naming the flags.
    """
    bound = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), 0, type=socket.SOCK_STREAM
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address[0], port, *address[2:]))  # getaddrinfo takes 99999 for another port
    except (OSError, OverflowError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        what = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--port {port} of --host {printable(host)} cannot be listened on ({what}); give "
            "another"
        ) from None
    return bound
