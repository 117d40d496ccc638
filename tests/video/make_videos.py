"""Encodes real test clips with PyAV: every frame carries its own number as a picture.

The number is drawn as a 4 x 4 grid of black and white blocks (16 bits), which survives lossy
codecs, resizing and colour conversion, so a test can tell exactly *which* frame it was given.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GRID = 4
RATE = 48000

VP9 = {"codec": "libvpx-vp9", "options": {"g": "25", "deadline": "realtime", "cpu-used": "8"}}
X265 = {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=25"}}
FORMATS = {
    "mp4-h264": {"options": {"g": "25"}},
    "mp4-h264-open-gop": {"options": {"g": "25", "x264-params": "open-gop=1:bframes=3"}},
    "mkv-h264": {"container": "matroska", "options": {"g": "25"}},
    "mkv-h264-intra-refresh": {
        "container": "matroska",
        "options": {"x264-params": "intra-refresh=1:keyint=25"},
    },
    "webm-vp9": {"container": "webm", **VP9},
    "avi-mpeg4": {"container": "avi", "codec": "mpeg4", "options": {"g": "25"}},
    "avi-mpeg4-b-frames": {"container": "avi", "codec": "mpeg4", "options": {"bf": "2"}},
    "avi-h264-b-frames": {"container": "avi", "options": {"g": "25"}},
    "mp4-mpeg4-b-frames": {"codec": "mpeg4", "options": {"g": "25", "bf": "2"}},
    "mp4-h265": X265,
    "mp4-av1": {"codec": "libsvtav1", "options": {"g": "25", "preset": "8"}},
    "mpegts-h264": {"container": "mpegts", "options": {"g": "25"}},
    "mp4-fragmented": {
        "options": {"g": "25"},
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
}


def numbered_frame(number: int, width: int = 64, height: int = 64) -> np.ndarray:
    """Draws `number` (0 to 65535) as black and white blocks: uint8[height, width, 3]."""
    bits = np.array([(number >> i) & 1 for i in range(GRID * GRID)], dtype=np.uint8)
    picture = np.full((height, width, 3), 16, dtype=np.uint8)
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    picture[bits.reshape(GRID, GRID)[rows][:, columns] == 1] = 235
    return picture


def numbered_frames(count: int, width: int = 64, height: int = 64) -> Iterable[np.ndarray]:
    """Yields frames numbered 0 to count - 1, each uint8[height, width, 3]."""
    return (numbered_frame(i, width, height) for i in range(count))


def read_number(frame: np.ndarray) -> int:
    """Reads the number back from uint8[h, w, 3], by the brightness at each block's centre."""
    height, width = frame.shape[:2]
    rows = (np.arange(GRID) * 2 + 1) * height // (2 * GRID)
    columns = (np.arange(GRID) * 2 + 1) * width // (2 * GRID)
    bits = frame[rows][:, columns].mean(axis=-1) > 127
    return int(sum(1 << i for i, bit in enumerate(bits.reshape(-1)) if bit))


def read_numbers(frames: np.ndarray) -> list[int]:
    """`read_number` of every frame of uint8[T, h, w, 3]."""
    return [read_number(frame) for frame in frames]


def encode(
    target: str | os.PathLike | None,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction | int = 10,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    time_base: Fraction | None = None,
    pixel_format: str = "yuv420p",
    sound: bool = False,
    longer_sound: float = 0.0,
    sound_start: float = 0.0,
    silence: str = "",
) -> bytes:
    """Encodes RGB frames, and writes them to `target` where one is given.

    Args:
        target: file to write, or None for bytes alone.
        frames: uint8[h, w, 3] each.
        fps: frames per second.
        codec, container, options, container_options: as FFmpeg names them.
        times: presentation time of each frame in seconds, for a variable frame rate.
        time_base: clock of the stream; by default 1 / fps, or 1/1000 s with `times`.
        pixel_format: what the encoder is given.
        sound: adds a track of silent AAC (Opus in WebM) as long as the video, ...
        longer_sound: ... and by so many seconds longer.
        sound_start: when the sound begins, seconds.
        silence: adds the track of sound, in this codec.
    Returns:
        The encoded file.
    """
    clock = time_base or (Fraction(1, 1000) if times is not None else 1 / Fraction(fps))
    # A real file, not a buffer: FFmpeg opens it a second time to move MP4's index to the front.
    scratch = tempfile.TemporaryDirectory()
    path = Path(scratch.name) / "clip"
    with (
        _same_priority(),
        av.open(str(path), "w", format=container, options=container_options or {}) as output,
    ):
        stream = output.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = clock
        audio = None
        if sound or silence:
            usual = "libopus" if container == "webm" else "aac"
            audio = output.add_stream(silence or usual, rate=RATE)
            audio.layout = "mono"
        sounded = round(sound_start * RATE)
        for i, picture in enumerate(frames):
            if i == 0:
                stream.height, stream.width = picture.shape[:2]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = clock
            last = times[i] if times is not None else float(i / Fraction(fps))
            frame.pts = round(last / clock)
            output.mux(stream.encode(frame))
            # Interleaved, as cameras write it.
            while audio is not None and sounded < (last + 1 / Fraction(fps)) * RATE:
                output.mux(audio.encode(_silence(sounded, 960, bool(silence))))
                sounded += 960
        output.mux(stream.encode(None))
        if audio is not None:
            while sounded < (last + 1 / Fraction(fps) + longer_sound) * RATE:
                output.mux(audio.encode(_silence(sounded, 960, bool(silence))))
                sounded += 960
            output.mux(audio.encode(None))
    data = path.read_bytes()
    scratch.cleanup()
    if target is not None:
        Path(target).write_bytes(data)
    return data


