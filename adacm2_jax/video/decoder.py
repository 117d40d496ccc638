"""Which frame of a video is shown at an instant: one pass forward, with seeks where they save work.

`frames.py` chooses the instants and resizes the frames.
Times are seconds from the file's start; ticks are the picture track's own clock.
"""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.video.container import VideoFile
from adacm2_jax.video.info import AGAIN, Source, TruncatedError, VideoInfo
from adacm2_jax.video.packets import PacketReader
from adacm2_jax.video.pixels import Painter
from adacm2_jax.video.timing import is_whole_matroska, measure, tolerance

# Decoder threads cost more than they save below so many pixels in a frame, or in the whole clip.
_THREADED_FRAME = 150_000
_THREADED_CLIP = 32_000_000
# Each thread holds a frame, and a data loader runs several decoders at once.
_MAX_THREADS = 8
# Shorter Matroska files are read forward without looking at their index.
_LOAD_CUES_SECONDS = 10.0
# A seek empties the decoder's pipeline, which is worth about this many frames of decoding.
_SEEK_FRAMES = 12
# Where no index tells the key frames, a seek is tried over gaps from this many seconds on, ...
_BLIND_SEEK_SECONDS = 30.0
# ... to so many seconds before the instant, where some key frame will follow in time.
_BLIND_SEEK_MARGIN = 10.0


class _Stamped(NamedTuple):
    tick: int
    frame: av.VideoFrame


