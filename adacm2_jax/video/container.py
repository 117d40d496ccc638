"""Opening a video file: its picture track, and in one line why it cannot be used."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from typing import Any

import av

from adacm2_jax.errors import DataError, printable
from adacm2_jax.video.info import AGAIN, Source

_GIVE = "give MP4, MKV, WebM or AVI"
# What FFmpeg reads other files for, or no file at all: a clip must not make it open what the clip
# names, be it a pipe that nobody writes to.
_LISTS = {"concat", "dash", "hls", "imf", "mlv", "vobsub", "webm_dash_manifest"}
_NO_FILES = {"image2", "lavfi", "rtp", "rtsp", "sap", "sdp"}
_FORMATS = [
    name for name in sorted(av.formats_available) if not {*name.split(",")} & (_LISTS | _NO_FILES)
]
_OPEN: dict[str, Any] = {
    "options": {"protocol_whitelist": "file", "format_whitelist": ",".join(_FORMATS)}
}
_LIST_HEADS = (b"ffconcat", b"#EXTM3U")
if int(av.__version__.split(".")[0]) < 19:
    # Titles in another encoding than UTF-8 are no error; later PyAV takes them without being told.
    _OPEN["metadata_errors"] = "replace"
# A transport stream is packets of so many bytes that begin with this one. FFmpeg knows it by a run
# of them; a file of few frames has too few, so here it is told.
_TS_PACKET, _TS_SYNC, _TS_SHORT = 188, b"\x47", 1 << 16
# Ends a file whose demuxer reports one error after the other and makes no way.
_MAX_READ_ERRORS = 64


class VideoFile:
    """An opened file and its picture track.

    Attributes:
        name: the path, or "<N bytes>", as it may stand in a message.
        container, stream: PyAV's, replaced by `reopen`.
        clock: seconds of one tick of the track.

    Args:
        source: a path, or the encoded file's bytes.
    Raises:
        DataError: the source is missing, empty, incomplete, or no video.
    """

    def __init__(self, source: Source):
        self._path: str | None = None
        self._data = b""
        if isinstance(source, (str, os.PathLike)):
            self._path = os.fspath(source)
            self.name = printable(self._path)
        else:
            self._data = bytes(source)
            self.name = f"<{len(source)} bytes>"
        self._open()

    @property
    def format(self) -> str:
        """FFmpeg's name of the container format."""
        return self.container.format.name

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return len(self._data) if self._path is None else os.path.getsize(self._path)

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the file from a position on; fewer where it ends."""
        if self._path is None:
            return self._data[start : start + count]
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(count)

    def reopen(self) -> None:
        """Starts again from the file's beginning."""
        self.container.close()
        self._open()

    def seek(self, tick: int) -> bool:
        """Moves to a key frame at or before a tick; False if the file does not allow it."""
        try:
            self.container.seek(tick, stream=self.stream)
        except (av.FFmpegError, OverflowError):  # of a damaged index may come any number
            return False
        return True

    def packets(self, errors: list[str] | None = None) -> Iterator[av.Packet]:
        """The picture's packets from here to the end, with PyAV's empty one last.

        Args:
            errors: is given a line for each read that failed; what can be read is read.
        """
        for _ in range(_MAX_READ_ERRORS):
            try:
                yield from self.container.demux(self.stream)
                return
            except av.FFmpegError as error:
                if errors is not None:
                    errors.append(str(error))

    def sound_lasts(self, beyond: float) -> bool:
        """Tells whether the sound has packets later than `beyond` seconds of the file's clock."""
        try:
            with av.open(self._target(), **self._options()) as container:
                container.seek(int(beyond * av.time_base))
                # The tracks are counted after the seek: some files tell of one only where it
                # begins.
                return any(
                    packet.stream.type == "audio"
                    and packet.pts is not None
                    and packet.pts * packet.time_base > beyond
                    for packet in container.demux()
                )
        except (av.FFmpegError, LookupError, ValueError, OverflowError):
            return False  # There is no sound, or it is cut short as well.

    def _open(self) -> None:
        target = self._target()
        try:
            self.container = av.open(target, **self._options())
        except (av.FFmpegError, ValueError) as error:
            # FFmpeg says the same of damaged files that it does not want to follow.
            if isinstance(error, PermissionError) and not os.access(self._path or ".", os.R_OK):
                raise DataError(f"{self.name}: may not be read: change its permissions") from None
            raise DataError(f"{self.name}: {self._why_unreadable(error)}") from None
        if self.format == "tty":
            raise DataError(f"{self.name}: is text, not a video: {_GIVE}")
        streams = self.container.streams
        cover = av.stream.Disposition.attached_pic
        pictures = [stream for stream in streams.video if not stream.disposition & cover]
        if not pictures:
            raise DataError(f"{self.name}: holds no video track (sound only?): give a video file")
        try:
            best = streams.best("video")
        except LookupError:  # a damaged file may name a track that it has not
            best = None
        self.stream = next((stream for stream in pictures if stream is best), pictures[0])
        if self.stream.codec_context is None:
            raise DataError(f"{self.name}: FFmpeg cannot decode its codec: convert it to H.264")
        for stream in streams:
            if stream is not self.stream:
                # Not read at all; a missing end of the sound must not end the picture.
                stream.discard = av.stream.Discard.all
        self.clock = float(self.stream.time_base or 0)

    def _options(self) -> dict[str, Any]:
        if self.size < _TS_SHORT and not self.size % _TS_PACKET:
            starts = self.read(0, self.size)[::_TS_PACKET]
            if starts == _TS_SYNC * len(starts):
                return _OPEN | {"format": "mpegts"}
        return _OPEN

    def _target(self) -> str | io.BytesIO:
        if self._path is None:
            if not self.size:
                raise DataError(f"{self.name}: the video is empty: {AGAIN}")
            return io.BytesIO(self._data)
        if os.path.isdir(self._path):
            raise DataError(f"{self.name}: is a directory: give the video file inside it")
        if not os.path.exists(self._path):
            raise DataError(f"{self.name}: no such file: check the path")
        if not stat.S_ISREG(os.stat(self._path).st_mode):
            raise DataError(
                f"{self.name}: is no regular file (a pipe, a socket or a device): save the video "
                "to a file"
            )
        if not self.size:
            raise DataError(f"{self.name}: the file is empty: {AGAIN}")
        # With the scheme spelled out, a colon in the name is not taken for one.
        return "file:" + self._path

    def _why_unreadable(self, error: Exception) -> str:
        head = self.read(0, 12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return f"the MP4 file is incomplete (its index, moov, is missing or cut): {AGAIN}"
        if head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
            return f"the file is incomplete or damaged: {AGAIN}"
        if head.startswith(_LIST_HEADS):
            return "is a list of other files, not a video: give the video files themselves"
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"is not a video that FFmpeg can read ({reason}): {_GIVE}"
