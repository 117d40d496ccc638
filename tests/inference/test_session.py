"""Sessions: cuts, late questions, copies and files change nothing about what is known."""

import jax
import numpy as np
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.encoder import fingerprint
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import train_tokenizers
from adacm2_jax.inference.session import Session, SessionModel, open_memory, resume
from adacm2_jax.models.params import abstract_params, fresh_params, join_params
from adacm2_jax.sharding import make_mesh
from tests.small import QUESTION, quick_compilation, small_model

CONFIG = small_model()
OTHER = "3"
CHUNK = 4


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def make_params(seed: int) -> dict:
    abstract = abstract_params(CONFIG, ((".*", 1.0),), make_mesh())
    return join_params(fresh_params(CONFIG, abstract, seed), {})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    processor = train_tokenizers([QUESTION, OTHER], CONFIG, tmp_path_factory.mktemp("tokenizers"))
    return make_model(make_params(1), processor)


def make_model(params, processor) -> SessionModel:
    return SessionModel(
        config=CONFIG,
        params=params,
        processor=processor,
        generation=GenerationConfig(max_new_tokens=3),
        ask_as=str,
        chunk=CHUNK,
        resize="clean",
        on_truncated="error",
        fingerprint=lambda: fingerprint(params),
    )


def begin(model, questions=(QUESTION,), tokens=7) -> Session:
    return Session(model, questions, 1.0, open_memory(tokens))


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 28, 28, 3), dtype=np.uint8)


def known_tokens(session) -> list:
    """The tokens kept by every memory, layer by layer."""
    found = []
    for state in (session.state.known, session.state.open):
        if state is not None:
            tokens = state.memory.in_time_order()
            found += [np.asarray(tokens["frame"]), np.asarray(tokens["patch"])]
    return found


def assert_same_bits(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


def assert_same_knowledge(one, other) -> None:
    """The same tokens; values but for the rounding of products of other sizes."""
    for mine, yours in zip(known_tokens(one), known_tokens(other), strict=True):
        np.testing.assert_array_equal(mine, yours)
    for mine, yours in zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True):
        if mine.dtype == np.float32:
            np.testing.assert_allclose(mine, yours, rtol=1e-4, atol=1e-4)


def test_a_known_question_is_answered_as_by_a_reading_to_the_end(model):
    video = frames(11)
    answerer = Answerer(
        CONFIG, model.params, model.processor, {"adacm2": CONFIG.memory}, model.generation
    )
    session = begin(model, (QUESTION, OTHER))
    for count in (1, 5, 11):
        session.push(video[session.seen : count])
        reading = answerer.start([QUESTION, OTHER], np.zeros(1, int), np.zeros(1, np.uint32))
        for first in range(0, count, CHUNK):
            part = np.zeros((1, CHUNK, 28, 28, 3), np.uint8)
            piece = video[first : min(first + CHUNK, count)]
            part[0, : len(piece)] = piece
            answerer.read(reading, part, (np.arange(CHUNK) < len(piece))[None])
        expected = answerer.answer(reading, "adacm2")
        replies = session.ask()
        assert [reply.question for reply in replies] == [QUESTION, OTHER]
        for reply, (best, *_) in zip(replies, expected, strict=True):
            assert reply.answer == best.text and reply.policy == "adacm2"
            # A few roundings of a log-probability near 5, in another order.
            assert reply.score == pytest.approx(best.score, abs=1e-5)
            assert reply.frames == session.seen == count


def test_cuts_do_not_matter_and_asking_changes_nothing(model):
    video = frames(13)
    whole = begin(model)
    whole.push(video)
    by_chunks, one_by_one = begin(model), begin(model)
    for first in range(0, 13, CHUNK):
        by_chunks.push(video[first : first + CHUNK])
        by_chunks.ask()
        by_chunks.ask("why?")
    for frame in video:
        one_by_one.push(frame)
    assert_same_bits(whole, by_chunks)  # the cuts are the session's own
    assert_same_knowledge(whole, one_by_one)
    assert whole.seen == one_by_one.seen == 13


