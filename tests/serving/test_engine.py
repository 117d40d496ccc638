"""Sessions side by side in one engine: each is what it would be by itself, within the budget."""

import concurrent.futures
import gc
import random
import shutil
import threading
import time
import weakref

import jax
import numpy as np
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.inference.session import Session, open_memory
from adacm2_jax.serving.limits import BusyError, MissingError
from adacm2_jax.serving.operations import Act, Ask, CancelledError, Push, Wish
from tests.inference.test_session import CHUNK, CONFIG, OTHER, frames
from tests.serving.conftest import LATE
from tests.small import QUESTION, quick_compilation


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


def on_table(engine, act):
    return engine.submit(None, Act(lambda table, _: act(table))).done.result(60)


def open_session(engine, questions=(QUESTION,)) -> str:
    return on_table(engine, lambda table: table.open(questions, 1.0).id)


def push(engine, name, video, cuts=()) -> int:
    operation = engine.submit(name, Push(engine.wake))
    for part in np.split(video, cuts):
        for first in range(0, len(part), CHUNK):
            operation.put(part[first : first + CHUNK])
    operation.end()
    return operation.done.result(60)


def ask(engine, name, question=None, **wish):
    return engine.submit(name, Ask(Wish(question, **wish))).done.result(60)


def state_of(engine, name):
    while True:
        act = Act(lambda table, entry: jax.device_get(table.bring_back(entry).state))
        try:
            return engine.submit(name, act).done.result(60)
        except BusyError:
            time.sleep(0.01)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_answer_is_that_of_the_session_in_python(start, model):
    engine, video = start(), frames(11)
    alone = Session(model, (QUESTION,), 1.0, open_memory(2 * CONFIG.vision.tokens_per_frame))
    alone.push(video)
    name = open_session(engine)
    assert push(engine, name, video) == 11
    for question in (QUESTION, LATE):
        said, expected = ask(engine, name, question), alone.ask(question)
        assert said.reply.answer == expected.answer and said.reply.policy == expected.policy
        assert said.reply.score == pytest.approx(expected.score, abs=1e-5)
        assert [moment.time for moment in said.reply.moments] == [
            moment.time for moment in expected.moments
        ]
        assert said.prompt_tokens > CONFIG.qformer.num_queries
    for mine, yours in zip(
        jax.tree.leaves(state_of(engine, name)), jax.tree.leaves(alone.state), strict=True
    ):
        if mine.dtype == np.float32:
            np.testing.assert_allclose(mine, yours, rtol=1e-4, atol=1e-4)
        else:
            np.testing.assert_array_equal(mine, yours)


def test_each_of_many_at_once_is_bit_for_bit_itself_alone(start, size):
    """Twelve clients push, ask, fork and close at random; then each history once more, alone."""
    engine = start("together", session_bytes=7 * size, idle_seconds=0.05, save_seconds=0.01)
    histories, states, answers = {}, {}, {}
    busy = threading.Event()

    def client(number: int) -> None:
        rng = random.Random(number)
        history, name = [], None
        while name is None:
            try:
                name = open_session(engine)
            except BusyError:
                busy.set()
        said = []
        for _ in range(6):
            action = rng.choice(["push", "push", "ask", "fork"])
            if action == "push":
                seed, count = rng.randrange(100), rng.choice([1, 3, 4, 9])
                history.append((seed, count))
                push(engine, name, frames(count, seed))
            elif action == "fork":
                try:
                    made = engine.submit(name, Act(lambda t, e: t.fork(e).id)).done.result(60)
                except BusyError:
                    busy.set()
                    continue
                push(engine, name, frames(2, 7))  # a future that the fork does not have
                engine.submit(name, Act(lambda t, e: t.close(e))).done.result(60)
                name = made
            elif history:
                question = rng.choice([None, LATE])
                said.append((len(history), question, ask(engine, name, question).reply.answer))
        histories[number], answers[number] = history, said
        states[number] = state_of(engine, name)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(client, range(12)))
    assert engine.table.most <= 7 * size
    assert engine.table.evicted and engine.table.resumed
    by_itself = start("alone")
    for number, history in histories.items():
        name, told = open_session(by_itself), list(answers[number])
        for place, (seed, count) in enumerate(history, 1):
            push(by_itself, name, frames(count, seed))
            while told and told[0][0] == place:
                _, question, answer = told.pop(0)
                assert ask(by_itself, name, question).reply.answer == answer
        assert_same_bits(state_of(by_itself, name), states[number])