def encode_sound(target: str | os.PathLike, seconds: float = 1.0) -> None:
    """Writes an MP4 file with a silent sound track and no picture."""
    with av.open(str(target), "w", format="mp4") as output:
        audio = output.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        for start in range(0, int(seconds * RATE), 1024):
            output.mux(audio.encode(_silence(start, 1024)))
        output.mux(audio.encode(None))


@contextlib.contextmanager
def _same_priority() -> Iterator[None]:
    """SVT-AV1, run as root, gives the thread that opens it real-time priority. Whatever that starts
    later would inherit it: XLA's threads, which wait in a loop, would then stop all others."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


def _silence(start: int, samples: int, pcm: bool = False) -> av.AudioFrame:
    kind, name = (np.int16, "s16") if pcm else (np.float32, "fltp")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), kind), format=name, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = RATE, start, Fraction(1, RATE)
    return frame


def with_display_matrix(data: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """Writes a display matrix (a, b, c, d) into an MP4 file's first track header (version 0).

    (0, 1, -1, 0) is what a phone held upright writes: the stored picture is shown turned by 90
    degrees clockwise.
    """
    at = data.index(b"tkhd")
    a, b, c, d = (value << 16 for value in matrix)
    # ISO/IEC 14496-12, 8.3.2: the matrix starts 40 bytes into the body of a version 0 header.
    start = at + 4 + 40
    packed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return data[:start] + packed + data[start + 36 :]


def repeat(source: str | os.PathLike, target: str | os.PathLike, times: int) -> None:
    """Writes the encoded pictures of `source` `times` times one after the other, into MP4.

    A video of hours is made in a moment, for nothing is encoded anew.
    """
    with av.open(str(source)) as original, av.open(str(target), "w", format="mp4") as output:
        track = original.streams.video[0]
        copy = output.add_stream_from_template(track)
        for turn in range(times):
            if turn:
                original.seek(0, stream=track)
            for packet in original.demux(track):
                if packet.dts is None:
                    continue
                packet.pts += turn * track.duration
                packet.dts += turn * track.duration
                packet.stream = copy
                output.mux(packet)


def add_cover(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the tracks of `source` into an MP4 file and attaches a cover picture."""
    with av.open(str(source)) as original, av.open(str(target), "w", format="mp4") as output:
        cover = output.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 300, 300, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        copies = {s.index: output.add_stream_from_template(s) for s in original.streams}
        picture = av.VideoFrame.from_ndarray(np.full((300, 300, 3), 200, np.uint8), "rgb24")
        picture.pts, picture.time_base = 0, Fraction(1)
        output.mux(cover.encode(picture))
        for packet in original.demux():
            if packet.dts is not None:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)


def with_hole(data: bytes, start: float, end: float) -> bytes:
    """Zeros from one share of a file to another, as a disk leaves what was never written."""
    first, last = int(len(data) * start), int(len(data) * end)
    return data[:first] + bytes(last - first) + data[last:]


def with_matrix(path: str | os.PathLike, count: int, matrix: int) -> None:
    """Writes an MP4 file of numbered frames that names a colour matrix, by FFmpeg's number."""
    with av.open(os.fspath(path), "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = matrix
        for i, picture in enumerate(numbered_frames(count)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base, frame.colorspace = i, Fraction(1, 10), matrix
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def numbers_at(times: np.ndarray, fps: float, count: int) -> list[int]:
    """The numbers of the frames shown at `times`, in seconds, of `count` frames at `fps`."""
    return [min(math.floor(time * fps + 1e-9), count - 1) for time in times]
