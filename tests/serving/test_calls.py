"""What requests do in their own threads: the order of a session, and long questions."""

import concurrent.futures
import dataclasses
import threading
import time

import PIL.Image
import pydantic
import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.serving.calls import Call, Service
from adacm2_jax.serving.decoders import Decoders, Media
from adacm2_jax.serving.limits import Limits, MissingError
from adacm2_jax.serving.operations import CancelledError, Wish
from adacm2_jax.serving.schemas import ChatRequest, SessionRequest
from tests.inference.test_session import CHUNK, CONFIG, frames
from tests.serving.conftest import LATE
from tests.serving.test_engine import on_table, open_session, push
from tests.small import QUESTION, quick_compilation

LIMITS = Limits(decoders=1)


@pytest.fixture(scope="module", autouse=True)
def quick(compiled_once):
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def decoders():
    made = Decoders(LIMITS, CONFIG.vision.image_size, CHUNK, "clean", "error")
    yield made
    made.close()


@pytest.fixture
def picture(tmp_path) -> Media:
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "picture.png")
    return Media("pictures", (str(tmp_path / "picture.png"),) * 3, "frames")


def test_what_comes_after_frames_waits_for_them_and_nobody_else_does(start, decoders, picture):
    engine = start()
    service = Service(engine, decoders, LIMITS)
    name, other = open_session(engine), open_session(engine)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with decoders.decode(picture):  # the only decoder is taken: the frames cannot come yet
            pushed = [pool.submit(service.push, Call(), name, picture)]
            while not engine.waiting:
                time.sleep(0.01)
            asked = pool.submit(service.ask, Call(), name, Wish(LATE), lambda _: None)
            while engine.waiting < 2:
                time.sleep(0.01)
            pushed.append(pool.submit(service.push, Call(), name, picture))
            assert push(engine, other, frames(2)) == 2
            assert not asked.done()
        assert asked.result(60).reply.frames == 3
        assert [each.result(60) for each in pushed] == [3, 6]


def test_frames_for_nobody_or_from_nobody_take_no_decoder(start, decoders, picture):
    engine = start()
    service = Service(engine, decoders, LIMITS)
    with decoders.decode(picture), concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(MissingError):
            service.push(Call(), "s-0123456789abcdef", picture)
        call, name = Call(), open_session(engine)
        pushed = pool.submit(service.push, call, name, picture)
        while not engine.waiting:
            time.sleep(0.01)
        call.leave()
        with pytest.raises((CancelledError, UserError)):
            pushed.result(60)
    assert service.push(Call(), name, picture) == 3


def test_a_session_that_waits_for_its_frames_makes_room(start, decoders, picture, size):
    engine = start(session_bytes=size + 10)
    service = Service(engine, decoders, LIMITS)
    name = open_session(engine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with decoders.decode(picture):
            pushed = pool.submit(service.push, Call(), name, picture)
            while not engine.waiting:
                time.sleep(0.01)
            assert push(engine, open_session(engine), frames(2)) == 2
        assert pushed.result(60) == 3


def test_questions_are_made_tokens_in_the_thread_of_who_asks(start, model, decoders, picture):
    threads = {}

    def ask_as(question):
        threads.setdefault(question, set()).add(threading.current_thread().name)
        return question

    engine = start(model=dataclasses.replace(model, ask_as=ask_as))
    threads.clear()  # it has asked something itself
    service = Service(engine, decoders, LIMITS)
    name = service.open(Call(), [QUESTION], 1.0, 0)["id"]
    push(engine, name, frames(2))
    service.ask(Call(), name, Wish(LATE), lambda _: None)
    service.ask(Call(), name, Wish(QUESTION), lambda _: None)
    said = service.answer(Call(), [picture], Wish("3"), 1.0, lambda _: None)
    assert said.reply.frames == 3
    here = threading.current_thread().name
    assert threads == {text: {here} for text in (QUESTION, LATE, "3")}


def test_a_question_is_refused_by_its_characters(start, decoders, picture):
    engine = start()
    service, long = Service(engine, decoders, LIMITS), "why? " * 4000
    name = open_session(engine)
    for refused in (
        lambda: service.ask(Call(), name, Wish(long), lambda _: None),
        lambda: service.answer(Call(), [picture], Wish(long), 1.0, lambda _: None),
        lambda: service.open(Call(), [long], 1.0, 0),
    ):
        with pytest.raises(UserError, match=r"has 20,000 characters .* limit is 16,384"):
            refused()
    assert len(on_table(engine, lambda table: table.named())) == 1


def test_fields_that_would_cost_or_overflow_are_refused():
    messages = [{"role": "user", "content": "why?"}]
    ChatRequest(model="small", messages=messages, stop=["a" * 256] * 8, fps=1e-6, n=1)
    long = "a" * 70_000
    for wrong in (
        {"stop": "a" * 257},
        {"stop": ["a", "a" * 257]},
        {"fps": 1e-309},
        {"n": True},
        {"max_tokens": True},
        {"temperature": False},
        {"messages": [{"role": "user", "content": long}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": long}]}]},
    ):
        with pytest.raises(pydantic.ValidationError):
            ChatRequest(**({"model": "small", "messages": messages} | wrong))
    with pytest.raises(pydantic.ValidationError):
        SessionRequest(seconds_per_frame=1e-309)