def test_a_full_server_says_so_and_the_budget_is_never_exceeded(start, size):
    engine = start(session_bytes=2 * size + 10)
    names = [open_session(engine) for _ in range(2)]
    held = [engine.submit(name, Push(engine.wake)) for name in names]
    for operation in held:
        operation.put(frames(1))  # both are being read
    with pytest.raises(BusyError, match="budget"):
        open_session(engine)
    for operation in held:
        operation.end()
        operation.done.result(60)
    third = open_session(engine)  # one of the idle ones has made room
    assert engine.table.evicted == 1 and engine.table.on_device == engine.table.most == 2 * size
    with pytest.raises(UserError, match="--session-bytes"):
        on_table(engine, lambda table: table.open((QUESTION, OTHER), 1.0, 4000))
    assert push(engine, third, frames(2)) == 2 and push(engine, names[0], frames(3)) == 4


def test_too_many_sessions_and_too_many_requests_are_refused(start):
    engine = start(sessions=2, waiting=3)
    name, _ = open_session(engine), open_session(engine)
    with pytest.raises(BusyError, match="2 sessions are open"):
        open_session(engine)
    with pytest.raises(BusyError, match="2 sessions are open"):
        engine.submit(name, Act(lambda table, entry: table.fork(entry))).done.result(60)
    pushes = [engine.submit(name, Push(engine.wake)) for _ in range(3)]
    with pytest.raises(BusyError, match="3 requests wait"):
        engine.submit(name, Ask(Wish()))
    for operation in pushes:
        operation.end()
    assert pushes[-1].done.result(60) == 0


def test_what_was_saved_is_there_after_the_end_bit_for_bit(start, tmp_path):
    engine = start(save_seconds=1e9, idle_seconds=1e9)
    names = [open_session(engine) for _ in range(3)]
    for number, name in enumerate(names):
        push(engine, name, frames(5 + number, number))
    before = [state_of(engine, name) for name in names]
    for name in names[:2]:
        engine.submit(name, Act(lambda table, entry: table.save(entry))).done.result(60)
    # A copy of the directory is what a server that is killed now would leave.
    shutil.copytree(tmp_path / "sessions", tmp_path / "killed")
    (tmp_path / "killed" / "s-0123456789abcdef.session").write_bytes(b"damaged")
    (tmp_path / "killed" / "other.session").write_bytes(b"not ours")
    again = start("killed")
    found = on_table(again, lambda table: [entry.describe() for entry in table.named()])
    assert {entry["id"]: entry["seen"] for entry in found} == dict(zip(names, (5, 6), strict=False))
    assert not any(entry["on_device"] for entry in found)
    for name, state in zip(names[:2], before, strict=False):
        assert_same_bits(state_of(again, name), state)
    with pytest.raises(MissingError):
        state_of(again, names[2])
    engine.stop()  # in peace: all are saved
    last = start("sessions")
    for name, state in zip(names, before, strict=True):
        assert_same_bits(state_of(last, name), state)


def test_frames_that_fail_on_the_way_leave_those_before(start):
    engine = start()
    name = open_session(engine)
    operation = engine.submit(name, Push(engine.wake))
    operation.put(frames(4))
    operation.end(UserError("cut short"))
    with pytest.raises(UserError, match="cut short"):
        operation.done.result(60)
    assert push(engine, name, frames(1)) == 5


def test_who_goes_away_stops_nobody_else(start):
    engine = start()
    name, other = open_session(engine), open_session(engine)
    operation = engine.submit(name, Push(engine.wake))
    operation.put(frames(4))
    operation.cancelled = True
    with pytest.raises(CancelledError):
        operation.done.result(60)
    with pytest.raises(CancelledError):
        operation.put(frames(4))
    push(engine, other, frames(3))
    asked = Ask(Wish(LATE))
    asked.cancelled = True
    with pytest.raises(CancelledError):
        engine.submit(other, asked).done.result(60)
    assert ask(engine, other, LATE).reply.frames == 3


def test_what_waits_for_a_closed_session_is_told(start):
    engine = start()
    name = open_session(engine)
    held = engine.submit(name, Push(engine.wake))
    closing = engine.submit(name, Act(lambda table, entry: table.close(entry)))
    waiting = engine.submit(name, Ask(Wish(LATE)))
    held.end()
    closing.done.result(60)
    with pytest.raises(MissingError, match="closed"):
        waiting.done.result(60)
    with pytest.raises(MissingError, match="no such session"):
        ask(engine, name)


def test_a_question_without_a_frame_is_refused(start):
    engine = start()
    with pytest.raises(UserError, match="seen no frame"):
        ask(engine, open_session(engine))
    with pytest.raises(UserError, match="knows no question"):
        ask(engine, open_session(engine, ()))
    with pytest.raises(UserError, match="tokens; the limit"):
        on_table(engine, lambda table: table.open(("word " * 99,), 1.0))


