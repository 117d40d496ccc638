"""What packets tell: the times of frames that carry none, and damage that decoders conceal."""

from __future__ import annotations

import bisect
from collections import deque

import av

from adacm2_jax.video.container import VideoFile
from adacm2_jax.video.timing import BACKWARD_SLACK, Timing, goes_back, next_slot

# Codecs none of whose pictures begins with so many zero bytes.
_NEVER_ZERO = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg", "msmpeg", "wmv", "mjpeg")
_HEAD = bytes(8)
# A run of zeros as long as a disk's block is what is left of pieces that were never written.
_HOLE = bytes(512)
# Pictures that come later than so many frames after the one before make it worth a look.
_LATE_FRAMES = 2.5
# With B-frames, FFmpeg tells the time after a gap some packets later.
_LAST_PACKETS = 20
# A packet of ASF may lie anywhere in a larger one.
_LARGE_PACKET = 1 << 16
_BLOCK, _MOST_BLOCKS = 1 << 20, 64


class FrameClock:
    """Times of the frames of a file that stores times of packets alone.

    Packets come in the order of decoding, frames in the order of showing. So the n-th frame shown
    takes the time of the n-th packet. A packet whose frame never came has to be noticed, or all
    frames after it would be shown early: a frame may be overtaken by no more than `depth` of those
    decoded later, and by none that is a key frame.
    """

    def __init__(self) -> None:
        self._sent: deque[int] = deque()
        self._free: deque[int] = deque()

    def send(self, tick: int) -> None:
        """A packet goes to the decoder; `tick` is its own, and grows."""
        self._sent.append(tick)
        self._free.append(tick)

    def show(self, sent: int | None, key: bool, depth: int) -> int | None:
        """The tick at which a frame is shown.

        Args:
            sent: tick of its packet, if the decoder tells.
            key: whether it is a key frame.
            depth: frames that may overtake another.
        Returns:
            None if there are more frames than packets.
        """
        if sent is not None:
            place = bisect.bisect_left(self._sent, sent)
            for _ in range(place if key else max(0, place - depth)):
                self._sent.popleft()
                self._free.popleft()
            if sent in self._sent:
                self._sent.remove(sent)
            elif self._sent:
                self._sent.popleft()
        return self._free.popleft() if self._free else None


