"""How many processes decode, and with how many threads each."""

import types

import pytest

from adacm2_jax.video.frames import Sampling
from data import workers
from data.jsonl import Example
from data.training_set import decoding_workers
from tests.video.make_videos import encode, numbered_frames

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "memory", "batch", "picture", "expected"),
    [
        (112, 400 * GB, 10**8, (340, 256), 111),  # one is left for the devices
        (2, 16 * GB, 10**8, (340, 256), 0),
        (1, 16 * GB, 10**8, (340, 256), 0),
        (3, 16 * GB, 10**8, (340, 256), 2),
        # 3 batches of 1 GB each, and 24 pictures: half of 64 GB holds ten.
        (64, 64 * GB, GB, (1920, 1080), 10),
        # Of 8K pictures 24 take 1.2 GB.
        (64, 64 * GB, 10**6, (7680, 4320), 26),
        (1000, 0, 1, (1, 1), 256),
        (64, GB, GB, (1, 1), 0),
    ],
)
def test_there_are_as_many_as_cores_and_memory_allow(cores, memory, batch, picture, expected):
    assert workers.auto_workers(cores, memory, batch, picture) == expected


def experiment(number: int):
    """What is asked of one."""
    return types.SimpleNamespace(
        data=types.SimpleNamespace(
            workers=number, jitter=False, on_truncated="error", resize="clean"
        ),
        clip_sampling=Sampling("uniform", num_frames=2),
        train=types.SimpleNamespace(num_frames=2),
        model=types.SimpleNamespace(vision=types.SimpleNamespace(image_size=10)),
    )


def test_a_given_number_is_taken_and_minus_one_looks_at_the_first_video_that_opens(monkeypatch):
    video = encode(None, numbered_frames(3, width=96, height=64), fps=3)
    source = [Example(str(n), v, "q", "a", None, None) for n, v in enumerate((b"none", video))]
    seen = []
    monkeypatch.setattr("data.training_set.auto_workers", lambda *given: seen.append(given) or 7)
    assert [decoding_workers(experiment(number), source, 4) for number in (0, 3, -1)] == [0, 3, 7]
    ((cores, memory, batch, picture),) = seen
    assert cores >= 1 and memory > GB and batch == 4 * 2 * 10 * 10 * 3 and picture == (96, 64)


def test_each_decoder_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 16)
    monkeypatch.setattr(workers, "live_as_long_as_parent", lambda: None)
    assert workers.decoder_threads() == 16 // workers.THREADS
    for count, threads in ((4, 4), (5, 3), (15, 1), (64, 1)):
        monkeypatch.setattr(workers, "_decoders", workers.THREADS)
        workers.begin_decoding(count)
        assert workers.decoder_threads() == threads
