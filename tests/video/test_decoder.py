"""Which frame is shown when, and its pixels, in every format."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from adacm2_jax.errors import DataError
from adacm2_jax.video.decoder import Decoder
from adacm2_jax.video.frames import Sampling, probe, read_clip
from tests.video.make_videos import (
    FORMATS,
    VP9,
    add_cover,
    encode,
    numbered_frame,
    numbered_frames,
    numbers_at,
    read_number,
    read_numbers,
    with_display_matrix,
)


def all_frames(source: bytes | Path, sampling: Sampling, **options: object) -> np.ndarray:
    return read_clip(source, sampling, size=64, on_warning=fail_on_warning, **options)


def fail_on_warning(message: str) -> None:
    raise AssertionError(message)


# --- which frames -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_frame_shown(name):
    data = encode(None, numbered_frames(100), fps=10, **FORMATS[name])
    info = probe(data)
    assert (info.width, info.height, info.rotation) == (64, 64, 0)
    assert info.duration == pytest.approx(10.0)
    assert info.fps == pytest.approx(10.0)
    assert info.codec in ("h264", "hevc", "vp9", "mpeg4", "av1", "libdav1d")
    assert read_numbers(all_frames(data, Sampling(fps=2))) == list(range(0, 100, 5))
    assert read_numbers(all_frames(data, Sampling(fps=10))) == list(range(100))


@pytest.mark.parametrize("name", FORMATS)
def test_seeking_gives_exactly_the_frames_of_the_sequential_pass(name, decoded):
    data = encode(None, numbered_frames(700), fps=10, **FORMATS[name])
    decoder = Decoder(data)
    every = [decoder.to_rgb(decoder.frame_at(i / 10)) for i in range(700)]
    for seed, count in enumerate([1, 2, 3, 8, 40]):
        times = np.sort(np.random.default_rng(seed).uniform(0, 70, count))
        decoder, decoded[0] = Decoder(data), 0
        for time, number in zip(times, numbers_at(times, 10, 700), strict=True):
            picture = decoder.to_rgb(decoder.frame_at(time))
            np.testing.assert_array_equal(picture, every[number], err_msg=f"{seed} {time}")
    if name in ("mp4-h264", "mkv-h264", "webm-vp9", "avi-mpeg4", "mp4-h265", "mp4-av1"):
        decoder, decoded[0] = Decoder(data), 0
        for time in (20.0, 40.0, 60.0):
            decoder.frame_at(time)
        assert decoded[0] < 200  # 601 without seeks


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_seek_goes_to_the_last_key_frame_before_the_instant(after, decoded):
    """With B-frames it is decoded before it is shown, and either may be what is asked for."""
    options = {"g": "50", "keyint_min": "50", "sc_threshold": "0", "bf": "2"}
    decoder = Decoder(encode(None, numbered_frames(300), fps=10, options=options))
    for number in range(50 + after, 300, 50):
        decoded[0] = 0
        picture = decoder.to_rgb(decoder.frame_at(number / 10))
        assert read_number(picture) == number
        assert decoded[0] < 10  # 50 and more from the key frame before


def test_a_transport_stream_is_sought_over_long_gaps(decoded):
    data = encode(None, numbered_frames(1500), fps=10, **FORMATS["mpegts-h264"])
    assert read_numbers(all_frames(data, Sampling(fps=0.02))) == [0, 500, 1000]
    assert decoded[0] < 400  # 1001 without seeks


def test_sound_is_passed_over():
    for container, codec in [("mp4", {}), ("matroska", {}), ("webm", VP9)]:
        data = encode(None, numbered_frames(30), container=container, sound=True, **codec)
        assert read_numbers(all_frames(data, Sampling(fps=10))) == list(range(30))


def test_variable_frame_rate_shows_the_frame_of_the_instant():
    times = [0.0, 0.1, 0.15, 2.0, 2.04, 5.0, 5.5]
    for container in ("mp4", "matroska"):
        data = encode(None, numbered_frames(7), times=times, container=container)
        numbers = read_numbers(all_frames(data, Sampling(fps=4), end=5.5))
        wanted = np.arange(0, 5.5, 0.25)
        assert numbers == [int(np.searchsorted(times, t, side="right")) - 1 for t in wanted]


def test_times_count_from_the_stream_s_start():
    times = [3.0 + i / 10 for i in range(40)]
    data = encode(None, numbered_frames(40), times=times, container="matroska")
    assert probe(data).duration == pytest.approx(4.0)
    assert read_numbers(all_frames(data, Sampling(fps=1), start=1)) == [10, 20, 30]


def test_a_single_frame_is_a_video():
    for name in ("mp4-h264", "mkv-h264", "webm-vp9", "avi-mpeg4"):
        data = encode(None, numbered_frames(1), **FORMATS[name])
        assert probe(data).duration > 0
        assert read_numbers(all_frames(data, Sampling(fps=1))) == [0]
        assert read_numbers(all_frames(data, Sampling("uniform", num_frames=3))) == [0, 0, 0]


def test_more_instants_than_frames_repeat_frames():
    data = encode(None, numbered_frames(3), fps=1)
    assert read_numbers(all_frames(data, Sampling(fps=2))) == [0, 0, 1, 1, 2, 2]


def test_a_stream_without_duration_is_measured():
    for container, codec in [("webm", VP9), ("matroska", {})]:
        live = {"live": "1"}
        data = encode(
            None, numbered_frames(50), container=container, container_options=live, **codec
        )
        with av.open(io.BytesIO(data)) as opened:
            assert opened.duration is None and opened.streams.video[0].duration is None
        assert probe(data).duration == pytest.approx(5.0)
        assert read_numbers(all_frames(data, Sampling(fps=1))) == [0, 10, 20, 30, 40]


def test_longer_sound_holds_the_last_frame_where_only_the_container_tells_the_duration():
    data = encode(
        None, numbered_frames(30), container="matroska", sound=True, longer_sound=4.0
    ).replace(b"DURATION", b"DURATIOX")
    assert probe(data).duration == pytest.approx(7.0, abs=0.05)
    assert (
        read_numbers(all_frames(data, Sampling(fps=2), end=7)) == [0, 5, 10, 15, 20, 25] + [29] * 8
    )


def test_a_cover_picture_is_not_the_video(tmp_path):
    encode(tmp_path / "plain.mp4", numbered_frames(20))
    add_cover(tmp_path / "plain.mp4", tmp_path / "cover.mp4")
    assert probe(tmp_path / "cover.mp4").width == 64
    assert read_numbers(all_frames(tmp_path / "cover.mp4", Sampling(fps=1))) == [0, 10]


def test_a_title_in_another_encoding_does_not_matter():
    data = encode(None, numbered_frames(20), container="matroska")
    assert b"Lavf" in data
    assert read_numbers(all_frames(data.replace(b"Lavf", b"L\xe9\xff\xfe"), Sampling())) == [0, 10]


def test_a_path_and_its_bytes_give_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "film: the end, 50% é.mp4"
    data = encode(name, numbered_frames(30), sound=True)
    frames = all_frames(data, Sampling(fps=5))
    for path in (name, Path(name), tmp_path / name):
        np.testing.assert_array_equal(all_frames(path, Sampling(fps=5)), frames)


# --- pixels -------------------------------------------------------------------------------------


def photograph(width: int, height: int) -> np.ndarray:
    """Smooth colour with edges and noise: uint8[height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x * 255 / width, y * 255 / height, (x + y) % 97 * 2.0], -1)
    noise = np.random.default_rng(0).normal(0, 8, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("width", "height"), [(322, 182), (64, 224), (224, 224), (96, 64)])