class PacketReader:
    """Reads packets on, looks for damage, and gives packets and frames their times.

    Attributes:
        passed_over: packets that could not be read or decoded so far.
        damaged_frames: frames whose decoder had to conceal errors.
        lost: seconds without a frame where the file has a hole.

    Args:
        file: whose packets are read.
        timing: of the file.
    """

    def __init__(self, file: VideoFile, timing: Timing):
        self._file, self._timing = file, timing
        codec = file.stream.codec_context.name
        self._never_zero = codec.startswith(_NEVER_ZERO)
        self._period = max(1, round(1 / (file.clock * (timing.fps or 25))))
        self._slack = BACKWARD_SLACK / file.clock if timing.counted else 0.0
        # The silence of uncompressed sound is zeros, too.
        self._silent = any(
            track.codec_context is not None and track.codec_context.name.startswith("pcm")
            for track in file.container.streams.audio
        )
        self._spread = "asf" in file.format
        self._indexed = file.format == "avi" and len(file.stream.index_entries) > 0
        self.passed_over, self.damaged_frames, self.lost = 0, 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Forgets what came before: packets come from another place now."""
        self._clock = FrameClock() if self._timing.by_packets else None
        self._expected = self._expected_slot = self._timing.start
        self._place = 0
        self._last: int | None = None
        self._stamps: tuple[int, ...] = ()
        self._behind = 0
        self._gaps: deque[tuple[int, int]] = deque(maxlen=_LAST_PACKETS)
        self.end: int | None = None

    def report(self) -> str:
        """The damage so far, in words; empty if there is none."""
        found = []
        if self.passed_over:
            found.append(f"damaged packets passed over: {self.passed_over}")
        if self.damaged_frames:
            found.append(f"frames with concealed damage: {self.damaged_frames}")
        if self.lost:
            found.append(f"the file has holes, where frames of {self.lost:.1f} s are lost")
        return "; ".join(found)

    def decode(self, packet: av.Packet) -> list[tuple[int, av.VideoFrame]]:
        """Decodes a packet, or the rest with PyAV's empty one: frames and their ticks.

        Raises:
            DataError: the clock goes back.
        """
        if packet.size and not self._take(packet):
            self.passed_over += 1
            return []
        try:
            frames = packet.decode()
        except av.FFmpegError:
            self.passed_over += 1
            return []
        stamped = []
        for frame in frames:
            if not isinstance(frame, av.VideoFrame):
                continue
            tick = frame.pts if frame.pts is not None else frame.dts
            if self._clock is not None:
                depth = self._file.stream.codec_context.reorder_depth
                tick = self._clock.show(frame.pts, bool(frame.key_frame), depth)
            if tick is None:
                tick = self._expected
            self._expected = tick + self._period
            self.damaged_frames += bool(frame.is_corrupt)
            stamped.append((tick, frame))
        return stamped

    def _take(self, packet: av.Packet) -> bool:
        """Notes place and time of a packet; False if it is not worth decoding."""
        stamp = packet.dts if packet.dts is not None else packet.pts
        if self._clock is not None:
            stamp = self._slot(packet)
            self._clock.send(stamp)
            packet.pts = stamp  # comes back with the packet's frame
        late = 0
        if stamp is not None:
            self._check_forward(stamp)
            late = stamp - self._last if self._last is not None else 0
            self._last = stamp
        self._note_place(packet)
        if late > _LATE_FRAMES * self._period and self._has_hole():
            self.lost += (late - self._period) * self._file.clock
        zero = self._never_zero and bytes(memoryview(packet)[:8]) == _HEAD
        return not (packet.is_corrupt or zero)

    def _slot(self, packet: av.Packet) -> int:
        """The tick of a packet where only those are known."""
        slot = next_slot(self._expected_slot, packet.pts, packet.dts, self._slack)
        if self._indexed and packet.pos is not None:
            # The demuxer counts chunks, and after damage it has missed some; the index has all.
            entries = self._file.stream.index_entries
            at = packet.pos - 8
            if self._place >= len(entries) or entries[self._place].pos != at:
                self._place = bisect.bisect_left(
                    range(len(entries)), at, key=lambda i: entries[i].pos
                )
            if self._place < len(entries) and entries[self._place].pos == at:
                slot = entries[self._place].timestamp
                self._place += 1
        self._expected_slot = slot + (packet.duration or self._period)
        return slot

    def _check_forward(self, stamp: int) -> None:
        stamps = self._stamps
        if len(stamps) == 2 and stamp < min(stamps) - BACKWARD_SLACK / self._file.clock:
            self._behind += 1
            if self._behind == 2:
                clock = self._file.clock
                raise goes_back(self._file.name, min(stamps) * clock, stamp * clock)
            return
        self._behind = 0
        self._stamps = (*stamps[-1:], stamp)

    def _note_place(self, packet: av.Packet) -> None:
        """Notes bytes of the file that belong to no packet of the picture."""
        if packet.pos is None:
            if self.end is not None:
                self.end += packet.size
            return
        if self.end is not None:
            start, end = self.end, packet.pos
            if self._spread:
                start, end = start - _LARGE_PACKET, max(end, start) + _LARGE_PACKET
            if end - start >= len(_HOLE):
                self._gaps.append((max(0, start), end))
        self.end = packet.pos + packet.size

    def _has_hole(self) -> bool:
        """Tells whether there are zeros between the last packets."""
        while self._gaps and not self._silent:
            if self._has_zeros(*self._gaps.popleft()):
                return True
        return False

    def _has_zeros(self, start: int, end: int) -> bool:
        for place in range(start, min(end, start + _MOST_BLOCKS * _BLOCK), _BLOCK):
            # Blocks overlap, so that no run is cut in two.
            block = self._file.read(place, min(_BLOCK + len(_HOLE), end - place))
            if _HOLE in block:
                return True
        return False
