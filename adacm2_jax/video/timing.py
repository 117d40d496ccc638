"""When a video's picture begins and ends, and whether its clock can be trusted.

MP4, Matroska and AVI tell by their headers and indexes. All others are read through once, packets
alone: their headers say nothing, or leave open what they count from. That takes some 3 s for a
gigabyte.
"""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

import av
import numpy as np

from adacm2_jax.errors import DataError
from adacm2_jax.video.container import VideoFile

#: Seconds by which a clock may go back; damaged stamps and rounding stay below.
BACKWARD_SLACK = 1.0
# Stamps are in order but for the few frames that B-frames exchange.
_REORDERED = 64
# A Matroska file that begins later than this is read through: not all programs count its length
# from the same instant.
_LATE_START = 0.5
# Of more packets without time stamp than one in so many the frames are counted instead.
_FEW_UNTIMED = 20
# FFmpeg's flag of formats without time stamps, AVFMT_NOTIMESTAMPS.
_NO_TIMESTAMPS = 0x80
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"


class Timing(NamedTuple):
    """When the picture is shown.

    Attributes:
        start: tick at which the picture begins; with `by_packets`, of its first packet.
        begins: seconds from the file's start to the picture's: above 0 where sound comes first.
        duration: seconds from the file's start to the picture's end.
        fps: average frames per second; 0.0 where the file does not say.
        by_packets: frames have no time stamps of their own; the n-th shown takes the time of the
            n-th packet.
        counted: nor have packets, or not to be trusted; they follow each other by their lengths.
        seekable: whether time stamps stay right after a seek.
    """

    start: int
    begins: float
    duration: float
    fps: float
    by_packets: bool
    counted: bool
    seekable: bool


class _Scan(NamedTuple):
    """All packets: first tick shown, first slot, seconds of the whole, of one frame, and how."""

    start: int
    first_slot: int
    seconds: float
    period: float
    untimed: bool


def measure(file: VideoFile) -> Timing:
    """Finds when the picture begins and ends.

    Raises:
        DataError: the clock goes back, as in files that were put one behind the other.
    """
    _check_single(file)
    stream, clock = file.stream, file.clock
    average, reordered = stream.average_rate, stream.codec_context.reorder_depth > 0
    fps = float(average or stream.guessed_rate or 0)
    start = stream.start_time or 0
    untimed = bool(file.container.format.flags & _NO_TIMESTAMPS)
    seconds = 0.0
    # AVI stores no presentation times; nor does Matroska in the way it takes over codecs from AVI.
    by_packets = file.format == "avi"
    if by_packets:
        seconds = max((stream.duration or 0) * clock, _cut_avi_duration(file))
    elif "mp4" in file.format and stream.frames:
        seconds = _mp4_duration(file)
    elif "matroska" in file.format:
        by_packets = stream.codec_context.codec_tag.strip("\0") != ""
        seconds = _matroska_duration(file)
    first = start
    counted = False
    if not seconds:
        scan = _scan(file)
        seconds, start, first = _length(file, scan), scan.start, scan.start
        if scan.untimed:
            by_packets, first = True, scan.first_slot
            counted = untimed or file.format == "mpeg"
        if scan.period and (untimed or not average):
            fps = 1.0 / scan.period
    begins = round(start * clock - _origin(file, start), 9)  # rounding leaves no 1e-16
    return Timing(
        start=first,
        begins=begins,
        duration=begins + seconds,
        fps=fps,
        by_packets=by_packets,
        counted=counted,
        seekable=not untimed and not (by_packets and reordered),
    )


def tolerance(fps: float) -> float:
    """Seconds by which a header may overstate the end: max(1 s, two frame periods)."""
    return max(1.0, 2.0 / fps if fps else 0.0)


def next_slot(expected: int | None, pts: int | None, dts: int | None, slack: float) -> int:
    """The time of a packet, in ticks, of a file that does not tell those of frames.

    Args:
        expected: where the packet before ends; None for the first.
        pts, dts: stamps of the packet.
        slack: ticks by which the stamp may be wrong.
    """
    if dts is None:
        return expected if expected is not None else pts or 0
    return dts if expected is None or abs(dts - expected) > slack else expected


def goes_back(name: str, before: float, after: float) -> DataError:
    """What to tell people of a clock that goes back; seconds of the file's own clock."""
    return DataError(
        f"{name}: its clock goes back from {before:.1f} s to {after:.1f} s (files put one behind "
        "the other?): remux it, for example by ffmpeg -i FILE -c copy FILE.mp4, or give the parts"
    )