def test_frames_are_the_decoder_s_rgb_squashed_by_pil_bicubic(width, height):
    data = encode(None, [photograph(width, height)] * 3)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    expected = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC))
    frames = read_clip(data, Sampling(fps=1), size=224)
    assert frames.dtype == np.uint8 and frames.shape == (1, 224, 224, 3)
    np.testing.assert_array_equal(frames[0], expected)


TURNS = {
    (1, 0, 0, 1): (0, lambda p: p),
    (0, 1, -1, 0): (90, lambda p: np.rot90(p, -1)),
    (-1, 0, 0, -1): (180, lambda p: np.rot90(p, 2)),
    (0, -1, 1, 0): (270, lambda p: np.rot90(p, 1)),
    (-1, 0, 0, 1): (180, lambda p: p[:, ::-1]),
    (1, 0, 0, -1): (0, lambda p: p[::-1]),
    (0, 1, 1, 0): (90, lambda p: p.swapaxes(0, 1)),
    (0, -1, -1, 0): (270, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_phone_clips_are_turned_upright(matrix):
    rotation, turn = TURNS[matrix]
    plain = encode(None, [photograph(96, 64)] * 2)
    turned = with_display_matrix(plain, matrix)
    info = probe(turned)
    assert info.rotation == rotation
    assert (info.width, info.height) == ((64, 96) if rotation in (90, 270) else (96, 64))
    decoder = Decoder(plain)
    upright = Image.fromarray(np.ascontiguousarray(turn(decoder.to_rgb(decoder.frame_at(0)))))
    expected = np.asarray(upright.resize((80, 80), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_clip(turned, Sampling(), size=80)[0], expected)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("code", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)]
)
def test_the_colour_matrix_and_range_of_the_file_are_honoured(code, red, blue, full, tmp_path):
    colour = np.array([200, 30, 40])
    r, g, b = colour / 255
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = ((b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red))
    scale = (0, 255, 255) if full else (16, 219, 224)
    planes = [scale[0] + scale[1] * luma, *(128 + scale[2] * c for c in chroma)]
    with av.open(str(tmp_path / "c.mp4"), "w") as output:
        stream = output.add_stream("libx264", rate=5, options={"qp": "1"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = code
        stream.codec_context.color_range = 2 if full else 1
        frame = av.VideoFrame(64, 64, "yuv444p")
        for plane, value in zip(frame.planes, planes, strict=True):
            plane.update(np.full((64, plane.line_size), round(value), np.uint8).tobytes())
        frame.pts, frame.time_base = 0, Fraction(1, 5)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    shown = read_clip(tmp_path / "c.mp4", Sampling(), size=64)[0, 32, 32].astype(int)
    # Half a step in each plane moves a channel by at most 0.5 * 255/219 * (1 + 1.88) = 1.7, and
    # the conversion rounds once more; a wrong matrix is off by 8 or more.
    assert np.abs(shown - colour).max() <= 3


def test_4k_is_read():
    data = encode(None, numbered_frames(3, 3840, 2160), options={"preset": "ultrafast"})
    info = probe(data)
    assert (info.width, info.height) == (3840, 2160)
    assert read_numbers(read_clip(data, Sampling(fps=10), size=224)) == [0, 1, 2]


def test_threaded_decoding_gives_the_same_frames():
    data = encode(None, numbered_frames(200, 640, 360), fps=25)
    decoder = Decoder(data)
    assert decoder._threads > 1 or os.cpu_count() == 1
    assert read_numbers(all_frames(data, Sampling(fps=25))) == list(range(200))


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mp4-h264", "mkv-h264", "webm-vp9", "mp4-h265"])
def test_a_damaged_packet_is_passed_over_with_one_warning(name):
    data = encode(None, numbered_frames(300), **FORMATS[name])
    with av.open(io.BytesIO(data)) as container:
        packet = bytes([p for p in container.demux(video=0) if p.size][155])
    assert data.count(packet) == 1
    broken = data.replace(packet, np.random.default_rng(1).bytes(len(packet)))
    said: list[str] = []
    numbers = read_numbers(read_clip(broken, Sampling(fps=10), size=64, on_warning=said.append))
    assert said == [f"<{len(data)} bytes>: damaged packets passed over: 1"]
    wrong = [i for i, number in enumerate(numbers) if number != i]
    assert len(numbers) == 300
    # What leans on the lost picture may be wrong, up to the next key frame.
    assert wrong and min(wrong) >= 148 and max(wrong) < 200


def test_a_clip_with_no_decodable_frame_is_an_error():
    data = encode(None, numbered_frames(20), codec="mpeg4")
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    broken = data[:start] + bytes(size) + data[start + size :]
    for use in (probe, lambda source: read_clip(source, Sampling(), size=64)):
        with pytest.raises(DataError, match="no frame can be decoded"):
            use(broken)


def test_numbers_survive_the_round_trip():
    for number in (0, 1, 12345, 65535):
        assert read_number(numbered_frame(number, 96, 40)) == number
