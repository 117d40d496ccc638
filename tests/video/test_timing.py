"""Clocks: missing stamps, clocks that go back or begin late, and where the picture ends."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.decoder import TruncatedError
from adacm2_jax.video.frames import Sampling, probe, read_clip, read_frames
from adacm2_jax.video.packets import FrameClock
from tests.video.make_videos import (
    FORMATS,
    VP9,
    X265,
    encode,
    numbered_frame,
    numbered_frames,
    read_number,
    read_numbers,
    with_hole,
)

KEYS = {"g": "25"}
MPEG2 = {"codec": "mpeg2video", "fps": 25, "options": {"g": "12", "bf": "2"}}
DASH = {"container_options": {"movflags": "dash+frag_keyframe+delay_moov"}}


def numbers(data: bytes, sampling: Sampling | None = None, **options: object) -> list[int]:
    sampling = sampling or Sampling(fps=10)
    return read_numbers(read_clip(data, sampling, size=64, on_warning=fail, **options))


def fail(message: str) -> None:
    raise AssertionError(message)


# --- packets without time stamps ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fps", "how"),
    [
        (10, {"container": "h264", "options": KEYS}),
        (10, {"container": "h264", "options": KEYS | {"bf": "0"}}),
        (10, {"container": "hevc", **X265}),
        (25, {"container": "mpeg2video", **MPEG2}),
        # A program stream has a stamp for every two kilobytes, here for one frame in dozens.
        (25, {"container": "mpeg", "fps": 25, "options": KEYS}),
    ],
    ids=["h264", "h264-no-b-frames", "hevc", "mpeg2video", "h264-in-mpeg"],
)
def test_frames_without_time_stamps_are_counted(fps, how):
    data = encode(None, numbered_frames(600), **how)
    info = probe(data)
    assert info.duration == pytest.approx(600 / fps) and info.fps == pytest.approx(fps)
    assert numbers(data, Sampling(fps=fps)) == list(range(600))
    assert numbers(data, Sampling("uniform", num_frames=3)) == [100, 300, 500]


@pytest.mark.parametrize("fps", [1, 10])
def test_avi_frames_take_their_own_packet_s_time_where_the_decoder_delays(fps):
    data = encode(None, numbered_frames(30), container="avi", fps=fps, options={"bf": "0"})
    assert numbers(data, Sampling(fps=fps)) == list(range(30))


def test_the_nth_frame_takes_the_nth_packet_s_time():
    def shown(order, key=(0,), depth=1):
        clock = FrameClock()
        for packet in range(max(order) + 1):
            clock.send(packet)
        return [clock.show(packet, packet in key, depth) for packet in order]

    assert shown([0, 1, 2, 3], depth=0) == [0, 1, 2, 3]
    assert shown([0, 2, 3, 1, 5, 6, 4]) == [0, 1, 2, 3, 4, 5, 6]
    # Packet 2 gave no frame: all others keep their times.
    assert shown([0, 1, 3, 4], depth=0) == [0, 1, 3, 4]
    assert shown([0, 3, 1, 5, 6, 4]) == [0, 2, 3, 4, 5, 6]
    # A key frame is never overtaken, so everything before it is shown or lost.
    assert shown([0, 1, 5, 6, 7], key=(0, 5), depth=2) == [0, 1, 5, 6, 7]


# --- clocks that go back ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"container": "mpegts", "options": KEYS}, {"container": "mpeg", **MPEG2}, DASH],
    ids=["mpegts", "mpeg", "fragmented"],
)
def test_a_clock_that_goes_back_is_refused_with_a_remedy(how):
    first = encode(None, numbered_frames(200), **how)
    second = encode(None, (numbered_frame(1000 + i) for i in range(200)), **how)
    for use in (probe, lambda data: read_frames(data, Sampling(fps=0.1), size=64)):
        with pytest.raises(DataError, match=r"its clock goes back from .* remux it.*ffmpeg") as e:
            use(first + second)
        assert "\n" not in str(e.value)
    assert numbers(first, Sampling("uniform", num_frames=1)) == [100]


@pytest.mark.parametrize(
    "how",
    [
        {"container": "matroska"},
        {"container": "webm", **VP9},
        {"container": "flv"},
        {"container": "avi", "codec": "mpeg4"},
        {"container": "asf", "codec": "msmpeg4"},
    ],
    ids=lambda how: how["container"],
)
def test_a_second_file_behind_the_first_is_refused(how):
    data = encode(None, numbered_frames(50), **how)
    with pytest.raises(DataError, match="is several files, one behind the other: give them one"):
        probe(data + data)
    assert len(numbers(data)) == 50


# --- where the picture begins -------------------------------------------------------------------

LATE = {
    "mp4": {},
    "fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "dash": DASH,
    "asf": {"container": "asf", "codec": "msmpeg4"},
    "nut": {"container": "nut"},
    "matroska": {"container": "matroska"},
    "mpegts": {"container": "mpegts"},
    "flv": {"container": "flv"},
}


@pytest.mark.parametrize("name", LATE)
def test_a_clock_that_starts_late_counts_from_its_start(name):
    times = [100 + i / 10 for i in range(100)]
    data = encode(None, numbered_frames(100), times=times, options=KEYS, **LATE[name])
    assert probe(data).duration == pytest.approx(10, abs=0.001)
    assert numbers(data) == list(range(100))
    assert numbers(data, start=5) == list(range(50, 100))


@pytest.mark.parametrize("name", ["fragmented", "dash", "flv", "nut"])
@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_b_frames_do_not_lengthen_a_video(name, b_frames):
    data = encode(None, numbered_frames(100), options=KEYS | {"bf": b_frames}, **LATE[name])
    assert probe(data).duration == pytest.approx(10, abs=0.001)
    assert numbers(data) == list(range(100))


@pytest.mark.parametrize(
    "how",
    [
        {"options": KEYS},
        {"container": "matroska", "options": KEYS},
        {"container": "mpegts", "options": KEYS},
        {"container": "flv", "options": KEYS},
        {"container": "webm", **VP9},
    ],
    ids=lambda how: how.get("container", "mp4"),
)
def test_times_count_from_the_file_s_start_where_sound_comes_first(how):
    times = [4 + i / 10 for i in range(100)]
    data = encode(None, numbered_frames(100), times=times, sound=True, **how)
    # What the encoder of the sound puts before its first sample is 21 ms at most.
    assert probe(data).duration == pytest.approx(14, abs=0.025)
    # The whole video is the picture, from its first frame on.
    assert numbers(data) == list(range(100))
    # Its parts are as a player shows them. Off the frames' edges, for those 21 ms.
    assert numbers(data, Sampling(fps=1), start=10.05, end=12) == [60, 70]
    assert numbers(data, Sampling(fps=1), start=0, end=4) == [0, 0, 0, 0]
    _, chunks = read_frames(data, Sampling(fps=1), size=64, start=10.05, end=12)
    np.testing.assert_allclose(next(chunks).times, [10.05, 11.05])


# --- where the picture ends ---------------------------------------------------------------------


def test_a_still_ending_of_mp4_counts():
    times = [i / 10 for i in range(50)] + [35.0]
    data = encode(None, numbered_frames(51), times=times)
    assert probe(data).duration == pytest.approx(35.1)
    assert numbers(data, Sampling("uniform", num_frames=3)) == [49, 49, 49]
    assert numbers(data, Sampling("uniform", num_frames=1), start=35) == [50]


def test_a_program_stream_is_as_long_as_its_frames():
    data = encode(None, numbered_frames(250), container="mpeg", **MPEG2)
    assert probe(data).duration == pytest.approx(10)
    assert numbers(data, Sampling(fps=25)) == list(range(250))


@pytest.mark.parametrize("codec", [{}, {"options": {"bf": "0"}}, {"codec": "mpeg2video"}, X265])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_transport_stream_of_few_frames_is_read(count, codec):
    data = encode(None, numbered_frames(count), fps=25, container="mpegts", **codec)
    assert probe(data).duration == pytest.approx(count / 25, abs=1e-4)
    assert numbers(data, Sampling("uniform", num_frames=count)) == list(range(count))


def test_a_matroska_file_that_is_whole_may_hold_its_last_frame():
    data = encode(None, numbered_frames(50), container="matroska")
    element = b"\x44\x89\x88"  # Duration, a float64 of milliseconds
    assert data.count(element + struct.pack(">d", 5000)) == 1
    still = data.replace(element + struct.pack(">d", 5000), element + struct.pack(">d", 30000))
    still = still.replace(b"DURATION", b"DURATIOX")
    assert probe(still).duration == 30
    assert numbers(still, Sampling(fps=1)) == [0, 10, 20, 30, 40] + [49] * 25
    for broken in (
        still[: len(still) * 3 // 4],
        with_hole(still, 0.6, 1),
        with_hole(still, 0.5, 0.8),
    ):
        with pytest.raises(TruncatedError, match="cut short"):
            read_clip(broken, Sampling(fps=1), size=64)


@pytest.mark.parametrize("sound_start", [0.0, 15.0])
def test_a_cut_flv_is_refused_whether_its_sound_begins_late_or_not(sound_start):
    data = encode(None, numbered_frames(200), container="flv", sound=True, sound_start=sound_start)
    assert len(numbers(data)) in (200, 201)
    cut = data[: len(data) // 2]
    with pytest.raises(TruncatedError, match="cut short"):
        read_clip(cut, Sampling(fps=1), size=64)
    part = read_clip(cut, Sampling(fps=1), size=64, on_truncated="use", on_warning=lambda _: None)
    assert 2 < len(part) < 19


def test_every_format_is_read_whole_without_a_warning(tmp_path):
    for name, how in FORMATS.items():
        data = encode(tmp_path / name, numbered_frames(120), **how)
        for sampling in (Sampling(fps=10), Sampling("uniform", num_frames=2)):
            frames = read_clip(data, sampling, size=64, on_warning=fail)
            assert read_number(frames[-1]) == (119 if sampling.mode == "fps" else 90), name
