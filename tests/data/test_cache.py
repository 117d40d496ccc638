"""Decoded clips on disk: the same clips, decoded once, never half."""

import dataclasses
import os
import pickle
import shutil

import numpy as np
import pytest

from adacm2_jax.errors import DataError
from adacm2_jax.video.frames import Sampling
from data.cache import cached_clips
from data.jsonl import Example
from data.pipeline import LoadClip, clips, training_batches
from tests.video.make_videos import encode, numbered_frames

LOAD = LoadClip(Sampling("uniform", num_frames=3), 3, 16, False, "error")


class Videos(list):
    """Examples in memory; ``version`` stands for the files' names, sizes and times."""

    version = "1"

    def fingerprint(self) -> str:
        return self.version


@pytest.fixture
def source() -> Videos:
    video = encode(None, numbered_frames(9), fps=3)
    examples = [Example(str(n), video, f"q{n}", str(n), None, None) for n in range(70)]
    examples[5] = Example("bad", b"no video", "q", "a", None, None)
    return Videos(examples)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_cached_clips_are_the_clips(source, tmp_path, decoded):
    cached, fresh = cached_clips(source, LOAD, tmp_path), clips(source, LOAD)
    assert len(cached) == len(fresh) == 70
    assert all(same(cached[i], fresh[i]) for i in range(70))
    assert not cached[5]["valid"].any()
    decoded[0] = 0
    again = cached_clips(source, LOAD, tmp_path)
    assert all(same(again[i], cached[i]) for i in range(70)) and decoded[0] == 0


def test_batches_come_in_the_order_of_uncached_ones(source, tmp_path):
    both = []
    for dataset in (cached_clips(source, LOAD, tmp_path), clips(source, LOAD)):
        batches = training_batches(dataset, batch_size=4, seed=3)
        both.append([next(batches) for _ in range(20)])
        batches.close()
    assert all(same(one, other) for one, other in zip(*both, strict=True))


def test_another_source_or_another_way_of_reading_is_decoded_anew(source, tmp_path):
    cached_clips(source, LOAD, tmp_path)
    changed = Videos(source)
    changed.version = "2"
    cached_clips(changed, LOAD, tmp_path)
    cached_clips(source, dataclasses.replace(LOAD, size=8), tmp_path)
    cached_clips(source, dataclasses.replace(LOAD, resize="ma_lmm"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_cache_travels_to_another_process_without_its_arrays(source, tmp_path):
    dataset = cached_clips(source, LOAD, tmp_path)
    dataset[0]
    sent = pickle.dumps(dataset.source if hasattr(dataset, "source") else dataset)
    assert len(sent) < 100_000


def test_jitter_cannot_be_cached(source, tmp_path):
    with pytest.raises(DataError, match=r"data\.cache with data\.jitter"):
        cached_clips(source, dataclasses.replace(LOAD, jitter=True), tmp_path)


def test_a_full_disk_is_refused_before_decoding(source, tmp_path, monkeypatch, decoded):
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(
        os, "statvfs", lambda _: type("S", (), {"f_bavail": 0, "f_frsize": full.f_frsize})
    )
    with pytest.raises(DataError, match=r"no room for .* GB"):
        cached_clips(source, LOAD, tmp_path)
    assert decoded[0] == 0 and not list(tmp_path.iterdir())


def test_an_error_while_decoding_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("data.cache.stack", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached_clips(source, LOAD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_neither_used_nor_kept(source, tmp_path):
    cached_clips(source, LOAD, tmp_path / "other")
    (whole,) = (tmp_path / "other").iterdir()
    import socket
    import subprocess
    import sys

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    partial = f".{whole.name}.partial-{socket.gethostname()}-"
    for pid in (dead.pid, os.getppid()):
        shutil.copytree(whole, tmp_path / "cache" / f"{partial}{pid}")
        (tmp_path / "cache" / f"{partial}{pid}" / "texts.json").unlink()
    dataset = cached_clips(source, LOAD, tmp_path / "cache")
    assert len(dataset) == 70
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        whole.name,
        f"{partial}{os.getppid()}",  # somebody is still at it
    }
