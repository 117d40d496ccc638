"""A benchmark built from a miniature in its published form, with faults in it, and read back."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import PIL.Image
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import Sampling, read_clip
from adacm2_jax.video.jpegs import as_video
from data.benchmark import build as builder
from data.benchmark.source import BuiltSource, TaskSource
from data.feature_cache.cache import videos_of
from data.feature_cache.windows import LoadRun, SharedVideo
from tests.data import test_windows as windows
from tests.small import ROOT
from tests.video.make_videos import encode


def clip(seconds: int, seed: int) -> bytes:
    """A smooth picture that changes its colour every second, one frame a second."""
    rng = np.random.default_rng(seed)
    grounds = rng.integers(30, 220, (seconds, 1, 1, 3))
    ramp = np.linspace(-20, 20, 32)[None, :, None, None]
    return encode(None, (grounds + ramp + np.zeros((1, 32, 32, 3))).astype(np.uint8), fps=1)


def entry(label: str, duration: int) -> dict:
    return {"duration": duration, "num_frames": duration * 10, "scene": label}


@pytest.fixture(scope="module")
def lvu(tmp_path_factory):
    """Films of LVU: two files, one of JPEGs, one missing, one damaged, one too short."""
    root = tmp_path_factory.mktemp("lvu")
    (root / "videos/deep").mkdir(parents=True)
    (root / "videos/tt001.mp4").write_bytes(clip(130, 1))
    (root / "videos/deep/tt002.mkv").write_bytes(clip(40, 2))
    (root / "videos/broken.mp4").write_bytes(clip(40, 3)[:900])
    (root / "videos/short.mp4").write_bytes(clip(30, 4))
    frames = root / "videos/frames/tt003"
    frames.mkdir(parents=True)
    for number in range(60):
        picture = np.full((24, 40, 3), 4 * number, np.uint8)
        PIL.Image.fromarray(picture).save(frames / f"frame{number + 1:06}.jpg", quality=95)
    test = {
        "tt001": entry("office", 130),
        "tt002": entry("school", 40),
        "tt003": entry("hotel", 6),
        "gone": entry("prison", 60),
        "broken": entry("prison", 40),
        "short": entry("airport", 160),
    }
    (root / "test.json").write_text(json.dumps(test))
    (root / "train.json").write_text(json.dumps({"tt002": entry("school", 40)}))
    (root / "val.json").write_text("{}")
    return root


def build(lvu, target, **options):
    where = str(lvu), str(lvu / "videos"), str(target)
    options = {"splits": ("train", "test"), "workers": 1, "shard": 2} | options
    return builder.build("lvu_scene", *where, **options)


@pytest.fixture(scope="module")
def built(lvu, tmp_path_factory):
    return build(lvu, tmp_path_factory.mktemp("built"))


def test_every_question_comes_back_with_its_video(lvu, built):
    source = BuiltSource(built, "test")
    found = [(each.id, each.answer, each.start, each.end, each.group) for each in source]
    assert found == [
        ("tt001_0", "office", 0.0, 99.1, "tt001"),
        ("tt001_20", "office", 20.0, 119.1, "tt001"),
        ("tt002_0", "school", 0.0, 40.0, "tt002"),
        ("tt003_0", "hotel", 0.0, 6.0, "tt003"),
        ("short_0", "airport", 0.0, None, "short"),
        ("short_20", "airport", 20.0, None, "short"),
    ]
    assert source[0].video == source[1].video == (lvu / "videos/tt001.mp4").read_bytes()
    with pytest.raises(IndexError):
        source[len(source)]


@pytest.mark.parametrize("kind", ["annotation", "built"])
def test_windows_of_a_film_share_frames_in_a_cache_of_features(lvu, built, tmp_path, kind):
    if kind == "built":
        source, frames, stored = BuiltSource(built, "test"), [4, 4, 2, 1, 2, 1], 10
    else:  # what lasts too short or is damaged has no frame
        where = str(lvu), str(lvu / "videos")
        source, stored = TaskSource("lvu_scene", *where, "test", allow_missing=True), 8
        frames = [4, 4, 2, 1] + [0] * (len(source) - 4)
    parts = [source.clip(number)[1:] for number in range(len(source))]
    assert parts == [(each.start, each.end) for each in source]
    every_20_seconds = Sampling("fps", fps=0.05)
    dataset, index = windows.write(tmp_path, source, sampling=every_20_seconds)
    assert windows.check(dataset, source, sampling=every_20_seconds) == frames
    assert index.figures["frames"] == sum(frames) and index.figures["stored"] == stored


def test_the_windows_of_lvu_share_the_frames_that_ma_lmm_takes(built):
    source = BuiltSource(built, "test")
    # Every tenth frame; the middles of 0.991 s.
    for grid, runs in ((10.0, [100, 20]), (0.0, [100, 100])):
        load = LoadRun(Sampling("uniform", num_frames=100, grid=grid), 100, 16, False, "error")
        video = SharedVideo(source, [0, 1], load)
        assert [len(run.times) for run in video.runs] == runs
        assert video.shared == (grid == 10.0)


def test_of_an_older_built_set_every_question_has_a_video_of_its_own(lvu, tmp_path):
    built = build(lvu, tmp_path)
    index = json.loads((built / "items.json").read_text())
    older = {split: list(map(len, records)) for split, records in index.items()}
    newer = list(BuiltSource(built, "test"))
    assert len(videos_of(BuiltSource(built, "test"))) == 4
    (built / "items.json").write_text(json.dumps(older))
    source = BuiltSource(built, "test")
    assert list(source) == newer
    assert videos_of(source) == [[number] for number in range(len(newer))]


def test_what_is_wrong_is_listed_and_counted(built):
    report = json.loads((built / "report.json").read_text())
    assert report["test"]["videos"] == 6 and report["test"]["missing"] == ["gone"]
    assert list(report["test"]["corrupt"]) == ["broken"]
    assert report["test"]["mismatched"] == {
        "short": "lasts 30.00 s; short_0: ends at 99.1 s, read to the video's end; short_20: ends "
        "at 119.1 s, read to the video's end; short_40: begins at 40 s, left out and 1 more"
    }
    assert report["leaks"] == {"train & test": ["tt002"]}
    said = "\n".join(builder.told(built))
    assert "test: 6 videos; 1 missing, 1 corrupt, 1 mismatched" in said
    assert "1 video(s) in train & test: tt002" in said


def test_a_video_that_was_mended_is_built_anew(lvu, built, tmp_path):
    copy = tmp_path / "lvu"
    shutil.copytree(lvu, copy)
    root = build(copy, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in root.glob("lvu*.array_record*")}
    (copy / "videos/broken.mp4").write_bytes(clip(40, 3))
    assert build(copy, tmp_path) == root
    report = json.loads((root / "report.json").read_text())
    assert not report["test"]["corrupt"]
    assert "broken_0" in [each.id for each in BuiltSource(root, "test")]
    after = {path.name: path.stat().st_mtime_ns for path in root.glob("lvu*.array_record*")}
    assert sum(after[name] != before[name] for name in before) == 1  # the others stayed


def test_extracted_frames_are_read_as_a_video_of_ten_frames_a_second(lvu, built):
    video = next(each.video for each in BuiltSource(built, "test") if each.group == "tt003")
    with av.open(io.BytesIO(video)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pictures = sorted((lvu / "videos/frames/tt003").iterdir())
    assert len(decoded) == len(pictures) == 60
    for mine, path in zip(decoded, pictures, strict=True):
        wanted = np.asarray(PIL.Image.open(path), int)
        assert np.abs(mine - wanted).max() <= 3  # two inverse transforms, rounded each its own way
    stored = sum(path.stat().st_size for path in pictures)
    assert stored < len(video) < 1.2 * stored
    clip = read_clip(video, Sampling("uniform", num_frames=6), size=8)
    # The middles of six seconds: frames 5, 15, … of grey level 4 a frame.
    np.testing.assert_allclose(clip[:, 4, 4, 0], [20 + 40 * i for i in range(6)], atol=3)


def test_a_frame_that_is_missing_between_others_is_named(lvu, tmp_path):
    copy = tmp_path / "tt003"
    shutil.copytree(lvu / "videos/frames/tt003", copy)
    (copy / "frame000007.jpg").unlink()
    with pytest.raises(DataError, match=r"tt003: frame000007\.jpg is missing"):
        as_video(copy)
    (copy / "frame000007.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"frame000007\.jpg: is no JPEG"):
        as_video(copy)


def test_straight_from_the_annotation_the_examples_are_the_same(lvu, capsys):
    arguments = "lvu_scene", str(lvu), str(lvu / "videos"), "test"
    with pytest.raises(DataError, match=r"1 video\(s\) of task lvu_scene are missing in .*: gone;"):
        TaskSource(*arguments)
    source = TaskSource(*arguments, allow_missing=True)
    assert "gone" in capsys.readouterr().err
    assert [each.id for each in source][:4] == ["tt001_0", "tt001_20", "tt002_0", "tt003_0"]
    assert source[0].video == str(lvu / "videos/tt001.mp4")
    assert source[3].video == as_video(lvu / "videos/frames/tt003")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_split_that_is_not_there_is_named(built, lvu, split):
    if split == "dev":
        with pytest.raises(DataError, match=r"lvu_scene has no split 'dev'; it has train, val"):
            TaskSource("lvu_scene", str(lvu), str(lvu / "videos"), "dev")
        return
    with pytest.raises(DataError, match=r"no split 'val'; it has train, test"):
        BuiltSource(built, "val")


def test_killed_builds_end_with_the_same_bytes(lvu, built, tmp_path):
    command = [sys.executable, "-m", "data.benchmark.build", "lvu_scene", "--workers", "1"]
    command += ["--annotations", lvu, "--videos", lvu / "videos", "--data-dir", tmp_path]
    command += ["--split", "train", "--split", "test"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    place = tmp_path / "lvu_scene" / builder.VERSION
    while not list(place.glob("*train.array_record*")) and started.poll() is None:
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    killed = build(lvu, tmp_path, shard=builder.SHARD)
    whole = build(lvu, tmp_path / "again", shard=builder.SHARD)
    names = sorted(path.name for path in whole.iterdir() if not path.name.startswith("."))
    assert names == sorted(path.name for path in killed.iterdir() if not path.name.startswith("."))
    for name in names:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.parametrize(
    "options, said",
    [
        (["--beam=project=mine"], "--beam=project=mine is for a runner of Beam"),
        (["--runner=dataflow"], "--runner=dataflow needs Apache Beam: pip install apache-beam"),
    ],
)
def test_what_beam_needs_is_said_before_anything_is_read(
    tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    nowhere = tmp_path / "nowhere"
    command = ["lvu_scene", f"--annotations={nowhere}", f"--videos={nowhere}"]
    assert builder.main([*command, f"--data-dir={tmp_path}", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_build_that_fails_leaves_what_is_there_as_it_is(lvu, tmp_path):
    built = build(lvu, tmp_path)
    before = {path.name: path.read_bytes() for path in built.glob("*.array_record*")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no video of it is in"):
        builder.build("lvu_scene", str(lvu), str(tmp_path / "empty"), str(tmp_path), ["test"])
    assert {path.name: path.read_bytes() for path in built.glob("*.array_record*")} == before
    assert len(BuiltSource(built, "test", "lvu_scene"))


def test_one_split_after_the_other_is_all_of_them(lvu, tmp_path):
    together = build(lvu, tmp_path / "together")
    build(lvu, tmp_path / "apart", splits=("test",))
    apart = build(lvu, tmp_path / "apart", splits=("train",))
    build(lvu, tmp_path / "apart", splits=("test",))
    for name in ("items.json", "report.json"):
        one, other = (json.loads((root / name).read_text()) for root in (together, apart))
        leaks = [set(found.pop("leaks", {})) for found in (one, other)]
        assert one == other and all(len(pairs) == len(leaks[0]) for pairs in leaks)
    assert [len(BuiltSource(apart, split)) for split in ("train", "test")] == [
        len(BuiltSource(together, split)) for split in ("train", "test")
    ]


def test_a_shard_that_is_cut_short_is_written_again(lvu, tmp_path):
    built = build(lvu, tmp_path)
    shard = min(built.glob("lvu_scene-test.array_record*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="is damaged"):
        _ = [BuiltSource(built, "test")[i] for i in range(len(BuiltSource(built, "test")))]
    assert build(lvu, tmp_path) == built and shard.read_bytes() == whole


def test_a_data_set_that_is_not_finished_or_of_another_task_is_refused(lvu, tmp_path):
    built = build(lvu, tmp_path)
    with pytest.raises(DataError, match=r"was built of lvu_scene, but data\.task\.name is coin"):
        BuiltSource(built, "test", "coin")
    index = json.loads((built / "items.json").read_text())
    (built / "items.json").write_text(json.dumps({"test": index["test"][:-1]}))
    with pytest.raises(DataError, match="is damaged"):
        BuiltSource(built, "test")
    (built / "items.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        BuiltSource(built, "test")


def test_two_builds_at_once_are_refused(lvu, tmp_path):
    built = build(lvu, tmp_path)
    with builder._alone(built), pytest.raises(DataError, match="another build is writing"):
        build(lvu, tmp_path)


def test_frames_that_are_replaced_are_read_again(lvu, tmp_path):
    mine = tmp_path / "lvu"
    shutil.copytree(lvu, mine)
    built = build(mine, tmp_path / "data")
    shards = {path: path.read_bytes() for path in built.glob("*test.array_record*")}
    frame = mine / "videos/frames/tt003/frame000001.jpg"
    PIL.Image.fromarray(np.full((24, 40, 3), 250, np.uint8)).save(frame, quality=95)
    build(mine, tmp_path / "data")
    assert any(path.read_bytes() != before for path, before in shards.items())


def test_a_number_of_workers_below_0_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command = ["lvu_scene", "--annotations=a", "--videos=b", f"--data-dir={tmp_path}"]
        builder.main([*command, "--workers=-1"])
    assert "--workers -1 must be at least 0" in capsys.readouterr().err