def is_whole_matroska(file: VideoFile, after: int | None) -> bool:
    """Tells whether a Matroska file has all bytes that it should: its picture may then end early.

    Args:
        file: any video file.
        after: where the picture's last packet ends, bytes.
    """
    end = _matroska_end(file) if "matroska" in file.format else 0
    if not end or after is None or end > file.size:
        return False
    # A download may have its full length beforehand, filled with zeros.
    return bytes(512) not in file.read(after, 1 << 20) and any(file.read(end - 512, 512))


def _origin(file: VideoFile, start: int) -> float:
    """Seconds of the file's own clock at its start: that of its first sound or picture."""
    earliest = file.container.start_time
    own = start * file.clock
    if earliest is None:
        return own
    # Sound before zero is what an encoder puts before the first sample; players leave it out.
    return min(own, max(0.0, earliest / av.time_base)) if own >= 0 else own


def _scan(file: VideoFile) -> _Scan:
    """Reads all packets and decodes nothing.

    Raises:
        DataError: the clock goes back.
    """
    shown, decoded, slots = array("q"), array("q"), array("q")
    period = max(1, round(1.0 / (float(file.stream.guessed_rate or 25) * file.clock)))
    untimed, slot, length = 0, None, 0
    # A program stream has one stamp for all the frames that begin in one of its packs of 2 KB, and
    # FFmpeg may give it to the wrong one.
    counted = file.format == "mpeg" or bool(file.container.format.flags & _NO_TIMESTAMPS)
    slack = BACKWARD_SLACK / file.clock
    latest, last_length, end_of_packets = None, 0, 0
    for packet in file.packets():
        if not packet.size:
            continue
        pts, dts = packet.pts, packet.dts
        length = packet.duration or period
        slot = next_slot(slot, pts, dts, slack if counted else 0)
        slots.append(slot)
        slot += length
        untimed += pts is None
        if pts is not None:
            if latest is None or pts > latest:
                latest, last_length = pts, packet.duration or 0
            shown.append(pts)
        stamp = dts if dts is not None else pts
        if stamp is not None:
            decoded.append(stamp)
        end_of_packets = (packet.pos or 0) + packet.size
    _check_last(file, end_of_packets)
    file.reopen()
    if not slots:
        return _Scan(0, 0, period * file.clock, 0.0, False)
    _check_forward(file, np.array(decoded))
    unsteady = file.format == "mpeg" and bool(np.any(np.diff(np.array(decoded)) <= 0))
    if unsteady or untimed * _FEW_UNTIMED > len(slots):
        first, end = slots[0], slots[-1] + length
        mean = (end - first) / len(slots) * file.clock
        start = shown[0] if shown else first
        return _Scan(start, first, (end - first) * file.clock, mean, True)
    gaps = np.diff(np.unique(np.array(shown)))
    typical = float(np.median(gaps)) if len(gaps) else float(last_length or period)
    # The length of the last frame is stored, or else guessed by FFmpeg from a mean rate.
    stored = any(name in file.format for name in ("mp4", "matroska", "nut"))
    last = last_length if stored and last_length else typical
    # Not over all stamps: a damaged one may be anywhere.
    start, end = min(shown[:_REORDERED]), max(shown[-_REORDERED:])
    seconds = (end - start + last) * file.clock
    return _Scan(start, slots[0], seconds, typical * file.clock if len(gaps) else 0.0, False)


def _check_forward(file: VideoFile, stamps: np.ndarray) -> None:
    """Looks for a clock that goes back and stays there; one wrong stamp alone is damage."""
    if len(stamps) < 4:
        return
    before = np.minimum(stamps[:-3], stamps[1:-2])
    after = np.maximum(stamps[2:-1], stamps[3:])
    back = np.flatnonzero(after < before - BACKWARD_SLACK / file.clock)
    if len(back):
        at = back[0]
        raise goes_back(file.name, before[at] * file.clock, after[at] * file.clock)


