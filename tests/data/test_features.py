"""Features on disk: what goes in comes out, whatever does not fit is refused, nothing is half."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from adacm2_jax.errors import DataError
from adacm2_jax.files import beside_path, remove_abandoned
from adacm2_jax.models.adacm2 import widen
from adacm2_jax.video.frames import Sampling
from data.feature_cache.cache import (
    check_weights,
    clips_of,
    finish,
    make_manifest,
    open_features,
    read_manifest,
    with_key,
    write_manifest,
)
from data.feature_cache.shards import (
    Error,
    check_room,
    missing_shards,
    pack,
    shard_clips,
    shard_path,
    unpack,
    write_shard,
)
from data.jsonl import Example, JsonlSource
from data.pipeline import LoadClip, clips, training_batches
from tests.small import ROOT
from tests.video.make_videos import encode, numbered_frames

LOAD = LoadClip(Sampling("uniform", num_frames=3), 4, 16, False, "error")
SHAPE = (4, 2, 5)
VISION = {"width": 5, "dtype": "bfloat16"}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Videos(list):
    """Examples in memory."""

    def fingerprint(self) -> str:
        return "1"


@pytest.fixture(scope="module")
def source() -> Videos:
    video = encode(None, numbered_frames(9), fps=3)
    examples = [Example(str(n), video, f"q{n}", str(n), None, None) for n in range(20)]
    examples[5] = Example("bad", b"no video", "q", "a", None, None)
    return Videos(examples)


def features_of(clip: int, frames: int) -> np.ndarray:
    random = np.random.default_rng(clip)
    return random.standard_normal((frames, *SHAPE[1:]), np.float32).astype(BFLOAT16)


def manifest_of(source, dtype: str = "bfloat16", shards: int = 3, **changes) -> dict:
    given = dict(dtype=dtype, shards=shards, shape=SHAPE, computed={}) | changes
    vision = VISION | {"weights": "abc"}
    return with_key(make_manifest(source, LOAD, vision, **given))


def write(directory, source, dtype: str = "bfloat16", shards: int = 3) -> dict:
    """A whole cache; clip 5 cannot be read."""
    manifest = manifest_of(source, dtype, shards)
    write_manifest(directory, manifest)
    for shard in range(manifest["shards"]):
        numbers = shard_clips(manifest, shard)
        write_shard(directory, manifest, shard, (features_of(n, 3 * (n != 5)) for n in numbers))
    return finish(directory, manifest)


def opened(directory, source, load=LOAD, vision=VISION, shape=SHAPE, local=None):
    return open_features(directory, source, load, vision, shape, local)


def frames_of(row) -> np.ndarray:
    """The features of a row, read."""
    return np.asarray(row["frames"])


# --- a clip ---------------------------------------------------------------------------------------

numbers = st.floats(-1e4, 1e4, width=32)
clip_shapes = array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=4)


@settings(max_examples=50)
@given(arrays(np.float32, clip_shapes, elements=numbers), st.sampled_from(["bfloat16", "float32"]))
def test_a_clip_comes_back_bit_by_bit(features, dtype):
    features = features.astype(BFLOAT16 if dtype == "bfloat16" else np.float32)
    found = unpack(pack(features, dtype), dtype)
    assert found.dtype == features.dtype and found.tobytes() == features.tobytes()


@settings(max_examples=50)
@given(arrays(np.float32, clip_shapes, elements=numbers))
def test_int8_is_off_by_half_a_step_at_most(features):
    found = unpack(pack(features, "int8"), "float32")
    largest = np.abs(features).max(-1, keepdims=True)
    # Half of largest / 127, and three roundings of float32: scale, quotient and product.
    allowed = largest / 254 + 4 * np.finfo(np.float32).eps * largest + 1e-38
    assert (np.abs(found - features) <= allowed).all()


def test_the_error_is_that_of_all_clips_together():
    exact = [np.array([[[3.0, 4.0]]]), np.array([[[0.0, -2.0]]])]
    kept = [exact[0] + [[[0.0, 0.5]]], exact[1] - [[[0.1, 0.0]]]]
    one, other = Error(), Error()
    one.add(kept[0], exact[0])
    other.add(kept[1], exact[1])
    one.merge(other.figures)
    rms = np.sqrt((0.5**2 + 0.1**2) / (9 + 16 + 4))
    assert one.report() == pytest.approx({"rms": rms, "largest": 0.125}, rel=1e-6)


# --- a cache --------------------------------------------------------------------------------------


def test_rows_are_those_of_the_decoder_with_features_in_place_of_pixels(source, tmp_path):
    manifest = write(tmp_path, source)
    assert manifest["done"]["frames"] == 19 * 3 and manifest["done"]["unreadable"] == 1
    assert manifest["done"]["error"] == {"rms": 0.0, "largest": 0.0}
    dataset, decoded = opened(tmp_path, source), clips(source, LOAD)
    assert len(dataset) == len(decoded) == 20
    for number in range(20):
        row, like = dataset[number], decoded[number]
        assert row.keys() == like.keys()
        for name in ("index", "valid", "question", "answer"):
            assert np.array_equal(row[name], like[name]) and type(row[name]) is type(like[name])
        frames = frames_of(row)
        assert frames.shape == SHAPE and frames.dtype == BFLOAT16
        assert np.array_equal(frames[row["valid"]], features_of(number, 3 * (number != 5)))
        assert not frames[~row["valid"]].any()


@pytest.fixture
def parsed_flags():
    """What Grain's worker processes ask for."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_order_is_that_of_pixels_with_any_workers(source, tmp_path, workers, parsed_flags):
    write(tmp_path, source)
    options = dict(batch_size=4, seed=3)
    cached = training_batches(opened(tmp_path, source), workers=workers, **options)
    decoded = training_batches(clips(source, LOAD), **options)
    for _ in range(7):
        one, other = next(cached), next(decoded)
        assert np.array_equal(one["index"], other["index"])
        assert np.array_equal(one["valid"], other["valid"])
        assert one["frames"].dtype == BFLOAT16 and one["frames"].shape == (4, *SHAPE)
        for number, row, valid in zip(one["index"], one["frames"], one["valid"], strict=True):
            assert np.array_equal(row[valid], features_of(int(number), valid.sum()))
    cached.close()
    decoded.close()