def test_size_and_bound_are_those_of_the_first_frame(model):
    session = begin(model, (QUESTION, OTHER), tokens=7)
    size = session.size
    for _ in range(6):
        session.push(frames(5))
        assert session.size == size and session.kept <= session.bound
    assert session.kept > 7  # the open memory is full, and those of the questions are not empty


def test_a_late_question_reads_what_is_open(model):
    """Against the same memory read to the end with that question, which it does not depend on."""
    video = frames(9)
    session = begin(model, ())
    session.push(video)
    answerer = Answerer(
        CONFIG, model.params, model.processor, {"open": open_memory(7)}, model.generation
    )
    reading = answerer.start([QUESTION], np.zeros(1, int), np.zeros(1, np.uint32))
    for first in range(0, 12, 3):
        part, valid = np.zeros((1, 3, 28, 28, 3), np.uint8), np.zeros((1, 3), bool)
        piece = video[first : first + 3]
        part[0, : len(piece)], valid[0, : len(piece)] = piece, True
        answerer.read(reading, part, valid)
    ((best, *_),) = answerer.answer(reading, "open")
    reply = session.ask(QUESTION)
    assert reply.answer == best.text and reply.policy == "open"
    assert reply.score == pytest.approx(best.score, abs=1e-5)
    assert session.ask() == []


def test_a_fork_has_the_same_past_and_a_future_of_its_own(model):
    session, alone = begin(model), begin(model)
    for each in (session, alone):
        each.push(frames(6))
    fork = session.fork()
    assert_same_bits(session, fork)
    fork.push(frames(5, seed=1))
    assert_same_bits(session, alone)
    session.push(frames(3, seed=2))
    alone.push(frames(3, seed=2))
    assert_same_bits(session, alone)
    assert (fork.seen, session.seen) == (11, 9)


@pytest.fixture
def saved(model, tmp_path):
    session = begin(model)
    session.push(frames(9))
    session.save(tmp_path / "deep" / "one.session")
    return session, tmp_path / "deep" / "one.session"


def test_a_saved_session_goes_on_bit_for_bit(model, saved):
    session, path = saved
    again = resume(model, path)
    assert_same_bits(session, again)
    assert again.questions == session.questions and again.seen == 9
    assert again.ask() == session.ask() and again.ask("why?") == session.ask("why?")
    for each in (session, again):
        each.push(frames(6, seed=3))
    assert_same_bits(session, again)
    assert path.stat().st_size <= 1.02 * session.size + 4096
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_session_is_refused_by_another_model(model, saved):
    other = make_model(make_params(2), model.processor)
    with pytest.raises(UserError, match="is of another model"):
        resume(other, saved[1])


def test_what_is_no_session_is_one_line(model, saved, tmp_path):
    path = saved[1]
    content = path.read_bytes()
    for name, text, message in (
        ("none", None, "there is no session at"),
        ("text", b"hello", "is no session, or damaged"),
        ("cut", content[: len(content) // 2], "is no session, or damaged"),
        ("empty", b"", "is no session, or damaged"),
        ("version", content.replace(b'\\"version\\": 1', b'\\"version\\": 7'), "has form 7"),
    ):
        if text is not None:
            (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=message):
            resume(model, tmp_path / name)
    with pytest.raises(UserError, match="there is no session at"):
        resume(model, tmp_path)


def test_frames_of_any_size_are_made_square_and_others_refused(model):
    session = begin(model, ())
    session.push(np.zeros((2, 40, 30, 3), np.uint8))
    assert session.seen == 2
    for wrong in (
        np.zeros((2, 40, 30, 3), np.float32),
        np.zeros((40, 30), np.uint8),
        np.zeros((2, 0, 30, 3), np.uint8),
    ):
        with pytest.raises(UserError, match="frames are"):
            session.push(wrong)
    with pytest.raises(UserError, match="has seen no frame yet"):
        begin(model).ask()


def test_a_file_that_cannot_be_written_is_told(model, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        begin(model).save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
