"""Opening a video file: its picture track, its length, and in one line why it cannot be used."""

from __future__ import annotations

import io
import os
import struct

import av

from adacm2_jax.errors import DataError

Source = str | os.PathLike | bytes

AGAIN = "download or record it again"
_GIVE = "give MP4, MKV, WebM or AVI"
# A playlist in the guise of a video must not make FFmpeg fetch anything.
_OPEN: dict[str, object] = {"options": {"protocol_whitelist": "file"}}
if int(av.__version__.split(".")[0]) < 19:
    # Titles in another encoding than UTF-8 are no error; later PyAV takes them without being told.
    _OPEN["metadata_errors"] = "replace"


class VideoFile:
    """An opened file and its picture track.

    Attributes:
        source: the path, or the encoded file's bytes.
        name: the path, or "<N bytes>".
        container, stream: PyAV's, replaced by `reopen`.
        clock: seconds of one tick of the track.
        start: tick at which the track begins.
        duration: of the track, seconds from its start.

    Args:
        source: a path, or the encoded file's bytes.
    Raises:
        DataError: the source is missing, empty, incomplete, or no video.
    """

    def __init__(self, source: Source):
        self.source = source
        self._in_memory = not isinstance(source, (str, os.PathLike))
        self.name = f"<{len(source)} bytes>" if self._in_memory else os.fspath(source)
        self._open()
        self.duration = self._claimed_duration() or self._scan_duration()

    @property
    def format(self) -> str:
        """FFmpeg's name of the container format."""
        return self.container.format.name

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return len(self.source) if self._in_memory else os.path.getsize(self.source)

    def reopen(self) -> None:
        """Starts again from the file's beginning."""
        self.container.close()
        self._open()

    def sound_lasts(self, beyond: float) -> bool:
        """Tells whether the sound has packets later than `beyond` seconds."""
        if not self.container.streams.audio:
            return False
        try:
            with av.open(self._target(), **_OPEN) as container:
                container.seek(int(beyond * av.time_base))
                return any(
                    packet.pts is not None and packet.pts * packet.time_base > beyond
                    for packet in container.demux(audio=0)
                )
        except av.FFmpegError:
            return False  # The sound is cut short as well.

    def _open(self) -> None:
        target = self._target()
        try:
            self.container = av.open(target, **_OPEN)
        except PermissionError:
            raise DataError(f"{self.name}: may not be read: change its permissions") from None
        except (av.FFmpegError, ValueError) as error:
            raise DataError(f"{self.name}: {self._why_unreadable(error)}") from None
        if self.format == "tty":
            raise DataError(f"{self.name}: is text, not a video: {_GIVE}")
        streams = self.container.streams
        cover = av.stream.Disposition.attached_pic
        pictures = [stream for stream in streams.video if not stream.disposition & cover]
        if not pictures:
            raise DataError(f"{self.name}: holds no video track (sound only?): give a video file")
        best = streams.best("video")
        self.stream = best if best in pictures else pictures[0]
        if self.stream.codec_context is None:
            raise DataError(f"{self.name}: FFmpeg cannot decode its codec: convert it to H.264")
        for stream in streams:
            if stream is not self.stream:
                # Not read at all; a missing end of the sound must not end the picture.
                stream.discard = av.stream.Discard.all
        self.clock = float(self.stream.time_base)
        self.start = self.stream.start_time or 0

    def _target(self) -> str | io.BytesIO:
        if self._in_memory:
            if not self.size:
                raise DataError(f"{self.name}: the video is empty: {AGAIN}")
            return io.BytesIO(self.source)
        if os.path.isdir(self.source):
            raise DataError(f"{self.name}: is a directory: give the video file inside it")
        if not os.path.exists(self.source):
            raise DataError(f"{self.name}: no such file: check the path")
        if not self.size:
            raise DataError(f"{self.name}: the file is empty: {AGAIN}")
        # With the scheme spelled out, a colon in the name is not taken for one.
        return "file:" + self.name

    def _head(self, count: int) -> bytes:
        if self._in_memory:
            return bytes(self.source[:count])
        with open(self.source, "rb") as file:
            return file.read(count)

    def _why_unreadable(self, error: Exception) -> str:
        head = self._head(12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return f"the MP4 file is incomplete (its index, moov, is missing or cut): {AGAIN}"
        if head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
            return f"the file is incomplete or damaged: {AGAIN}"
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"is not a video that FFmpeg can read ({reason}): {_GIVE}"

    def _claimed_duration(self) -> float:
        """The track's length in seconds by the file's headers; 0.0 if they do not say."""
        if self.stream.duration:
            claim = max(self.stream.duration * self.clock, self._cut_avi_duration())
            return max(claim, self._scan_duration()) if self._is_uneven_mp4() else claim
        # Matroska's header gives the longest track's length; a tag, where written, the track's own.
        tag = _tag_seconds(self.stream.metadata.get("DURATION")) - self.start * self.clock
        claims = [tag, (self.container.duration or 0) / av.time_base]
        return min((seconds for seconds in claims if seconds > 0), default=0.0)

    def _is_uneven_mp4(self) -> bool:
        """Tells whether MP4's duration may be short by the last frames.

        It adds up decoding times; with B-frames and a variable frame rate those end before the
        frames shown do.
        """
        mean, base = self.stream.average_rate, self.stream.base_rate
        reordered = self.stream.codec_context.has_b_frames > 0
        return "mp4" in self.format and reordered and bool(mean and base and base > 1.1 * mean)

    def _cut_avi_duration(self) -> float:
        """What a cut AVI file's header says, which FFmpeg replaces by a guess; 0.0 if not cut."""
        head = self._head(4096)
        at = head.find(b"avih") + 8
        if self.format != "avi" or at < 8 or len(head) < at + 20:
            return 0.0
        if struct.unpack_from("<I", head, 4)[0] + 8 <= self.size:
            return 0.0
        # The main header begins with microseconds a frame; its fifth number counts the frames.
        period, _, _, _, frames = struct.unpack_from("<5I", head, at)
        return period * frames / 1e6

    def _scan_duration(self) -> float:
        """Reads all packets (decoding nothing) for the end of the last one, seconds."""
        end, period = 0.0, 1.0 / float(self.stream.guessed_rate or 25)
        try:
            for packet in self.container.demux(self.stream):
                tick = packet.pts if packet.pts is not None else packet.dts
                if packet.size and tick is not None:
                    length = packet.duration * self.clock if packet.duration else period
                    end = max(end, (tick - self.start) * self.clock + length)
        except av.FFmpegError:
            pass  # What can be read is the duration.
        self.reopen()
        return end or period


def _tag_seconds(tag: str | None) -> float:
    """Reads Matroska's "HH:MM:SS.nnnnnnnnn"; 0.0 where there is none or it cannot be read."""
    try:
        hours, minutes, seconds = (tag or "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0
