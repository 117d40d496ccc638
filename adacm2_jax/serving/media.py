"""Where the videos and pictures of a request come from: its own bytes, an upload, an allowed file.

Nothing is fetched: an address is refused. What a request brings is written below a directory of the
server's, under a name of the server's, and removed when the request ends.
"""

import base64
import binascii
import contextlib
import dataclasses
import os
import pathlib
import re
import secrets
import shutil
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence

from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable
from adacm2_jax.serving.limits import BusyError, Limits, MissingError

_ID = re.compile(r"file-[A-Za-z0-9_-]{16}")
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w=.+-]+)*),", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Upload:
    """A file that was uploaded.

    Attributes:
      id: by which callers name it.
      name: that it had.
      path: where it lies.
      size: bytes.
      created: seconds since 1970.
    """

    id: str
    name: str
    path: pathlib.Path
    size: int
    created: float


class Media:
    """Files that requests name or bring.

    Args:
      directory: for what they bring; emptied at the start, for a killed server left it.
      allowed: directories whose files may be named as ``file://`` addresses.
      limits: of sizes.
    """

    def __init__(self, directory: pathlib.Path, allowed: Sequence[str], limits: Limits):
        self._limits = limits
        self._allowed = [os.path.realpath(path) for path in allowed]
        for given, path in zip(allowed, self._allowed, strict=True):
            if not os.path.isdir(path):
                raise UserError(f"--allow {printable(given)} is no directory; name one")
        check_writable(directory, f"uploads go to {directory}")
        self._directory = directory / "uploads"
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, mode=0o700)
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes of all that is held for requests and uploads."""
        return self._held

    # --- Room ----------------------------------------------------------------------------------

    def reserve(self, size: int) -> None:
        """Takes so many bytes of what all requests may hold together.

        Raises:
          BusyError: if they are not free.
        """
        self._forget_old()
        with self._lock:
            if self._held + size > self._limits.upload_total:
                raise BusyError(
                    f"uploads hold {self._held:,} of {self._limits.upload_total:,} bytes; delete "
                    "some, or try again later"
                )
            self._held += size

    def release(self, size: int) -> None:
        """Gives bytes back."""
        with self._lock:
            self._held -= size

    # --- Uploads -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def new_file(self) -> Iterator[pathlib.Path]:
        """A path to write to; what is there is removed at the end of the block, unless renamed."""
        path = self._directory / f".{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def keep(self, path: pathlib.Path, name: str, size: int) -> Upload:
        """Makes an upload of a file of :meth:`new_file`; its bytes have been reserved."""
        made = f"file-{secrets.token_urlsafe(12)}"
        upload = Upload(made, name, self._directory / made, size, time.time())
        path.rename(upload.path)
        with self._lock:
            self._uploads[made] = upload
        return upload

    def uploads(self) -> list[Upload]:
        """All that are held."""
        self._forget_old()
        with self._lock:
            return list(self._uploads.values())

    def upload(self, name: str) -> Upload:
        """One upload.

        Raises:
          MissingError: if there is none of that name.
        """
        self._forget_old()
        with self._lock:
            found = self._uploads.get(name)
        if found is None:
            raise MissingError("there is no such upload, or no more; send it to /v1/files")
        return found

    def delete(self, name: str) -> None:
        """Removes an upload.

        Raises:
          MissingError: if there is none of that name.
        """
        self._remove(self.upload(name))

    def _forget_old(self) -> None:
        with self._lock:
            oldest = time.time() - self._limits.upload_seconds
            old = [upload for upload in self._uploads.values() if upload.created < oldest]
        for upload in old:
            self._remove(upload)

    def _remove(self, upload: Upload) -> None:
        with self._lock:
            if self._uploads.pop(upload.id, None) is None:
                return
            self._held -= upload.size
        upload.path.unlink(missing_ok=True)  # who reads it has it open

    # --- Addresses -----------------------------------------------------------------------------

    def resolve(self, address: str, files: contextlib.ExitStack, what: str) -> str:
        """The path of what an address names.

        Args:
          address: ``data:…;base64,…``, ``file:///…`` below an allowed directory, or the id of an
            upload.
          files: what is written for it is removed when this closes.
          what: begins a message: the place in the request.

        Raises:
          UserError: for every other address.
          MissingError: for an upload that is none.
        """
        if address.startswith("data:"):
            return self._from_data(address, files, what)
        if address.startswith("file:"):
            return self._allowed_file(address, what)
        if _ID.fullmatch(address):
            return str(self.upload(address).path)
        shown = printable(address[:60])
        raise UserError(
            f"{what} is {shown!r}: give a data: address (base64), the id of an upload "
            "(file-…), or file:///PATH below a directory that the server allows; nothing is fetched"
        )

    def _from_data(self, address: str, files: contextlib.ExitStack, what: str) -> str:
        head = _DATA.match(address, 0, 512)
        if head is None or not head[2].endswith(";base64"):
            raise UserError(f"{what} is no data address in base64; write data:TYPE;base64,…")
        text = address[head.end() :]
        path = files.enter_context(self.new_file())
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"{what} is not base64 ({error}); encode it again") from None
        if not content:
            raise UserError(f"{what} is empty; give the file's bytes")
        path.write_bytes(content)
        return str(path)

    def _allowed_file(self, address: str, what: str) -> str:
        if not self._allowed:
            raise UserError(
                f"{what} names a file, and the server allows none; start it with --allow DIR"
            )
        parts = urllib.parse.urlsplit(address)
        path = urllib.parse.unquote(parts.path)
        # The same words whether it is outside, or missing, or of no kind that can be read: what
        # lies elsewhere on this machine is not told.
        refused = UserError(
            f"{what} is no video file below a directory that the server allows (--allow)"
        )
        if parts.netloc not in ("", "localhost") or not os.path.isabs(path) or "\0" in path:
            raise refused
        try:
            real = os.path.realpath(path, strict=True)  # links and .. followed to their end
        except (OSError, ValueError):
            raise refused from None
        below = any(os.path.commonpath([real, root]) == root for root in self._allowed)
        if not below or not os.path.isfile(real):
            raise refused
        return real
