"""``adacm2 serve``: questions about videos over HTTP."""

import argparse
import dataclasses
import os
import pathlib

from adacm2_jax.errors import UserError, check_text
from adacm2_jax.files import check_writable

#: The token, where no file holds it: on a command line everybody on the machine would see it.
TOKEN = "ADACM2_TOKEN"


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    from adacm2_jax.serving.limits import Limits

    made.add_argument(
        "--model",
        required=True,
        metavar="RUN",
        help="directory of a run, or of a converted checkpoint",
    )
    made.add_argument(
        "--name", metavar="MODEL", help="as callers know it (default: the directory's)"
    )
    made.add_argument("--host", default="127.0.0.1", help="to listen at (default %(default)s)")
    made.add_argument("--port", type=int, default=8000, help="0: any (default %(default)s)")
    made.add_argument(
        "--called",
        action="append",
        default=[],
        metavar="HOST",
        help="another name by which callers may reach it, such as that of a proxy",
    )
    made.add_argument(
        "--token-file", metavar="FILE", help=f"the token that callers must show (or ${TOKEN})"
    )
    made.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="DIR",
        help="videos below it may be named as file:///…; may be given several times",
    )
    made.add_argument(
        "--state",
        metavar="DIR",
        default="adacm2-sessions",
        help="saved sessions, and uploads until the server stops (default %(default)s)",
    )
    made.add_argument(
        "--policy", help="of the memory of known questions (default: the run's evaluation's)"
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of matrix products (default: the run's)",
    )
    made.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        help="how the language model's matrices are kept (default: as they are)",
    )
    limits = made.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        limits.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{_HELP[field.name]} (default %(default)s)",
        )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


_HELP = {
    "session_bytes": "of all sessions on the device together; others wait on disk",
    "rows": "sessions that are read, and answers that are written, in one pass",
    "sessions": "that may be open, on the device and on disk",
    "questions": "that a session may know beforehand",
    "waiting": "requests that may wait for the device",
    "request_bytes": "of a request in JSON",
    "upload_bytes": "of a file",
    "upload_total": "of all bodies and uploads that are held together",
    "frames": "of one video or request",
    "pixels": "of one frame or picture as it comes",
    "decoders": "processes that decode",
    "decoder_bytes": "memory of each",
    "decoder_seconds": "that decoding one video may work",
    "connections": "that may be open together",
    "head_seconds": "in which a connection's next request must have come, up to its body",
    "receive_seconds": "in which a request's body must have come",
    "idle_seconds": "after which an unused session goes to disk",
    "save_seconds": "after which what a session has seen is on disk",
    "upload_seconds": "that an upload is kept, at most until the server stops",
}


def serve(args: argparse.Namespace) -> int:
    """``adacm2 serve --model RUN``."""
    from adacm2_jax.serving import server
    from adacm2_jax.serving.limits import Limits
    from adacm2_jax.serving.listening import listen

    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        __import__(package)  # before time is spent; which extra has it is told by who calls
    from adacm2_jax.serving.connections import check_descriptors

    limits = Limits(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)}
    )
    state = pathlib.Path(args.state)
    options = server.Options(
        host=args.host,
        port=args.port,
        names=tuple(name.lower() for name in args.called),
        token=_token(args.token_file),
        allowed=tuple(args.allow),
        state=state,
        model_name=args.name or pathlib.Path(args.model).resolve().name,
    )
    options.check()
    check_descriptors(limits)
    check_writable(state, f"--state {args.state}")
    bound = listen(options.host, options.port)

    from adacm2_jax.runs.load import load
    from adacm2_jax.runs.lock import locked

    model = load(
        args.model,
        policy=args.policy or "",
        dtype=args.dtype or "",
        quantize=args.quantize or "",
    )
    state.mkdir(parents=True, exist_ok=True)
    with locked(state, "--state", "another server uses it"):
        server.run(*server.make(model.sessions(), options, limits), bound, limits)
    return 0


def _token(path: str | None) -> str:
    """The token that callers must show; "" if none is set.

    Raises:
      UserError: if the file has none.
    """
    if not path:
        return os.environ.get(TOKEN, "").strip()
    try:
        text = check_text(pathlib.Path(path).read_text(), "the token").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path} cannot be read ({error}); name a text file") from None
    if not text:
        raise UserError(f"--token-file {path} is empty; write the token into it")
    return text
