"""The instants that are chosen, chunks, memory, and videos that cannot be used."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacm2_jax.errors import DataError
from adacm2_jax.video.decoder import TruncatedError
from adacm2_jax.video.frames import Sampling, probe, read_clip, read_frames, sample_times
from adacm2_jax.video.room import host_memory
from tests.video.make_videos import (
    VP9,
    add_cover,
    encode,
    encode_sound,
    numbered_frame,
    numbered_frames,
    numbers_at,
    read_number,
    read_numbers,
    repeat,
)


def all_frames(source: bytes | Path, sampling: Sampling, **options: object) -> np.ndarray:
    return read_clip(source, sampling, size=64, on_warning=fail_on_warning, **options)


def fail_on_warning(message: str) -> None:
    raise AssertionError(message)


# --- which instants -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "start", "end", "times"),
    [
        (Sampling(fps=2), None, None, [0, 0.5, 1, 1.5]),
        (Sampling(fps=2), 0.25, 1.25, [0.25, 0.75]),
        (Sampling(fps=2), None, 1.01, [0, 0.5, 1]),
        (Sampling(fps=0.1), None, None, [0]),
        (Sampling(fps=2, max_frames=4), None, None, [0, 0.5, 1, 1.5]),
        (Sampling(fps=2, max_frames=2), None, None, [0.5, 1.5]),
        (Sampling("uniform", num_frames=4), None, None, [0.25, 0.75, 1.25, 1.75]),
        (Sampling("uniform", num_frames=1), 1, None, [1.5]),
        (Sampling("uniform", num_frames=1), 1, 2.9, [1.5]),
    ],
)
def test_instants(sampling, start, end, times):
    chosen = sample_times(2.0, sampling, start, end)
    assert chosen.dtype == np.float64
    np.testing.assert_allclose(chosen, times, rtol=1e-15)


@given(st.floats(0.01, 20_000), st.floats(0.01, 60))
def test_fps_sampling_fills_the_video_and_stays_inside(duration, fps):
    times = sample_times(duration, Sampling(fps=fps, max_frames=10_000))
    assert times[0] >= 0 and times[-1] < duration and len(times) <= 10_000
    if len(times) < 10_000:
        # A billionth of a period is where the rounding of the count lies.
        assert times[-1] + (1 + 2e-9) / fps >= duration


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_random_instants_stay_in_their_segments(count, seed):
    sampling = Sampling("uniform", num_frames=count)
    times = sample_times(70.0, sampling, 10.0, 60.0, np.random.default_rng(seed))
    edges = 10.0 + np.arange(count + 1) * (50.0 / count)
    assert (times >= edges[:-1]).all() and (times < edges[1:] + 1e-12).all()
    again = sample_times(70.0, sampling, 10.0, 60.0, np.random.default_rng(seed))
    np.testing.assert_array_equal(times, again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "all"}, "sampling.mode='all': must be"),
        ({"fps": 0}, "sampling.fps=0: must be"),
        ({"fps": math.inf}, "sampling.fps=inf"),
        ({"mode": "uniform"}, "sampling.num_frames=0"),
        ({"max_frames": 0}, "sampling.max_frames=0"),
    ],
)
def test_impossible_sampling_is_refused(fields, message):
    with pytest.raises(DataError, match=message):
        Sampling(**fields)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (2, None, "start=2 s is outside: the video lasts 2.00 s"),
        (-1, None, "start=-1 s is outside"),
        (math.nan, None, "start=nan s is outside"),
        (None, 3.1, "end=3.1 s is outside: the video lasts 2.00 s"),
        (None, 0, "end=0 s is outside"),
        (1.5, 1.0, "start=1.5 s is not before end=1 s: swap them"),
        (1, 1, "start=1 s and end=1 s leave nothing to read: give an end after the start"),
    ],
)
def test_times_outside_the_video_are_refused_with_its_name_and_duration(
    start, end, message, tmp_path
):
    path = tmp_path / "clip.mp4"
    encode(path, numbered_frames(20))
    with pytest.raises(DataError) as error:
        read_frames(path, Sampling(), size=64, start=start, end=end)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(fps=1e12), ["2,000,000,000,000 frames", "32,000,000,000,000 bytes", "--fps"]),
        (Sampling(fps=1e308), ["1,000,000,000,000,000,000 frames", "lower --fps"]),
        (Sampling("uniform", num_frames=10**12), ["1,000,000,000,000 frames", "--num-frames"]),
    ],
)
def test_more_frames_than_memory_holds_are_refused_before_decoding(sampling, words):
    data = encode(None, numbered_frames(20))
    with pytest.raises(DataError) as error:
        read_frames(data, sampling, size=64)
    for word in (f"<{len(data)} bytes>: the times of", *words, "this machine has"):
        assert word in str(error.value)


def test_a_clip_larger_than_memory_is_refused_before_decoding():
    data = encode(None, numbered_frames(20))
    count = host_memory() // (4096 * 4096 * 3) + 1
    with pytest.raises(DataError, match=f"the pixels of {count:,} frames need .* this machine"):
        read_clip(data, Sampling("uniform", num_frames=count), size=4096)


def test_above_the_video_s_own_rate_frames_repeat():
    data = encode(None, numbered_frames(20))
    frames = all_frames(data, Sampling(fps=30), end=1)
    assert read_numbers(frames) == [k // 3 for k in range(30)]


# --- chunks and memory --------------------------------------------------------------------------


def test_chunks_have_the_announced_frames_in_order():
    data = encode(None, numbered_frames(40))
    count, chunks = read_frames(data, Sampling(fps=5), size=64, chunk=8, start=0.4)
    chunks = list(chunks)
    assert count == 18
    assert [chunk.frames.shape[0] for chunk in chunks] == [8, 8, 2]
    assert all(chunk.frames.dtype == np.uint8 for chunk in chunks)
    times = np.concatenate([chunk.times for chunk in chunks])
    np.testing.assert_allclose(times, 0.4 + np.arange(18) / 5)
    numbers = [read_number(frame) for chunk in chunks for frame in chunk.frames]
    assert numbers == numbers_at(times, 10, 40)


def test_decoding_is_lazy(decoded):
    data = encode(None, numbered_frames(300))
    _, chunks = read_frames(data, Sampling(fps=10), size=64, chunk=4)
    assert decoded[0] == 0
    next(chunks)
    assert decoded[0] <= 6


@pytest.fixture(scope="module")
def two_hours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    encode(folder / "minutes.mp4", numbered_frames(600), fps=5, options={"g": "50"})
    repeat(folder / "minutes.mp4", folder / "hours.mp4", 60)
    return folder


def test_two_hours_take_no_more_memory_than_two_minutes(two_hours):
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from adacm2_jax.video.frames import Sampling, read_frames\n"
        "count, chunks = read_frames(sys.argv[1], Sampling(fps=2), size=64)\n"
        "assert count == sum(len(chunk.times) for chunk in chunks)\n"
        # getrusage would give at least the parent's peak.
        "status = Path('/proc/self/status').read_text()\n"
        "print(count, re.search(r'VmHWM:\\s*(\\d+) kB', status).group(1))\n"
    )
    root = Path(__file__).parents[2]
    used = {}
    for name in ("minutes", "hours"):
        command = [sys.executable, "-c", program, str(two_hours / f"{name}.mp4")]
        out = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        used[name] = [int(word) for word in out.split()]
    assert used["minutes"][0] == 240 and used["hours"][0] == 14_400
    # The frames together are 177 MB; the index of 36,000 packets takes a few.
    assert used["hours"][1] - used["minutes"][1] < 20_000


def test_a_few_frames_of_two_hours_decode_a_small_part(two_hours, decoded):
    assert probe(two_hours / "hours.mp4").duration == pytest.approx(7200)
    sampling = Sampling("uniform", num_frames=64)
    frames = all_frames(two_hours / "hours.mp4", sampling)
    times = (np.arange(64) + 0.5) * 7200 / 64
    assert read_numbers(frames) == [math.floor(t * 5 + 1e-9) % 600 for t in times]
    assert decoded[0] < 64 * 60  # a group of pictures has 50 frames; there are 36,000


# --- what cannot be used ------------------------------------------------------------------------


def test_unusable_sources_are_named_with_a_remedy(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "text.txt").write_text("not a video\n" * 100)
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n")
    encode_sound(tmp_path / "sound.mp4")
    add_cover(tmp_path / "sound.mp4", tmp_path / "cover.mp4")
    whole = encode(None, numbered_frames(30))
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "none.mp4": "no such file: check the path",
        ".": "is a directory: give the video file inside it",
        "empty.mp4": "the file is empty: download or record it again",
        "text.mp4": "is not a video that FFmpeg can read",
        "text.txt": "is text, not a video: give MP4",
        "list.mp4": "is a list of other files, not a video: give the video files themselves",
        "sound.mp4": "holds no video track (sound only?): give a video file",
        "cover.mp4": "holds no video track",
        "cut.mp4": "the MP4 file is incomplete (its index, moov, is missing or cut): download",
    }.items():
        path = tmp_path / name
        for use in (probe, lambda source: read_frames(source, Sampling(), size=64)):
            with pytest.raises(DataError) as error:
                use(path)
            assert str(error.value).startswith(f"{path}: {message}")
            assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="<0 bytes>: the video is empty"):
        probe(b"")


@pytest.mark.parametrize("listed", ["pipe", "clip.mp4"])
def test_a_list_of_files_opens_none_of_them(tmp_path, listed):
    """In a process of its own: to open a pipe that nobody writes to takes for ever."""
    encode(tmp_path / "clip.mp4", numbered_frames(10))
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "list.mp4"
    path.write_text(f"ffconcat version 1.0\nfile {listed}\n")
    program = (
        "import pathlib, sys; from adacm2_jax.video.frames import probe\n"
        "for source in (sys.argv[1], pathlib.Path(sys.argv[1]).read_bytes()):\n"
        "    try: print(probe(source))\n"
        "    except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", program, path]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and not done.returncode, done.stderr
    assert lines[0].startswith(f"{path}: is a list of other files, not a video")
    assert lines[1].startswith(f"<{path.stat().st_size} bytes>: is a list of other files")


def test_a_name_that_is_a_pattern_opens_no_other_file(tmp_path):
    """FFmpeg takes such a picture's name for a whole sequence of them."""
    with av.open(str(tmp_path / "p%d.jpg"), "w", format="image2") as written:
        stream = written.add_stream("mjpeg", rate=1)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for frame in (numbered_frame(0), numbered_frame(1)):
            written.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        written.mux(stream.encode())
    assert (tmp_path / "p2.jpg").is_file()
    shutil.copy(tmp_path / "p1.jpg", tmp_path / "p%d.jpg")
    assert probe(tmp_path / "p1.jpg").codec == "mjpeg"
    with pytest.raises(DataError, match=r"p%d\.jpg: is not a video that FFmpeg can read"):
        probe(tmp_path / "p%d.jpg")


