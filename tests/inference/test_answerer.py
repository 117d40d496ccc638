"""The answerer: chunks, rows and policies, and what it refuses."""

import jax
import numpy as np
import pytest

import adacm2_jax.inference.answerer as answer
from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference import steps as streaming
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.models.params import abstract_params, fresh_params, join_params
from adacm2_jax.sharding import make_mesh
from tests.small import QUESTION, quick_compilation, small_model

CONFIG = small_model()
MEMORIES = {
    "adacm2": CONFIG.memory,
    "full": MemoryConfig(policy="full", max_frames=6),
    "random": MemoryConfig(policy="random", recent_ratio="0.3", conserve_ratio="0.5"),
    "merge": MemoryConfig(policy="merge", bank_frames=2),
}


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def params():
    abstract = abstract_params(CONFIG, ((".*", 1.0),), make_mesh())
    return join_params(fresh_params(CONFIG, abstract, 1), {})


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return train_tokenizers([QUESTION, "3"], CONFIG, tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def make(params, processor):
    def make(names=tuple(MEMORIES), **generation) -> Answerer:
        memories = {name: MEMORIES[name] for name in names}
        settings = GenerationConfig(**({"max_new_tokens": 3} | generation))
        return Answerer(CONFIG, params, processor, memories, settings)

    return make


def frames(videos: int, count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 255, (videos, count, 28, 28, 3), dtype=np.uint8)


def read(answerer, questions, video, chunk=3, totals=None):
    """Answers about videos uint8[videos, T, …], fed in chunks, by policy."""
    count = video.shape[1]
    totals = np.full(len(questions), count) if totals is None else totals
    reading = answerer.start(questions, totals, np.arange(len(questions), dtype=np.uint32))
    for begin in range(0, count, chunk):
        part = video[:, begin : begin + chunk]
        valid = np.zeros((len(video), chunk), bool)
        valid[:, : part.shape[1]] = True
        padded = np.zeros((len(video), chunk, *video.shape[2:]), np.uint8)
        padded[:, : part.shape[1]] = part
        answerer.read(reading, padded, valid)
    return {name: answerer.answer(reading, name) for name in reading.states}


def test_chunks_do_not_matter(make):
    video = frames(2, 6)
    whole = read(make(), [QUESTION] * 2, video, chunk=6)
    for chunk in (2, 4):
        parts = read(make(), [QUESTION] * 2, video, chunk=chunk)
        for name in MEMORIES:
            for one, other in zip(whole[name], parts[name], strict=True):
                assert one[0].text == other[0].text
                # A few roundings of a log-probability near 5, in another order.
                assert one[0].score == pytest.approx(other[0].score, abs=1e-5)


def test_questions_share_a_video_as_if_each_had_its_own(make):
    video = frames(1, 5)
    questions = [QUESTION, "3", ""]
    shared = read(make(("adacm2",)), questions, video)["adacm2"]
    own = read(make(("adacm2",)), questions, np.repeat(video, 3, axis=0))["adacm2"]
    for one, other in zip(shared, own, strict=True):
        assert one[0].text == other[0].text
        assert one[0].score == pytest.approx(other[0].score, abs=1e-5)
    assert len({row[0].score for row in shared}) == 3


def test_a_policy_s_samples_do_not_depend_on_its_company(make):
    video = frames(2, 6)
    together = read(make(temperature=1.0), [QUESTION] * 2, video)
    for name in MEMORIES:
        alone = read(make((name,), temperature=1.0), [QUESTION] * 2, video)
        assert alone[name] == together[name]


def test_the_n_best_come_best_first(make):
    (row,) = read(make(("full",), num_beams=4, num_return=3), [QUESTION], frames(1, 3))["full"]
    scores = [one.score for one in row]
    assert len(row) == 3 and scores == sorted(scores, reverse=True)
    assert len({one.text for one in row}) > 1


def test_policies_keep_what_they_promise(make):
    answerer = make()
    reading = answerer.start([QUESTION], np.array([6]), np.zeros(1, np.uint32))
    answerer.read(reading, frames(1, 6), np.ones((1, 6), bool))
    kept = {name: int(state.memory.length.max()) for name, state in reading.states.items()}
    assert kept["full"] == 30 and kept["merge"] == 10 and kept["adacm2"] == kept["random"] <= 9
    assert set(reading.seconds) == set(MEMORIES) and min(reading.seconds.values()) > 0


def test_a_chunk_is_compiled_once_for_any_length_of_video(make):
    functions = streaming.encode, streaming.read, answer._generate
    for function in functions:
        function.clear_cache()
    read(make(("adacm2",)), [QUESTION], frames(1, 3))
    compiled = [function._cache_size() for function in functions]
    read(make(("adacm2",)), [QUESTION], frames(1, 41))
    assert compiled == [1, 1, 1]
    assert [function._cache_size() for function in functions] == compiled


def test_a_video_longer_than_full_can_hold_is_refused(make):
    with pytest.raises(
        UserError, match=r"'full' holds at most 6 frames, the video has 7.*full_frames"
    ):
        make().start([QUESTION], np.array([7]), np.zeros(1, np.uint32))
    make(("adacm2",)).start([QUESTION], np.array([7000]), np.zeros(1, np.uint32))


def test_a_question_too_long_is_refused(make):
    with pytest.raises(UserError, match="the limit is 24"):
        make().start(["why " * 40], np.array([1]), np.zeros(1, np.uint32))


def test_parameters_that_hold_nan_are_an_error_not_an_answer(params, processor):
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    memories = {"adacm2": CONFIG.memory}
    answerer = Answerer(CONFIG, broken, processor, memories, GenerationConfig(max_new_tokens=3))
    reading = answerer.start([QUESTION], np.array([3]), np.zeros(1, np.uint32))
    answerer.read(reading, frames(1, 3), np.ones((1, 3), bool))
    with pytest.raises(UserError, match=r"not finite.*check the checkpoint"):
        answerer.answer(reading, "adacm2")
