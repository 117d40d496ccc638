"""The answerer: chunks, rows and policies, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from adacm2_jax.config import MemoryConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference import steps
from adacm2_jax.inference.answerer import Answerer, bucket
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.models.adacm2 import Question, call
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


def begin(answerer, questions, video):
    """A reading of videos uint8[videos, T, …], before the first frame."""
    videos, count = video.shape[:2]
    return answerer.start(questions, np.full(videos, count), np.arange(videos, dtype=np.uint32))


def feed(answerer, reading, video, chunk=3):
    """Videos to their end, in chunks."""
    for start in range(0, video.shape[1], chunk):
        part = video[:, start : start + chunk]
        valid = np.zeros((len(video), chunk), bool)
        valid[:, : part.shape[1]] = True
        padded = np.zeros((len(video), chunk, *video.shape[2:]), np.uint8)
        padded[:, : part.shape[1]] = part
        answerer.read(reading, padded, valid)


def read(answerer, questions, video, chunk=3):
    """Answers about videos, fed in chunks, by policy."""
    reading = begin(answerer, questions, video)
    feed(answerer, reading, video, chunk)
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
    """Three rows are filled up to four: neither answers nor samples may tell."""
    video = frames(2, 5)
    questions = [QUESTION, "3", "", "", "3", QUESTION]
    memories = ("adacm2", "merge")
    shared = read(make(memories, temperature=1.0), questions, video)
    own = read(make(memories, temperature=1.0), questions, np.repeat(video, 3, axis=0))
    for name in memories:
        assert len(shared[name]) == len(own[name]) == 6
        for one, other in zip(shared[name], own[name], strict=True):
            assert one[0].text == other[0].text
            assert one[0].score == pytest.approx(other[0].score, abs=1e-5)
        assert len({row[0].score for row in shared[name]}) == 6


def test_padding_of_the_questions_changes_no_answer(make):
    memories = ("adacm2", "merge")
    answerer, video = make(memories), frames(2, 5)
    found = []
    for width in (0, CONFIG.max_text_len):
        totals, seeds = np.full(2, 5), np.arange(2, dtype=np.uint32)
        reading = answerer.start([QUESTION, "3"], totals, seeds, width)
        feed(answerer, reading, video)
        found.append({name: answerer.answer(reading, name) for name in reading.states})
        assert reading.question.qformer_ids.shape[1] == (width or 16)
    for name in memories:
        for narrow, wide in zip(found[0][name], found[1][name], strict=True):
            assert narrow[0].text == wide[0].text
            assert narrow[0].score == pytest.approx(wide[0].score, abs=1e-5)


def test_five_numbers_of_questions_need_the_programs_of_two(make):
    answerer, video = make(("adacm2", "random")), frames(1, 2)
    functions = steps.encode, steps.read, steps.answer, steps.log_likelihood
    for function in functions:
        function.clear_cache()
    for count in (3, 4, 5, 6, 8):
        reading = begin(answerer, [QUESTION] * count, video)
        feed(answerer, reading, video, chunk=2)
        for name in reading.states:
            assert len(answerer.answer(reading, name)) == count
            assert len(answerer.log_likelihoods(reading, name, [["3"]] * count)) == count
    # Rows of 4 and of 8: reading is compiled for each policy, what follows for both at once.
    assert [function._cache_size() for function in functions] == [1, 4, 2, 2]


def test_rows_are_filled_up_to_few_sizes():
    sizes = {count: bucket(count) for count in range(1, 300)}
    assert set(sizes.values()) == {1, 2, 4, 8, 16} | set(range(32, 321, 32))
    assert all(count <= size for count, size in sizes.items())
    assert [bucket(count) for count in (1, 2, 3, 9, 32, 33, 64)] == [1, 2, 4, 16, 32, 64, 64]


def test_arrays_of_the_caller_stay_his_own(make):
    """The states are donated chunk by chunk, under several policies."""
    answerer, video = make(("adacm2", "random")), frames(1, 6)
    totals, seeds = jnp.array([6]), jnp.array([7], jnp.uint32)
    answers = []
    for _ in range(2):
        reading = answerer.start([QUESTION], totals, seeds)
        feed(answerer, reading, video)
        answers.append([answerer.answer(reading, name)[0][0].text for name in reading.states])
    assert answers[0] == answers[1]
    assert totals.tolist() == [6] and seeds.tolist() == [7]


def test_questions_and_frames_of_other_numbers_of_videos_are_refused(make):
    answerer = make(("adacm2",))
    with pytest.raises(ValueError, match=r"3 question\(s\) and 2 seed\(s\) for 2 video\(s\)"):
        answerer.start([QUESTION] * 3, np.array([1, 1]), np.zeros(2, np.uint32))
    reading = begin(answerer, [QUESTION] * 2, frames(2, 3))
    with pytest.raises(ValueError, match=r"frames of 1 video.*started for 2"):
        answerer.read(reading, frames(1, 3), np.ones((1, 3), bool))
    with pytest.raises(ValueError, match=r"candidates for 1 row.*there are 2"):
        answerer.log_likelihoods(reading, "adacm2", [["3"]])


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
    answerer, video = make(), frames(1, 6)
    reading = begin(answerer, [QUESTION], video)
    started = reading.seconds
    feed(answerer, reading, video, chunk=6)
    assert 0 < started < reading.seconds
    kept = {name: answerer.remembered(reading, name)[0].kept_tokens for name in reading.states}
    assert kept["full"] == 30 and kept["merge"] == 10 and kept["adacm2"] == kept["random"] <= 9


def test_evidence_is_what_the_slots_hold(make):
    """Against a walk over the slots, one by one; two videos of three questions each."""
    answerer, video = make(), frames(2, 6)
    reading = begin(answerer, [QUESTION, "3", ""] * 2, video)
    feed(answerer, reading, video)
    for name in ("adacm2", "full", "random"):
        found = answerer.remembered(reading, name)
        assert len(found) == 6
        memory = jax.tree.map(np.asarray, reading.states[name].memory)
        for row, place in enumerate((0, 1, 2, 4, 5, 6)):
            tokens, scores, patches = {}, {}, []
            for layer in range(CONFIG.qformer.num_cross_layers):
                live = memory.slots[layer, place, : memory.length[layer, place]]
                pairs = [
                    [int(memory.frame[layer, place, i]), int(memory.patch[layer, place, i])]
                    for i in live
                ]
                patches.append(pairs)
                for (frame, _), i in zip(pairs, live, strict=True):
                    tokens[frame] = tokens.get(frame, 0) + 1
                    scores.setdefault(frame, []).append(float(memory.score[layer, place, i]))
            order = sorted(tokens, key=lambda frame: (-tokens[frame], -math.fsum(scores[frame])))
            shown = found[row]
            assert shown.frames_seen == 6
            assert shown.kept_tokens == max(map(len, patches))
            assert [each.frame for each in shown.frames] == order
            assert {each.frame: each.tokens for each in shown.frames} == tokens
            for each in shown.frames:
                assert each.score == pytest.approx(math.fsum(scores[each.frame]), rel=1e-12)
            own = answerer.kept_patches(reading, name, row)
            assert [layer.tolist() for layer in own] == patches
    assert {each.frame for each in answerer.remembered(reading, "full")[0].frames} == set(range(6))


def test_a_mean_is_evidence_of_no_frame(make):
    answerer, video = make(("merge",)), frames(1, 6)
    reading = begin(answerer, [QUESTION], video)
    feed(answerer, reading, video)
    (found,) = answerer.remembered(reading, "merge")
    assert (found.frames_seen, found.kept_tokens, found.frames) == (6, 10, ())
    assert answerer.kept_patches(reading, "merge", 0) == []


def test_likelihoods_are_those_of_one_token_after_the_other(make, params, processor):
    """Against the logits after every prefix by itself: other padding, other positions, float64."""
    answerer, video = make(("adacm2", "merge")), frames(2, 5)
    questions = [QUESTION, "3", "why?", ""]
    candidates = [["3", "on"], ["the ground"[:3]], [], ["3", "3", ""]]
    reading = begin(answerer, questions, video)
    feed(answerer, reading, video)
    model = steps.any_policy(CONFIG)

    @jax.jit
    def logits(queries, question):
        length = CONFIG.qformer.num_queries + question.llm_ids.shape[1]
        return call(model, params, "prefill", queries, question, length)[0]

    width = CONFIG.max_text_len + CONFIG.max_answer_len
    for name in reading.states:
        found = answerer.log_likelihoods(reading, name, candidates)
        assert [len(each.log_probs) for each in found] == [2, 1, 0, 3]
        for row, texts in enumerate(candidates):
            prompt = processor.questions([questions[row]])
            prompt = prompt.llm_ids[0][prompt.llm_mask[0]]
            for number, text in enumerate(texts):
                whole, targets = processor.training([questions[row]], [text])
                answer = whole.llm_ids[0][targets[0]]
                assert answer[-1] == processor.eos_id
                total = 0.0
                for i, token in enumerate(answer):
                    ids = np.zeros((1, width), np.int32)
                    mask = np.zeros((1, width), bool)
                    prefix = np.concatenate([prompt, answer[:i]])
                    ids[0, width - len(prefix) :], mask[0, width - len(prefix) :] = prefix, True
                    queries = reading.states[name].queries[row : row + 1]
                    after = np.asarray(logits(queries, Question(ids, mask, ids, mask)), float)
                    total += log_softmax(after[0])[token]
                assert found[row].tokens[number] == len(answer)
                # Each of up to 4 log-probabilities near 6 is right to a few roundings.
                assert found[row].log_probs[number] == pytest.approx(total, abs=2e-5)
                assert found[row].log_probs.dtype == np.float32


def test_a_candidate_is_never_cut(make, processor):
    answerer = make(("adacm2",))
    reading = begin(answerer, [QUESTION], frames(1, 3))
    with pytest.raises(UserError, match=r"candidate '3 3 3 3 3' has \d+ tokens.*limit is 4"):
        answerer.log_likelihoods(reading, "adacm2", [["3", "3 3 3 3 3"]])


def test_a_chunk_is_compiled_once_for_any_length_of_video(make):
    functions = steps.encode, steps.read, steps.answer
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
    reading = begin(answerer, [QUESTION], frames(1, 3))
    feed(answerer, reading, frames(1, 3))
    with pytest.raises(UserError, match=r"not finite.*check the checkpoint"):
        answerer.answer(reading, "adacm2")


# --- Questions that come late ---------------------------------------------------------------------


def read_late(answerer, questions, before, video, chunk):
    """Queries by policy, and what is kept, if questions come with the last frame."""
    counts = np.full(len(video), video.shape[1])
    seeds = np.arange(len(video), dtype=np.uint32)
    reading = answerer.start(questions, counts, seeds, before=before)
    feed(answerer, reading, video, chunk)
    kept = {
        name: [answerer.kept_patches(reading, name, row) for row in range(len(questions))]
        for name in reading.states
    }
    return {name: np.asarray(state.queries) for name, state in reading.states.items()}, kept


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_a_question_that_comes_with_the_last_frame_has_chosen_nothing_before(make):
    answerer, video = make(), frames(2, 6)
    asked, other = [QUESTION] * 2, ["3"] * 2
    known = read_late(answerer, asked, None, video, 3)
    # Read beside the question itself, it is the question that is known.
    np.testing.assert_equal(read_late(answerer, asked, asked, video, 3)[1], known[1])
    late, kept = read_late(answerer, asked, other, video, 3)
    # As by hand: all frames but the last with the other text, then the last one with the question.
    reading = answerer.start(other, np.full(2, 6), np.arange(2, dtype=np.uint32))
    feed(answerer, reading, video[:, :5])
    reading.question = answerer.start(asked, np.full(2, 6), np.zeros(2, np.uint32)).question
    feed(answerer, reading, video[:, 5:])
    for name, state in reading.states.items():
        # Chunks of the same shape through the same program: the very same numbers.
        np.testing.assert_array_equal(late[name], state.queries, err_msg=name)
        by_hand = [answerer.kept_patches(reading, name, row) for row in range(2)]
        assert same(kept[name], by_hand), name
    # What chooses without a text keeps the same tokens whenever it is asked.
    assert same(kept["random"], known[1]["random"]) and same(kept["full"], known[1]["full"])
    np.testing.assert_array_equal(late["random"], known[0]["random"])


def test_late_questions_need_the_length_of_the_video_and_a_text_each(make):
    answerer = make(("adacm2",))
    with pytest.raises(ValueError, match=r"2 text.s. to read before 1 question"):
        answerer.start([QUESTION], np.array([4]), np.zeros(1, np.uint32), before=["a", "b"])
    with pytest.raises(ValueError, match="the length of each video"):
        answerer.start([QUESTION], np.array([0]), np.zeros(1, np.uint32), before=[""])


def test_a_chunk_of_padding_compiles_what_frames_need(make):
    """Who measures a reading begins with one, before the clock starts."""
    answerer, nothing = make(("adacm2",), max_new_tokens=2), np.zeros((1, 5), bool)
    steps.read.clear_cache()
    reading = begin(answerer, [QUESTION], frames(1, 5))
    answerer.read(reading, np.zeros((1, 5, 28, 28, 3), np.uint8), nothing)
    compiled = steps.read._cache_size()
    assert compiled == 1
    answerer.read(reading, frames(1, 5), ~nothing)
    assert steps.read._cache_size() == compiled
