"""What the page of ``adacm2 demo`` shows, without the page: a stream of constant size."""

import threading
import time

import jax
import numpy as np
import pytest

import adacm2_jax
from adacm2_jax.demo import show
from adacm2_jax.demo.live import Desk, Live
from adacm2_jax.demo.sample import FRAMES, make_sample
from adacm2_jax.errors import UserError
from adacm2_jax.video.frames import read_clip
from adacm2_jax.video.sampling import ONE_A_SECOND
from tests.small import QUESTION, quick_compilation
from tests.video.make_videos import encode, numbered_frames

OTHER = "what is shown?"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def desk(small_run):
    return Desk(adacm2_jax.load(small_run))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    encode(path, numbered_frames(40, 96, 64), fps=2)
    return path


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 48, 64, 3), np.uint8)


def test_a_video_is_read_as_a_session_reads_the_file(desk, small_run, clip):
    live = Live(desk)
    live.begin(QUESTION)
    assert [*live.read(clip)] == [20] * 7  # chunks of three
    session = adacm2_jax.load(small_run).session([QUESTION])
    session.push(clip)
    assert live.ask(QUESTION) == session.ask(QUESTION)
    assert live.ask(OTHER) == session.ask(OTHER)
    view = live.view()
    assert (view.frames, view.kept, view.bound) == (20, session.kept, session.bound)
    assert view.size == session.size and view.seen == 100


def test_only_frames_that_are_remembered_and_the_newest_are_held(desk):
    live = Live(desk)
    live.begin(QUESTION)
    sizes, most = set(), 0
    for step in range(30):
        live.push(pictures(4, step))
        view = live.view()
        sizes.add(view.size)
        held = {t for t, tokens in view.shown.counts().items() if sum(tokens)}
        assert held | {view.frames - 1} <= set(live.pictures)
        most = max(most, len(live.pictures))
        assert len(live.pictures) <= view.bound + 1
    # The size is the same whatever was seen, and the pictures do not grow with 120 frames.
    assert len(sizes) == 1 and most < 40


def test_a_question_known_before_has_its_own_memory_and_others_the_open_one(desk):
    live = Live(desk)
    live.begin(QUESTION)
    live.push(pictures(9))
    assert live.known == (QUESTION,)
    assert live.ask(QUESTION).policy == "adacm2"
    view = live.view()
    assert view.beside.kept_tokens == view.reply.kept_tokens and view.beside.question == QUESTION
    assert live.ask(OTHER).policy == "open"
    view = live.view()
    assert view.beside.kept_tokens == view.reply.kept_tokens == 10
    # Of eight frames before the newest one, the newest tokens are those of the last two.
    assert {moment.time for moment in view.beside.moments} == {6.0, 7.0}


def test_asking_changes_nothing_and_is_measured(desk):
    live = Live(desk)
    live.begin()
    live.push(pictures(5))
    before = jax.tree.map(np.asarray, live._session.state)
    assert live.view().first_token_ms is None and live.view().frame_ms > 0
    live.ask(OTHER)
    live.measure()
    assert live.view().first_token_ms > 0
    jax.tree.map(np.testing.assert_array_equal, before, live._session.state)


def test_beginning_anew_forgets(desk):
    live = Live(desk)
    live.begin(QUESTION)
    live.push(pictures(5))
    live.ask(QUESTION)
    live.begin(source="webcam")
    view = live.view()
    assert (view.frames, view.kept, view.reply, live.known) == (0, 0, None, ())
    assert not live.pictures and live.source == "webcam"


def test_a_reading_ends_when_another_stream_begins(desk, clip):
    live = Live(desk)
    live.begin(QUESTION)
    reading = live.read(clip)
    next(reading)
    live.begin(QUESTION)
    assert [*reading] == [] and live.view().frames == 0


def test_a_chunk_of_a_stream_that_has_ended_is_not_read_into_the_next(desk, clip):
    """The next begins while the chunk waits for its turn, after the last look."""
    live = Live(desk)
    live.begin(QUESTION)
    reading = live.read(clip)
    next(reading)
    begun, left = live._session, []
    thread = threading.Thread(target=lambda: left.extend(reading))
    desk.lock.acquire()
    try:
        thread.start()
        time.sleep(0.5)  # it waits for its turn
        live._session = desk.model.session([QUESTION])
    finally:
        desk.lock.release()
    thread.join(60)
    assert live._session.seen == 0 and begun.seen == 3 and left == []


def test_visitors_wait_for_each_other(desk):
    """Two threads push and ask at the same time, and both know what they would know alone."""
    alone = Live(desk)
    alone.begin(QUESTION)
    for step in range(4):
        alone.push(pictures(3, step))
    expected = alone.ask(QUESTION)
    lives, replies = [Live(desk), Live(desk)], {}

    def visit(number: int) -> None:
        lives[number].begin(QUESTION)
        for step in range(4):
            lives[number].push(pictures(3, step))
            replies[number] = lives[number].ask(QUESTION)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert replies == {0: expected, 1: expected}


def test_what_cannot_be_done_is_told(desk):
    live = Live(desk)
    with pytest.raises(UserError, match="no stream yet"):
        live.push(pictures(1))
    live.begin()
    with pytest.raises(UserError, match="no frame yet"):
        live.ask(OTHER)
    with pytest.raises(UserError, match="the question is empty"):
        live.ask(" ")
    with pytest.raises(UserError, match="the limit is 24"):
        live.begin("why " * 40)
    for act in (live.begin, live.ask):  # a caller who is no browser
        with pytest.raises(UserError, match="501 characters, the limit is 500"):
            act("w" * 501)


def test_the_page_escapes_and_draws_what_is_known(desk):
    live = Live(desk)
    assert "No frame" in show.memory(None) and "Nothing" in show.answers(None)
    live.begin("<b>why</b>")
    assert "<image" not in show.memory(live.view())
    live.push(pictures(7))
    live.ask("<b>why</b>")
    view = live.view()
    assert "&lt;b&gt;why" in show.answers(view) and "<b>why" not in show.answers(view)
    text = show.memory(view)
    assert text.count("<image") == len(set(view.shown.counts()) | {6})
    assert f"{view.bound:,}" in text and "35" in text


def test_the_sample_is_a_video_with_one_red_frame(tmp_path):
    answer = make_sample(tmp_path / "sample.mp4")
    frames = read_clip(str(tmp_path / "sample.mp4"), ONE_A_SECOND, size=64).astype(int)
    assert len(frames) == FRAMES and answer in "0123456789"
    corner = frames[:, 2, 2]
    red = (corner[:, 0] > 200) & (corner[:, 1] < 100) & (corner[:, 2] < 100)
    assert red.sum() == 1
    again = make_sample(tmp_path / "again.mp4")
    assert again == answer
