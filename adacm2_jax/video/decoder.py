"""Which frame of a video is shown at an instant: one pass forward, with seeks where they save work.

Everything that depends on codecs is here; `frames.py` chooses the instants and resizes the
frames.
Times are seconds from the start of the picture track; ticks are the track's own clock.
"""

from __future__ import annotations

import bisect
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from adacm2_jax.errors import DataError
from adacm2_jax.video.container import AGAIN, Source, VideoFile

# Decoder threads cost more than they save below so many pixels in a frame, or in the whole clip.
_THREADED_FRAME = 150_000
_THREADED_CLIP = 32_000_000
# Each thread holds a frame, and a data loader runs several decoders at once.
_MAX_THREADS = 8
# Ends a file whose demuxer reports one error after the other and makes no way.
_MAX_READ_ERRORS = 64
# Shorter Matroska files are read forward without looking at their index.
_LOAD_CUES_SECONDS = 10.0
# A seek empties the decoder's pipeline, which is worth about this many frames of decoding.
_SEEK_FRAMES = 12
# Where no index tells the key frames, a seek is tried over gaps from this many seconds on, ...
_BLIND_SEEK_SECONDS = 30.0
# ... to so many seconds before the instant, where some key frame will follow in time.
_BLIND_SEEK_MARGIN = 10.0


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        path: the file, or "<N bytes>" for a video given as bytes.
        container: FFmpeg's name of the container format ("mov,mp4,m4a,3gp,3g2,mj2").
        codec: FFmpeg's name of the codec ("h264").
        width, height: pixels as shown, after the rotation; their aspect ratio is not applied.
        rotation: degrees clockwise (0, 90, 180 or 270) that turn the stored picture upright.
        duration: seconds.
        fps: average frames per second; 0.0 where the file does not say.
    """

    path: str
    container: str
    codec: str
    width: int
    height: int
    rotation: int
    duration: float
    fps: float


class TruncatedError(DataError):
    """The file ends before its own header says: `args[0]` is the finding, `str` adds the remedy."""

    def __str__(self) -> str:
        return (
            f"{self.args[0]}, so nothing was answered: {AGAIN}, or pass "
            "--config.data.on_truncated=use to go on with the frames that are there"
        )


class _Stamped(NamedTuple):
    tick: int
    frame: av.VideoFrame


class Decoder:
    """Reads one video forward: `frame_at` for instants that do not decrease.

    Attributes:
        name: the file, in messages.
        duration: of the video, seconds.
        fps: average frames per second; 0.0 where the file does not say.
        damaged: packets that could not be decoded so far.

    Args:
        source: a path, or the encoded file's bytes.
    Raises:
        DataError: the source is missing, empty, incomplete, or no video.
    """

    def __init__(self, source: Source):
        self._file = VideoFile(source)
        self.name = self._file.name
        self.duration = self._file.duration
        self.damaged = 0
        stream = self._file.stream
        self.fps = float(stream.average_rate or stream.guessed_rate or 0)
        area = stream.width * stream.height
        large = area >= _THREADED_FRAME and area * self.duration * self.fps >= _THREADED_CLIP
        self._threads = min(_MAX_THREADS, os.cpu_count() or 1) if large else 1
        # AVI stores no presentation times: with B-frames, the n-th frame shown takes the n-th
        # packet's time, and a seek would lose count.
        self._by_packets = self._file.format == "avi" and stream.codec_context.has_b_frames > 0
        self._seekable = not self._by_packets
        # Elsewhere FFmpeg's index holds no more than what it happened to come across.
        self._indexed = any(name in self._file.format for name in ("mp4", "matroska", "avi"))
        self._blind_seek = _BLIND_SEEK_SECONDS
        self._reformatter = VideoReformatter()
        self._matrix: tuple[int, int, int, int] | None = None
        self._whole: bool | None = None
        self._begin()

    @property
    def tolerance(self) -> float:
        """Seconds by which a header may overstate the end: max(1 s, two frame periods)."""
        return max(1.0, 2.0 / self.fps if self.fps else 0.0)

    def check_stored(self, time: float) -> None:
        """Finds a missing end early, by the index of an MP4 file and the file's size.

        Args:
            time: the last instant that is wanted, seconds.
        Raises:
            TruncatedError: what is shown then is not in the file.
        """
        file, entries = self._file, self._file.stream.index_entries
        if "mp4" not in file.format:
            return
        size = file.size
        lost = bisect.bisect_left(
            range(len(entries)), True, key=lambda i: entries[i].pos + entries[i].size > size
        )
        if lost == len(entries):
            return
        stored = max(0.0, self._seconds(entries[lost].timestamp + self._reorder))
        if time >= stored and self.duration - stored > self.tolerance:
            raise TruncatedError(
                f"{self.name}: the file is cut short "
                f"(it holds {stored:.1f} s of {self.duration:.1f} s)"
            )

    def info(self) -> VideoInfo:
        """Describes the file; the first frame is decoded, for it alone tells the rotation."""
        frame = self.frame_at(0.0)
        a, b, _, _ = self._display_matrix(frame)
        width, height = frame.width, frame.height
        if a:
            rotation = 0 if a > 0 else 180
        else:
            rotation = 90 if b > 0 else 270
            width, height = height, width
        return VideoInfo(
            path=self.name,
            container=self._file.format,
            codec=self._file.stream.codec_context.name,
            width=width,
            height=height,
            rotation=rotation,
            duration=self.duration,
            fps=self.fps,
        )

    def frame_at(self, time: float) -> av.VideoFrame:
        """Returns the frame shown at `time`: the last that starts no later, or the first frame.

        Args:
            time: seconds, not less than in the call before.
        Raises:
            TruncatedError: the file ends before `time`, and before its header says.
            DataError: nothing in the file can be decoded.
        """
        # A millionth of a tick absorbs the rounding of `time`, far below any frame's period.
        tick = math.floor(time / self._file.clock + 1e-6) + self._file.start
        margin = self._seek_margin(tick)
        if margin is not None:
            self._seek(tick, margin)
        if self._shown is None and self._next is None:
            self._next = next(self._frames, None)
            if self._next is None:
                raise DataError(f"{self.name}: no frame can be decoded: {AGAIN}")
        while self._next is not None and self._next.tick <= tick:
            self._shown, self._next = self._next, next(self._frames, None)
        if self._shown is None:
            return self._next.frame
        if self._next is None:
            self._check_whole(time)
        return self._shown.frame

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts by the frame's own colour matrix and range, upright: uint8[h, w, 3]."""
        picture = self._reformatter.reformat(frame, format="rgb24", threads=self._threads)
        picture = picture.to_ndarray()
        a, b, c, d = self._display_matrix(frame)
        if not a:
            picture = picture.swapaxes(0, 1)
            a, d = c, b
        if a < 0:
            picture = picture[:, ::-1]
        if d < 0:
            picture = picture[::-1]
        return np.ascontiguousarray(picture)

    def _seconds(self, tick: int) -> float:
        return (tick - self._file.start) * self._file.clock

    def _begin(self) -> None:
        """Sets everything at the start of the freshly opened file."""
        file = self._file
        if "matroska" in file.format and self.duration > _LOAD_CUES_SECONDS:
            try:
                # Any seek makes FFmpeg read the index, which is at the file's end.
                file.container.seek(file.start, stream=file.stream)
            except av.FFmpegError:
                self._seekable = False
                file.reopen()
        file.stream.thread_type = "AUTO" if self._threads > 1 else "SLICE"
        file.stream.codec_context.thread_count = self._threads
        entries = file.stream.index_entries
        # MP4's index counts decoding times: B-frames put them a fixed shift before those shown.
        self._reorder = max(0, file.start - entries[0].timestamp) if len(entries) else 0
        self._shown: _Stamped | None = None
        self._next: _Stamped | None = None
        self._frames = self._decode()

    def _decode(self) -> Iterator[_Stamped]:
        """Decodes from here to the end; damaged packets are counted and passed over."""
        packet_ticks: deque[int] = deque()
        period = round(1 / (self._file.clock * (self.fps or 25)))
        expected = self._file.start
        for packet in self._packets():
            if packet.size and packet.is_corrupt:
                self.damaged += 1
                continue
            if packet.size and self._by_packets:
                packet_ticks.append(packet.dts)
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.damaged += 1
                continue
            for frame in frames:
                tick = frame.pts if frame.pts is not None else frame.dts
                if packet_ticks:
                    tick = packet_ticks.popleft()
                if tick is None:
                    tick = expected
                expected = tick + period
                yield _Stamped(tick, frame)

    def _packets(self) -> Iterator[av.Packet]:
        errors = 0
        while errors < _MAX_READ_ERRORS:
            try:
                yield from self._file.container.demux(self._file.stream)
                return
            except av.FFmpegError:
                errors += 1
                self.damaged += 1

    def _seek_margin(self, tick: int) -> float | None:
        """Tells whether a seek saves decoding: seconds before `tick` to seek to, or None."""
        at = self._next or self._shown
        position = at.tick if at else self._file.start
        gap = (tick - position) * self._file.clock
        least = _SEEK_FRAMES / (self.fps or 25)
        if gap <= least or not self._seekable:
            return None
        entries = self._file.stream.index_entries
        key = entries.search_timestamp(tick - self._reorder) if len(entries) else -1
        if key >= 0:
            key_tick = entries[key].timestamp + self._reorder
            if (key_tick - position) * self._file.clock > least:
                return 0.0
            if self._indexed and entries[-1].timestamp + self._reorder >= tick:
                return None
        return _BLIND_SEEK_MARGIN if gap > self._blind_seek else None

    def _seek(self, tick: int, margin: float) -> None:
        """Moves to a key frame at or before `tick`, or starts again where that is not safe."""
        file, before = self._file, self._next or self._shown
        for more in (0.0, 2.0, 20.0):
            target = tick - self._reorder - round((margin + more) / file.clock)
            if target <= file.start:
                break
            try:
                file.container.seek(target, stream=file.stream)
            except av.FFmpegError:
                break
            frames = self._decode()
            # Frames before the first key frame may lean on pictures that the seek left out.
            found = next((f for f in frames if f.frame.key_frame or f.tick > tick), None)
            if found is not None and found.frame.key_frame and found.tick <= tick:
                if before is not None and found.tick <= before.tick:
                    self._blind_seek *= 2
                self._frames, self._shown, self._next = frames, None, found
                return
        # After frames were read, starting again costs dearly: it happens once at most.
        self._seekable = before is None
        file.reopen()
        self._begin()

    def _check_whole(self, time: float) -> None:
        """Is the file's last frame the video's last, to be held, or is the rest missing?"""
        if self._whole:
            return
        tick, frame = self._shown
        end = self._seconds(tick)
        if frame.duration:
            end += frame.duration * self._file.clock
        elif self.fps:
            end += 1.0 / self.fps
        if time < end:
            return
        # Sound that goes on shows that the file is whole, and its picture merely shorter.
        missing = self.duration - end > self.tolerance
        self._whole = not missing or self._file.sound_lasts(end + self.tolerance)
        if not self._whole:
            raise TruncatedError(
                f"{self.name}: the file is cut short "
                f"(decoded up to {end:.1f} s of {self.duration:.1f} s)"
            )

    def _display_matrix(self, frame: av.VideoFrame) -> tuple[int, int, int, int]:
        """The signs (a, b, c, d) of the display matrix: x' = a·x + c·y, y' = b·x + d·y.

        Turned to the nearest quarter: either a and d are zero, or b and c. Upright: (1, 0, 0, 1).
        """
        if self._matrix is None:
            data = frame.side_data.get("DISPLAYMATRIX")
            values = np.frombuffer(bytes(data), np.int32) if data else np.zeros(9, np.int32)
            a, b, c, d = (int(values[i]) for i in (0, 1, 3, 4))
            if abs(b) > abs(a) and b and c:
                self._matrix = (0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0)
            else:
                self._matrix = (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
        return self._matrix