def _length(file: VideoFile, scan: _Scan) -> float:
    """The picture's seconds by its packets, or by the header of a file that is cut short."""
    named = ("mp4", "matroska", "flv", "asf", "nut", "ogg", "ivf")
    if not any(name in file.format for name in named):
        return scan.seconds
    claim = (file.stream.duration or 0) * file.clock
    claim = claim or (file.container.duration or 0) / av.time_base
    # Some count from the clock's zero, some from the first packet or the first frame shown.
    claims = [claim - zero * file.clock for zero in (0, scan.first_slot, scan.start)]
    claim = min(claims, key=lambda seconds: abs(seconds - scan.seconds))
    slack = tolerance(1.0 / scan.period if scan.period else 0.0)
    if claim - scan.seconds <= slack:
        return scan.seconds
    end = scan.start * file.clock + scan.seconds
    return scan.seconds if file.sound_lasts(end + slack) else claim


def _mp4_duration(file: VideoFile) -> float:
    """The track's length; with B-frames, up to the end of the frame shown last.

    The header adds up decoding times. With a variable frame rate those of B-frames end before the
    frames shown do, so the last group of pictures is asked.
    """
    stream, clock = file.stream, file.clock
    start, claim = stream.start_time or 0, (stream.duration or 0) * clock
    entries = stream.index_entries
    if not stream.codec_context.has_b_frames or not len(entries):
        return claim
    end = 0
    if file.seek(entries[-1].timestamp):
        for packet in file.packets():
            if packet.size and packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0))
    if not file.seek(entries[0].timestamp):
        file.reopen()
    return max(claim, (end - start) * clock)


def _matroska_duration(file: VideoFile) -> float:
    """The track's length by the header; 0.0 if it does not say or leaves open what it counts."""
    start = (file.stream.start_time or 0) * file.clock
    if start > _LATE_START:
        return 0.0
    # The header gives the longest track's length; a tag, where written, the track's own.
    tag = _tag_seconds(file.stream.metadata.get("DURATION")) - start
    claims = [tag, (file.container.duration or 0) / av.time_base - start]
    return min((seconds for seconds in claims if seconds > 0), default=0.0)


def _tag_seconds(tag: str | None) -> float:
    """Reads Matroska's "HH:MM:SS.nnnnnnnnn"; 0.0 where there is none or it cannot be read."""
    try:
        hours, minutes, seconds = (tag or "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _matroska_end(file: VideoFile) -> int:
    """Where a Matroska file ends by its own account, bytes; 0 where it does not say."""
    head = file.read(0, 256)
    at = head.find(_SEGMENT) + len(_SEGMENT)
    if not head.startswith(_EBML) or at < len(_SEGMENT) or len(head) < at + 8:
        return 0
    # A number of n bytes begins with n - 1 zero bits and a one; all ones stand for "unknown".
    count = 9 - head[at].bit_length()
    if count > 8:
        return 0
    size = int.from_bytes(head[at : at + count], "big") & ((1 << 7 * count) - 1)
    return 0 if size == (1 << 7 * count) - 1 else at + count + size


def _check_single(file: VideoFile) -> None:
    """Finds a second file behind the end of the first, which a reader would not come to."""
    again = False
    if "matroska" in file.format and (end := _matroska_end(file)):
        again = file.read(end, 4) == _EBML
    elif file.format == "avi":
        head = file.read(struct.unpack("<I", file.read(4, 4))[0] + 8, 12)
        again = head[:4] == b"RIFF" and head[8:] == b"AVI "  # "AVIX" is the same file's next part
    if again:
        raise _several(file)


def _check_last(file: VideoFile, end: int) -> None:
    """Finds a second file behind the last packet, at which some demuxers stop."""
    head = file.read(0, 9)
    if any(name in file.format for name in ("flv", "asf", "nut")):
        # After the picture's last packet some sound may come.
        if head in file.read(end, 1 << 20):
            raise _several(file)


def _several(file: VideoFile) -> DataError:
    return DataError(
        f"{file.name}: is several files, one behind the other: give them one by one, or join them "
        "by ffmpeg -f concat"
    )


def _cut_avi_duration(file: VideoFile) -> float:
    """What a cut AVI file's header says, which FFmpeg replaces by a guess; 0.0 if not cut."""
    head = file.read(0, 4096)
    at = head.find(b"avih") + 8
    if at < 8 or len(head) < at + 20:
        return 0.0
    if struct.unpack_from("<I", head, 4)[0] + 8 <= file.size:
        return 0.0
    # The main header begins with microseconds a frame; its fifth number counts the frames.
    period, _, _, _, frames = struct.unpack_from("<5I", head, at)
    return period * frames / 1e6