def test_pieces_of_an_answer_are_the_answer_and_stops_are_kept_out(start, model):
    engine, pieces = start(), []
    name = open_session(engine)
    push(engine, name, frames(6))
    asked = engine.submit(name, Ask(Wish(LATE, temperature=9.0, seed=5), pieces.append))
    said = asked.done.result(60)
    text = said.reply.answer
    assert "".join(pieces) == text and said.completion_tokens <= model.generation.max_new_tokens
    assert ask(engine, name, LATE, temperature=9.0, seed=5).reply.answer == text
    others = {ask(engine, name, LATE, temperature=9.0, seed=n).reply.answer for n in range(6)}
    assert len(others) > 1
    if len(text) > 1:
        cut = ask(engine, name, LATE, temperature=9.0, seed=5, stop=(text[1:],))
        assert cut.reply.answer == text[:1].rstrip() and cut.finish == "stop"
    short = ask(engine, name, LATE, temperature=9.0, seed=5, max_tokens=1)
    assert short.completion_tokens == 1


def lose_state(engine, name) -> None:
    """What a pass leaves that ran out of memory after its arrays were given away."""

    def act(table, entry):
        jax.tree.map(lambda leaf: leaf.delete(), table.bring_back(entry).state)

    engine.submit(name, Act(act)).done.result(60)


def test_a_pass_that_fails_costs_only_what_it_was_for(start):
    engine = start(save_seconds=0.01)
    saved, lost, other = (open_session(engine) for _ in range(3))
    push(engine, other, frames(5))
    before = state_of(engine, other)
    with pytest.raises(Exception, match=r"\(1, 5, 5, 3\)|shape|reshape"):
        push(engine, other, np.zeros((1, 5, 5, 3), np.uint8))  # no frame of this model
    assert_same_bits(state_of(engine, other), before)

    push(engine, saved, frames(4))
    engine.submit(saved, Act(lambda table, entry: table.save(entry))).done.result(60)
    for name in (saved, lost):
        lose_state(engine, name)
        with pytest.raises(RuntimeError, match="deleted"):
            push(engine, name, frames(1))
    described = on_table(engine, lambda table: {each.id: each.describe() for each in table.named()})
    assert set(described) == {saved, other}
    assert described[saved]["seen"] == 4 and not described[saved]["on_device"]
    with pytest.raises(MissingError):
        push(engine, lost, frames(1))
    assert push(engine, saved, frames(1)) == 5 and push(engine, other, frames(1)) == 6


def test_nothing_that_goes_wrong_in_a_turn_ends_the_engine(start):
    broken = threading.Event()

    def watch(name, value):
        if broken.is_set() and name == "rows":
            raise OSError("no descriptor is left")

    engine = start(watch=watch)
    name = open_session(engine)
    push(engine, name, frames(3))
    broken.set()
    with pytest.raises(OSError, match="descriptor"):
        push(engine, name, frames(1))
    broken.clear()

    def closed(text):
        raise RuntimeError("Event loop is closed")

    with pytest.raises(RuntimeError, match="loop"):
        engine.submit(name, Ask(Wish(LATE, temperature=9.0, seed=5), closed)).done.result(60)
    assert ask(engine, name, LATE).reply.frames == 4
    assert engine.alive and engine.failed is None


def test_an_engine_that_dies_saves_what_it_can_and_says_so(start, tmp_path):
    def watch(name, value):
        if name == "rows" and ready.is_set():
            raise SystemExit("the end")

    ready, ended = threading.Event(), threading.Event()
    engine = start(watch=watch)
    engine.on_end = ended.set
    first, second = open_session(engine), open_session(engine)
    push(engine, first, frames(3))
    ready.set()
    operation = engine.submit(second, Push(engine.wake))
    operation.put(frames(2))
    with pytest.raises(BusyError, match="stopping"):
        operation.done.result(60)
    assert ended.wait(60)
    assert str(engine.failed) == "the end" and engine.unsaved == []
    again = start()
    assert on_table(again, lambda table: table.get(first).seen) == 3


def test_an_answer_that_is_being_written_keeps_no_state_beside_the_budget(start):
    engine = start()
    name = open_session(engine)
    push(engine, name, frames(3))

    def put_away(table, entry):
        session = weakref.ref(entry.session)
        table.put_away(entry)
        gc.collect()
        return session() is None, asked.done.done()

    asked = Ask(Wish(LATE))
    engine.submit(name, asked)
    # The same turn begins the answer and does this; the next one writes its second token.
    gone, answered = engine.submit(name, Act(put_away)).done.result(60)
    assert gone and not answered
    assert asked.done.result(60).reply.frames == 3


def test_the_first_frames_of_another_form_say_that_they_compile(start, capsys):
    engine = start()
    name = open_session(engine, (QUESTION, OTHER))
    for _ in range(2):
        push(engine, name, frames(1))
    assert capsys.readouterr().err.count("compiling for 2 known questions of up to 24 tokens") == 1