class Decoder:
    """Reads one video forward: `frame_at` for instants that do not decrease.

    Attributes:
        name: the file, in messages.
        begins: of the picture, seconds from the file's start; above 0 where sound comes first.
        duration: seconds from the file's start to the picture's end.
        fps: average frames per second; 0.0 where the file does not say.

    Args:
        source: a path, or the encoded file's bytes.
        threads: that it may use at most; None for as many as there are cores.
    Raises:
        DataError: the source is missing, empty, incomplete, or no video.
    """

    def __init__(self, source: Source, threads: int | None = None):
        self._file = VideoFile(source)
        self.name = self._file.name
        self._timing = measure(self._file)
        self.begins, self.duration = self._timing.begins, self._timing.duration
        self.fps = self._timing.fps
        context = self._file.stream.codec_context
        area = context.width * context.height
        large = area >= _THREADED_FRAME and area * self.duration * self.fps >= _THREADED_CLIP
        self._threads = min(_MAX_THREADS, threads or os.cpu_count() or 1) if large else 1
        self._seekable = self._timing.seekable
        # Elsewhere FFmpeg's index holds no more than what it happened to come across.
        self._indexed = any(name in self._file.format for name in ("mp4", "matroska", "avi"))
        self._blind_seek = _BLIND_SEEK_SECONDS
        self._painter = Painter(self._threads)
        self._read_errors: list[str] = []
        self._packets = PacketReader(self._file, self._timing)
        self._whole: bool | None = None
        self._shown: _Stamped | None = None
        self._next: _Stamped | None = None
        self._begin()

    def warnings(self) -> list[str]:
        """What was passed over so far, a line each."""
        found = []
        self._packets.passed_over += len(self._read_errors)
        self._read_errors.clear()
        if damage := self._packets.report():
            found.append(f"{self.name}: {damage}")
        if self._painter.unknown_matrix is not None:
            found.append(
                f"{self.name}: its colour matrix (number {self._painter.unknown_matrix}) cannot be "
                "converted, so colours are taken as of a video that names none"
            )
        return found

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
        if time >= stored and self.duration - stored > tolerance(self.fps):
            raise TruncatedError(
                f"{self.name}: the file is cut short "
                f"(it holds {stored:.1f} s of {self.duration:.1f} s)"
            )

    def info(self) -> VideoInfo:
        """Describes the file; the first frame is decoded, for it alone tells the rotation."""
        frame = self.frame_at(0.0)
        a, b, _, _ = self._painter.display_matrix(frame)
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
            DataError: nothing in the file can be decoded, or its clock goes back.
        """
        # A millionth of a tick absorbs the rounding of `time`, far below any frame's period.
        tick = math.floor((time - self.begins) / self._file.clock + 1e-6) + self._timing.start
        target = self._seek_target(tick)
        if target is not None:
            self._seek(tick, target)
        if self._shown is None and self._next is None:
            self._next = next(self._frames, None)
            if self._next is None:
                raise DataError(f"{self.name}: no frame can be decoded: {AGAIN}")
        while self._next is not None and self._next.tick <= tick:
            self._shown, self._next = self._next, next(self._frames, None)
        if self._next is not None:
            return (self._shown or self._next).frame
        assert self._shown is not None
        self._check_whole(time, self._shown)
        return self._shown.frame

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts by the frame's own colour matrix and range, upright: uint8[h, w, 3]."""
        return self._painter.to_rgb(frame)

    def _seconds(self, tick: int) -> float:
        return (tick - self._timing.start) * self._file.clock + self.begins

    def _begin(self) -> None:
        """Sets everything at the start of the freshly opened file."""
        file = self._file
        if "matroska" in file.format and self.duration > _LOAD_CUES_SECONDS:
            # Any seek makes FFmpeg read the index, which is at the file's end.
            if not file.seek(self._timing.start):
                self._seekable = False
                file.reopen()
        file.stream.thread_type = "AUTO" if self._threads > 1 else "SLICE"
        file.stream.codec_context.thread_count = self._threads
        entries = file.stream.index_entries
        # MP4's index counts decoding times: B-frames put them a fixed shift before those shown.
        shift = self._timing.start - entries[0].timestamp if len(entries) else 0
        self._reorder = max(0, shift)
        self._shown = self._next = None
        self._frames = self._decode()

    def _decode(self) -> Iterator[_Stamped]:
        """Decodes from here to the end; damaged packets are counted and passed over."""
        self._packets.restart()
        for packet in self._file.packets(self._read_errors):
            for tick, frame in self._packets.decode(packet):
                yield _Stamped(tick, frame)

    def _seek_target(self, tick: int) -> int | None:
        """Tells whether a seek saves decoding: the tick to seek to, or None."""
        at = self._next or self._shown
        position = at.tick if at else self._timing.start
        gap = (tick - position) * self._file.clock
        least = _SEEK_FRAMES / (self.fps or 25)
        if gap <= least or not self._seekable:
            return None
        entries = self._file.stream.index_entries
        key = entries.search_timestamp(tick - self._reorder) if len(entries) else -1
        if key >= 0:
            key_tick = entries[key].timestamp + self._reorder
            if (key_tick - position) * self._file.clock > least:
                # When it is shown, not when it is decoded: FFmpeg would go to the one before.
                return key_tick
            if self._indexed and entries[-1].timestamp + self._reorder >= tick:
                return None
        if gap <= self._blind_seek:
            return None
        return tick - self._reorder - round(_BLIND_SEEK_MARGIN / self._file.clock)

    def _seek(self, tick: int, target: int) -> None:
        """Moves to a key frame at or before `tick`, or starts again where that is not safe."""
        file, before = self._file, self._next or self._shown
        for more in (0.0, 2.0, 20.0):
            place = target - round(more / file.clock)
            if place <= self._timing.start or not file.seek(place):
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

    def _check_whole(self, time: float, last: _Stamped) -> None:
        """Is the file's last frame the video's last, to be held, or is the rest missing?"""
        if self._whole:
            return
        end = self._seconds(last.tick)
        if last.frame.duration:
            end += last.frame.duration * self._file.clock
        elif self.fps:
            end += 1.0 / self.fps
        if time < end:
            return
        slack = tolerance(self.fps)
        # Sound that goes on shows that the file is whole, and its picture merely shorter.
        self._whole = (
            self.duration - end <= slack
            or is_whole_matroska(self._file, self._packets.end)
            or self._file.sound_lasts(self._on_file_clock(end + slack))
        )
        if not self._whole:
            raise TruncatedError(
                f"{self.name}: the file is cut short "
                f"(decoded up to {end:.1f} s of {self.duration:.1f} s)"
            )

    def _on_file_clock(self, time: float) -> float:
        return time - self.begins + self._timing.start * self._file.clock
