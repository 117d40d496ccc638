"""How stored clips are read: memory that is used again, threads, a second place for frames."""

import concurrent.futures
import errno
import os
import re

import jax
import numpy as np
import pytest

from adacm2_jax.errors import DataError
from data.feature_cache.shards import frame_sum, shard_clips, shard_path
from data.pipeline import stack
from tests.data.test_features import features_of, frames_of, opened, source, write

__all__ = ["source"]


def test_a_batch_takes_the_memory_of_one_that_nobody_holds(source, tmp_path):
    write(tmp_path, source)
    dataset = opened(tmp_path, source)
    first = stack([dataset[number] for number in range(4)])["frames"]
    place, part = first.ctypes.data, first[2]
    expected = part.copy()
    second = stack([dataset[number] for number in range(4, 8)])["frames"]
    assert second.ctypes.data != place  # the first is held, and so is a part of it
    del first
    third = stack([dataset[number] for number in range(8, 12)])["frames"]
    assert third.ctypes.data != place and np.array_equal(part, expected)
    del part
    fourth = stack([dataset[number] for number in range(4, 8)])["frames"]
    assert fourth.ctypes.data == place and np.array_equal(fourth, second)  # padding is zeros again


def test_a_batch_that_a_device_was_given_keeps_its_memory(source, tmp_path):
    """Where the device is the CPU it may work in the host's own memory."""
    write(tmp_path, source)
    dataset = opened(tmp_path, source)
    batch = stack([dataset[number] for number in range(4)])["frames"]
    expected = batch.copy()
    on_device = jax.device_put(batch)
    del batch
    for first in (4, 8, 12):
        stack([dataset[number] for number in range(first, first + 4)])
    assert np.array_equal(on_device, expected)


def test_threads_read_the_same_as_one(source, tmp_path):
    write(tmp_path, source)
    dataset = opened(tmp_path, source)
    rows = [dataset[number] for number in range(20)]
    alone = np.stack([frames_of(row) for row in rows])
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for batch in pool.map(stack, [rows] * 8):
            assert np.array_equal(batch["frames"], alone)


def test_frames_that_were_read_are_kept_in_a_second_place(source, tmp_path):
    manifest = write(tmp_path / "slow", source)
    local = tmp_path / "local"
    expected = [frames_of(row) for row in opened(tmp_path / "slow", source)]
    dataset = opened(tmp_path / "slow", source, local=local)
    first = [frames_of(dataset[number]) for number in range(10)]
    (kept,) = local.iterdir()
    assert kept.name == manifest["key"] and len(list(kept.iterdir())) == 2  # of three shards
    # What is there comes from there, also in another process; what is not, from the cache.
    opened_again = opened(tmp_path / "slow", source, local=local)
    damage(tmp_path / "slow", manifest, range(10))
    assert np.array_equal([frames_of(opened_again[number]) for number in range(10)], first)
    assert np.array_equal(first, expected[:10])
    assert np.array_equal(frames_of(opened_again[19]), expected[19])


def damage(directory, manifest, clips_of_cache) -> None:
    """Turns a bit of each of these clips."""
    for shard in range(manifest["shards"]):
        path = shard_path(directory, manifest, shard)
        content = bytearray(path.read_bytes())
        for clip in set(shard_clips(manifest, shard)) & set(clips_of_cache):
            place = content.find(features_of(clip, 3).tobytes())
            if place >= 0:
                content[place] ^= 1
        path.write_bytes(content)


def test_a_second_place_that_is_damaged_is_filled_again(source, tmp_path):
    manifest = write(tmp_path / "slow", source)
    local = tmp_path / "local"
    expected = frames_of(opened(tmp_path / "slow", source, local=local)[0])
    copy = local / manifest["key"] / shard_path(local, manifest, 0).name
    whole = copy.read_bytes()
    assert any(whole)
    for broken in (b"", whole[:5], bytes(len(whole)), whole[:3] + b"?" + whole[4:]):
        copy.write_bytes(broken)
        assert np.array_equal(
            frames_of(opened(tmp_path / "slow", source, local=local)[0]), expected
        )
        assert copy.read_bytes() == whole


def test_a_second_place_with_something_in_its_way_names_the_flag(source, tmp_path):
    manifest = write(tmp_path / "slow", source)
    place = tmp_path / "local" / manifest["key"] / shard_path("", manifest, 0).name
    place.mkdir(parents=True)
    with pytest.raises(DataError, match=re.escape(f"data.features_local: {place}: Is a dir")):
        frames_of(opened(tmp_path / "slow", source, local=tmp_path / "local")[0])


def test_a_second_place_that_cannot_be_read_is_done_without(source, tmp_path, monkeypatch):
    write(tmp_path / "slow", source)
    expected = frames_of(opened(tmp_path / "slow", source)[0])
    row = opened(tmp_path / "slow", source, local=tmp_path / "local")[0]
    read, broken = os.preadv, OSError(errno.EIO, os.strerror(errno.EIO))

    def preadv(file, *rest):
        if os.path.samestat(os.fstat(file), next((tmp_path / "local").glob("*/*")).stat()):
            raise broken
        return read(file, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    assert np.array_equal(frames_of(row), expected)


def test_a_second_place_without_room_is_told_once_and_does_no_harm(source, tmp_path, caplog):
    write(tmp_path / "slow", source)
    full = os.statvfs(tmp_path)
    dataset = opened(tmp_path / "slow", source, local=tmp_path / "local")
    expected = [frames_of(row) for row in opened(tmp_path / "slow", source)]
    values = (full.f_bsize, full.f_frsize, full.f_blocks, 0, 0, *full[5:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(values))
        found = [frames_of(dataset[number]) for number in range(6)]
    assert np.array_equal(found, expected[:6])
    assert caplog.text.count("the disk is nearly full") == 1


def test_a_sum_tells_every_changed_bit_whatever_the_length():
    random = np.random.default_rng(0)
    for size in (1, 7, 8, 20, 4099):
        frame = random.integers(0, 256, size, np.uint8)
        whole = frame_sum(frame)
        for place in random.integers(0, size, 20):
            changed = frame.copy()
            changed[place] ^= 1 << int(random.integers(8))
            assert frame_sum(changed) != whole
    assert frame_sum(np.zeros(20, np.uint8)) == 0
    words = frame[:4096].view("<u8")
    assert frame_sum(frame[:4096]) == sum(int(word) for word in words) % 2**64