def test_what_is_no_regular_file_is_called_so(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket.mp4"))
        for path in (tmp_path / "pipe.mp4", tmp_path / "socket.mp4", "/dev/null"):
            with pytest.raises(DataError, match=f"{path}: is no regular file"):
                probe(path)


@pytest.mark.parametrize(
    "options",
    [{"on_truncated": "maybe"}, {"resize": "nearest"}, {"size": 0}, {"chunk": 0}],
    ids=lambda o: next(iter(o)),
)
def test_impossible_options_are_refused(options):
    data = encode(None, numbered_frames(3))
    with pytest.raises(DataError, match=next(iter(options))):
        read_frames(data, Sampling(), **{"size": 64, **options})


CUT = {
    "mp4-index-in-front": {"container_options": {"movflags": "faststart"}},
    "mkv": {"container": "matroska"},
    "webm": {"container": "webm", **VP9},
    "avi": {"container": "avi", "codec": "mpeg4"},
}


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_short_is_an_error_or_a_warning(name):
    whole = encode(None, numbered_frames(300), **CUT[name])
    cut = whole[: len(whole) * 2 // 3]
    with pytest.raises(TruncatedError) as error:
        list(read_frames(cut, Sampling(fps=2), size=64)[1])
    text = str(error.value)
    assert text.startswith(f"<{len(cut)} bytes>: the file is cut short (")
    assert "s of 30.0 s), so nothing was answered" in text
    assert "--config.data.on_truncated=use" in text and "\n" not in text
    assert str(pickle.loads(pickle.dumps(error.value))) == text

    said: list[str] = []
    count, chunks = read_frames(
        cut, Sampling(fps=2), size=64, on_truncated="use", on_warning=said.append
    )
    chunks = list(chunks)
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert count == 60 and 10 <= len(frames) < 55
    assert len(frames) == sum(len(chunk.times) for chunk in chunks)
    # Just before the cut, frames that lean on lost ones are gone: the one before them is held.
    assert read_numbers(frames)[:-2] == list(range(0, 300, 5))[: len(frames) - 2]
    assert f"the {len(frames)} of 60 frames before that are used" in said[0]

    part = all_frames(cut, Sampling(fps=2), end=3)
    assert read_numbers(part) == list(range(0, 30, 5))
    with pytest.raises(TruncatedError):
        list(read_frames(cut, Sampling(), size=64, start=29, on_truncated="use")[1])


def test_a_cut_mp4_with_its_index_in_front_is_found_before_decoding(decoded):
    whole = encode(None, numbered_frames(300), container_options={"movflags": "faststart"})
    with pytest.raises(TruncatedError, match=r"it holds \d+\.\d s of 30\.0 s"):
        read_frames(whole[: len(whole) * 2 // 3], Sampling(), size=64)
    assert decoded[0] == 0


def test_sound_that_is_cut_off_does_not_matter():
    whole = encode(None, numbered_frames(30), sound=True, longer_sound=5.0, container="matroska")
    cut = whole[: len(whole) - 300]
    assert read_numbers(all_frames(cut, Sampling(fps=10))) == list(range(30))


@pytest.mark.parametrize(
    ("start", "end", "count", "numbers"),
    (
        # LVU's window from second 20 of a long film: frames 200, 210, … 1190.
        (20.0, 119.1, 100, range(200, 1191, 10)),
        # A film of 45 frames, five of them: rint of 0, 11, 22, 33, 44.
        (0.0, 4.5, 5, [0, 11, 22, 33, 44]),
        # rint(linspace(0, 9, 4)) is 0, 3, 6, 9; halves go to the even: linspace(0, 3, 3) → 0, 2, 3.
        (0.0, 1.0, 4, [0, 3, 6, 9]),
        (0.0, 0.4, 3, [0, 2, 3]),
        # More than there are: some twice.
        (0.0, 0.2, 4, [0, 0, 1, 1]),
    ),
)
def test_a_grid_takes_the_frames_that_ma_lmm_takes(start, end, count, numbers):
    times = sample_times(200.0, Sampling("uniform", num_frames=count, grid=10.0), start, end)
    np.testing.assert_allclose(times, (np.array(list(numbers)) + 0.5) / 10, rtol=0, atol=1e-9)


def test_a_grid_draws_a_frame_of_each_segment_in_training():
    sampling = Sampling("uniform", num_frames=4, grid=10.0)
    drawn = [sample_times(2.0, sampling, rng=np.random.default_rng(seed)) for seed in range(50)]
    numbers = np.rint(np.array(drawn) * 10 - 0.5).astype(int)
    assert (numbers // 5 == np.arange(4)).all() and len(np.unique(numbers)) == 20
