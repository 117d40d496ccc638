"""What a server grants to whoever calls it; ``adacm2 serve --help`` names the flags."""

import dataclasses
import math

from adacm2_jax.errors import UserError


class BusyError(UserError):
    """The server is full; the same request may do later (HTTP 429)."""


class MissingError(UserError):
    """There is no such thing: a session, an upload, a model (HTTP 404)."""


class StorageError(UserError):
    """The server has no room on its disk, or cannot write there (HTTP 507)."""


class LargeError(UserError):
    """More than the server takes (HTTP 413)."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of everything that a request can make grow.

    Attributes:
      session_bytes: of the states of all sessions that are on the device together.
      rows: sessions whose frames are read in one pass, and answers written at a time.
      sessions: that may be open, on the device and on disk together.
      questions: known ones of a session.
      waiting: requests that may wait for the device together.
      request_bytes: of one request in JSON.
      upload_bytes: of one file that is sent as it is.
      upload_total: of all bodies and uploads that are held together.
      frames: of one request.
      pixels: of one picture or frame as it comes.
      decoders: processes that decode.
      decoder_bytes: of memory that each may have.
      decoder_seconds: that one request's decoding may work.
      connections: that may be open together, whether a request has come by them or not.
      head_seconds: in which a connection's next request must have come, up to its body.
      receive_seconds: in which a request's body must have come.
      idle_seconds: after which a session goes to disk.
      save_seconds: after which what a session has seen is on disk.
      upload_seconds: that an upload is held.
    """

    session_bytes: int = 2 << 30
    rows: int = 8
    sessions: int = 1024
    questions: int = 8
    waiting: int = 64
    request_bytes: int = 64 << 20
    upload_bytes: int = 512 << 20
    upload_total: int = 2 << 30
    frames: int = 20_000
    pixels: int = 36_000_000
    decoders: int = 2
    decoder_bytes: int = 3 << 30
    decoder_seconds: float = 300.0
    connections: int = 512
    head_seconds: float = 20.0
    receive_seconds: float = 120.0
    idle_seconds: float = 300.0
    save_seconds: float = 30.0
    upload_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (0 < value < math.inf):
                flag = "--" + field.name.replace("_", "-")
                raise UserError(f"{flag} is {value}; give a number above 0")