def test_int8_goes_to_the_device_with_its_scales_and_is_widened_there(source, tmp_path):
    """To the very numbers that the host's widening has, also within a compiled program."""
    manifest = write(tmp_path, source, "int8")
    error = manifest["done"]["error"]
    assert 0 < error["rms"] < error["largest"] <= (1 / 254 + 2**-8) * 1.01  # bfloat16 rounds too
    kept = frames_of(opened(tmp_path, source)[0])
    assert kept.dtype == np.int8 and kept.shape == (*SHAPE[:-1], SHAPE[-1] + 4)
    random = np.random.default_rng(0).standard_normal((64, 257, 33), np.float32)
    for each in (kept, pack(random, "int8")):
        for dtype in ("bfloat16", "float32"):
            host = unpack(each, dtype)
            device = jax.jit(widen, static_argnums=1)(each, dtype)
            assert host.dtype == device.dtype and host.tobytes() == np.asarray(device).tobytes()
            # A consumer that widens again must not see more bits than were kept.
            again = jax.jit(lambda x, d=dtype: widen(x, d).astype(jnp.float32) * 1.0)(each)
            assert np.array_equal(again, host.astype(np.float32))


# --- what it fits ---------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    """Four questions about three clips of two videos."""
    for name in ("a", "b"):
        encode(tmp_path / f"{name}.mp4", numbered_frames(9), fps=3)
    rows = [("a", None), ("b", None), ("a", 1.0), ("a", None)]
    path = tmp_path / "train.jsonl"

    def write(question: str) -> JsonlSource:
        path.write_text(
            "".join(
                json.dumps({"video": f"{v}.mp4", "question": question, "answer": "x", "end": end})
                + "\n"
                for v, end in rows
            )
        )
        return JsonlSource(path)

    return write


def test_questions_about_a_clip_share_its_features(lines, tmp_path):
    first, of = clips_of(lines("what?"))
    assert first == [0, 1, 2] and of.tolist() == [0, 1, 2, 0]
    write(tmp_path / "cache", lines("what?"), shards=2)
    dataset = opened(tmp_path / "cache", lines("and now?"))  # features do not depend on it
    assert [dataset[n]["question"] for n in range(4)] == ["and now?"] * 4
    assert np.array_equal(frames_of(dataset[3]), frames_of(dataset[0]))
    assert not np.array_equal(frames_of(dataset[2]), frames_of(dataset[0]))


def test_a_video_that_changed_is_noticed(lines, tmp_path):
    write(tmp_path / "cache", lines("what?"), shards=2)
    os.utime(tmp_path / "b.mp4", (1, 1))
    with pytest.raises(DataError, match=r"^[^\n]*source\.files is '\w+' there, '\w+' here[^\n]*$"):
        opened(tmp_path / "cache", lines("what?"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            dict(load=dataclasses.replace(LOAD, resize="ma_lmm")),
            r"load\.resize is 'clean' there, 'ma_lmm' here",
        ),
        (dict(vision=VISION | {"dtype": "float32"}), r"vision\.dtype is 'bfloat16' there"),
        (dict(shape=(4, 2, 6)), r"shape is \[4, 2, 5\] there, \[4, 2, 6\] here"),
        (dict(load=dataclasses.replace(LOAD, jitter=True)), "of the same instants in every epoch"),
    ],
)
def test_another_experiment_is_refused_by_name(source, tmp_path, change, named):
    write(tmp_path, source)
    with pytest.raises(DataError, match=named):
        opened(tmp_path, source, **change)


def test_other_weights_are_refused(source, tmp_path):
    write(tmp_path, source)
    check_weights(tmp_path, VISION | {"weights": "abc"})
    with pytest.raises(DataError, match=r"vision\.weights is 'abc' there, 'def' here"):
        check_weights(tmp_path, VISION | {"weights": "def"})


