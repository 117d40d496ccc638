"""Windows of a video that share frames: the same frames as read one by one, each kept once."""

import json

import numpy as np
import pytest

from adacm2_jax.video.frames import Sampling
from data.feature_cache.cache import (
    clips_of,
    finish,
    make_manifest,
    open_features,
    videos_of,
    with_key,
    write_manifest,
)
from data.feature_cache.shards import read_index, shard_path, write_shard
from data.feature_cache.windows import LoadRun, Parts, SharedVideo
from data.jsonl import JsonlSource
from data.pipeline import LoadClip, clips
from tests.video.make_videos import encode, numbered_frames

SIZE, FRAMES = 16, 4
SHAPE = (FRAMES, SIZE, SIZE * 3)
VISION = {"width": SIZE * 3}


UNIFORM = Sampling("uniform", num_frames=FRAMES)


def loader(kind, on_truncated: str = "error", sampling: Sampling = UNIFORM):
    return kind(sampling, FRAMES, SIZE, False, on_truncated)


def lines(directory, windows) -> JsonlSource:
    path = directory / "train.jsonl"
    rows = [
        {"video": video, "start": start, "end": end, "question": "q", "answer": "a"}
        for video, start, end in windows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(path)


def as_features(row) -> np.ndarray:
    """Pixels in place of what the ViT makes of them, so that clips can be compared."""
    frames = row["frames"][row["valid"]].astype(np.float32)
    return frames.reshape(-1, *SHAPE[1:])


def write(directory, source, on_truncated: str = "error", sampling: Sampling = UNIFORM):
    """A cache of one shard; returns its data set and its index."""
    load = loader(LoadRun, on_truncated, sampling)
    manifest = with_key(
        make_manifest(source, load, VISION, dtype="float32", shards=1, shape=SHAPE, computed={})
    )
    write_manifest(directory, manifest)
    first = clips_of(source)[0]

    def features():
        for video in videos_of(source):
            examples = [first[clip] for clip in video]
            if len(examples) == 1:
                yield as_features(clips(Parts(source, examples), load)[0])
                continue
            shared = SharedVideo(source, examples, load)
            rows = (clips(Parts(source, [run]), load)[0] for run in shared.runs)
            yield shared.windows((as_features(row), row["cut"]) for row in rows)

    write_shard(directory, manifest, 0, features())
    finish(directory, manifest)
    index = read_index(shard_path(directory, manifest, 0), manifest, 0)
    load = loader(LoadClip, on_truncated, sampling)
    return open_features(directory, source, load, VISION, SHAPE), index


def check(dataset, source, on_truncated: str = "error", sampling: Sampling = UNIFORM) -> list[int]:
    """Every clip has what it has when it is read by itself; returns their numbers of frames."""
    alone = clips(source, loader(LoadClip, on_truncated, sampling))
    for number in range(len(source)):
        row, expected = dataset[number], alone[number]
        assert np.array_equal(row["valid"], expected["valid"])
        frames = np.asarray(row["frames"])[row["valid"]]
        assert np.array_equal(frames, as_features(expected))
    return [int(dataset[number]["valid"].sum()) for number in range(len(source))]


def test_each_frame_of_overlapping_windows_is_kept_once(tmp_path):
    encode(tmp_path / "a.mp4", numbered_frames(30), fps=3)
    encode(tmp_path / "b.mp4", numbered_frames(12), fps=3)
    # Windows of 4 s every second, a frame a second, and the lines of two videos mixed.
    windows = [("a.mp4", start, start + 4) for start in range(6)]
    source = lines(tmp_path, [*windows[:3], ("b.mp4", 0, 4), *windows[3:], windows[1]])
    dataset, index = write(tmp_path / "cache", source)
    assert check(dataset, source) == [FRAMES] * 8
    assert index.figures["stored"] == 9 + 4  # instants 0.5 to 8.5, and those of b
    assert index.figures["frames"] == 7 * FRAMES and index.figures["unreadable"] == 0


def test_windows_that_have_no_instant_in_common_keep_their_frames(tmp_path):
    encode(tmp_path / "a.mp4", numbered_frames(30), fps=3)
    source = lines(tmp_path, [("a.mp4", 0, 4), ("a.mp4", 0.3, 7.2), ("a.mp4", None, None)])
    dataset, index = write(tmp_path / "cache", source)
    assert check(dataset, source) == [FRAMES] * 3
    assert index.figures["stored"] == 3 * FRAMES


def test_a_window_outside_the_video_has_no_frame_and_others_keep_theirs(tmp_path):
    encode(tmp_path / "a.mp4", numbered_frames(15), fps=3)
    source = lines(tmp_path, [("a.mp4", 0, 4), ("a.mp4", 50, 54), ("a.mp4", 1, 5)])
    dataset, index = write(tmp_path / "cache", source)
    assert check(dataset, source) == [FRAMES, 0, FRAMES]
    assert index.figures["unreadable"] == 1


@pytest.mark.parametrize("on_truncated", ["error", "use"])
def test_of_a_file_that_is_cut_short_each_window_has_what_it_has_alone(tmp_path, on_truncated):
    whole = encode(None, numbered_frames(300), container="matroska")
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    source = lines(tmp_path, [("a.mkv", start, start + 4) for start in range(0, 26, 2)])
    dataset, _ = write(tmp_path / "cache", source, on_truncated)
    counts = check(dataset, source, on_truncated)
    assert counts[0] == FRAMES and 0 in counts
    assert any(0 < count < FRAMES for count in counts) == (on_truncated == "use")


def test_no_video_at_all_is_clips_without_frames(tmp_path):
    encode(tmp_path / "b.mp4", numbered_frames(12), fps=3)
    source = lines(tmp_path, [("a.mp4", 0, 4), ("a.mp4", 1, 5), ("b.mp4", 0, 4)])
    dataset, index = write(tmp_path / "cache", source)
    assert check(dataset, source) == [0, 0, FRAMES] and index.figures["stored"] == FRAMES