@pytest.mark.parametrize("options", [dict(dtype="float8"), dict(shards=21), dict(shards=-1)])
def test_what_no_cache_can_have_is_refused(source, options):
    with pytest.raises(DataError, match=re.escape(str(next(iter(options.values()))))):
        manifest_of(source, **options)


# --- half of it -----------------------------------------------------------------------------------


def test_no_cache_and_half_a_cache_are_refused(source, tmp_path):
    with pytest.raises(DataError, match=r"no manifest\.json there; run adacm2 prepare"):
        opened(tmp_path, source)
    manifest = write(tmp_path, source)
    shard_path(tmp_path, manifest, 1).unlink()
    assert missing_shards(tmp_path, manifest) == [1]
    with pytest.raises(DataError, match=r"1 of 3 shards are missing; run adacm2 prepare again"):
        opened(tmp_path, source)


def test_shards_that_changed_places_and_preparing_that_did_not_end_are_refused(source, tmp_path):
    manifest = write(tmp_path, source, shards=4)  # of five clips each
    paths = [shard_path(tmp_path, manifest, shard) for shard in (1, 2)]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(DataError, match=r"00002-of-00004\.frames is damaged \(it is shard 1 of"):
        opened(tmp_path, source)
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged \(it has 0 bytes\)"):
        opened(tmp_path, source)
    paths[1].write_bytes(whole)
    write_manifest(tmp_path, {name: manifest[name] for name in manifest if name != "done"})
    with pytest.raises(DataError, match="adacm2 prepare did not finish; run adacm2 prepare again"):
        opened(tmp_path, source)


def test_a_damaged_shard_is_named(source, tmp_path):
    manifest = write(tmp_path, source)
    path = shard_path(tmp_path, manifest, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"features-00002-of-00003\.frames is damaged"):
        opened(tmp_path, source)
    changed = bytearray(whole)
    place = whole.index(features_of(shard_clips(manifest, 2)[0], 3).tobytes())
    changed[place] ^= 1
    path.write_bytes(changed)
    dataset = opened(tmp_path, source)
    with pytest.raises(DataError, match=r"features-00002-of-00003\.frames is damaged"):
        frames_of(dataset[shard_clips(manifest, 2)[0]])
    index = bytearray(whole)
    index[-60] ^= 1
    path.write_bytes(index)
    with pytest.raises(DataError, match="is damaged"):
        opened(tmp_path, source)


def test_a_shard_of_another_cache_is_noticed(source, tmp_path):
    manifest = write(tmp_path / "one", source)
    write(tmp_path / "other", source, "int8")
    path = shard_path(tmp_path / "one", manifest, 0)
    path.write_bytes(shard_path(tmp_path / "other", manifest, 0).read_bytes())
    with pytest.raises(DataError, match="belongs to another cache"):
        opened(tmp_path / "one", source)


def test_a_damaged_manifest_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_cache_of_an_older_version_says_what_to_do(source, tmp_path):
    manifest = write(tmp_path, source)
    write_manifest(tmp_path, manifest | {"format": 1})
    with pytest.raises(DataError, match=r"^[^\n]*format 1 is not 2; prepare the features anew$"):
        opened(tmp_path, source)


def test_an_error_while_computing_leaves_no_shard(source, tmp_path):
    manifest = manifest_of(source)

    def failing():
        yield features_of(0, 3)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        write_shard(tmp_path, manifest, 0, failing())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_no_shard(source, tmp_path):
    program = """
        import resource, sys
        import numpy as np
        from adacm2_jax.errors import DataError
        from data.feature_cache.shards import write_shard

        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        manifest = dict(bounds=[0, 9], shards=1, shape=[1, 257, 64], dtype="float32")
        manifest["key"] = "k"
        clips = (np.ones((1, 257, 64), np.float32) for _ in range(9))
        try:
            write_shard(sys.argv[1], manifest, 0, clips)
        except DataError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r".* cannot be written \(.*File too large.*\): make room; .*\n", done.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_noticed_before_anything_is_computed(source, tmp_path, monkeypatch):
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(
        os, "statvfs", lambda _: type("S", (), {"f_bavail": 0, "f_frsize": full.f_frsize})
    )
    with pytest.raises(DataError, match=r"no room for .* GB of features"):
        check_room(tmp_path / "new", manifest_of(source))


def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(source, tmp_path):
    program = f"""
        import pathlib
        from adacm2_jax.files import beside_path
        beside_path(pathlib.Path({str(tmp_path)!r}, "features-00000-of-00001.array_record")).touch()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == 0
    (dead,) = tmp_path.iterdir()
    place, pid = dead.name.rsplit("-", 1)
    alive = tmp_path / f"{place}-{os.getppid()}"
    elsewhere = tmp_path / f"{place}-2-{pid}"  # a host whose name begins with this one's
    for path in (alive, elsewhere):
        path.touch()
    beside_path(tmp_path / "of_an_earlier_process_with_this_number").mkdir()
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {alive, elsewhere}
