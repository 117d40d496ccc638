"""The report: what it says is what was computed, and what comes from outside is only text."""

import dataclasses
import html.parser
import re

import jax
import numpy as np
import pytest

import adacm2_jax
from adacm2_jax.config import MemoryConfig
from adacm2_jax.inference.panels import (
    Shown,
    bytes_lines,
    clock,
    encode_picture,
    escaped,
    size_text,
    timeline,
)
from adacm2_jax.inference.report import counts_of, make_report, page
from adacm2_jax.inference.study import Line, keep_all
from adacm2_jax.memory.policies import newest_instead, retention_plan
from adacm2_jax.models.adacm2 import init_state
from tests.small import QUESTION, quick_compilation, small_model
from tests.video.make_videos import encode, numbered_frames

HOSTILE = '<script>alert("1")</script> & \'"><img src=x onerror=alert(2)>'


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Twenty seconds, wider than high."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    encode(path, numbered_frames(40, 96, 64), fps=2)
    return path


@pytest.fixture(scope="module")
def study(small_run, clip):
    model = adacm2_jax.load(small_run, compare=True)
    return model.study(clip, [QUESTION, HOSTILE[:20]])


class Tags(html.parser.HTMLParser):
    """Which elements a page has, what they point to, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.names: list[str] = []
        self.targets: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.targets += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        self.handlers += [k for k, _ in attributes if k.startswith("on")]

    def handle_data(self, data):
        self.text += data


def test_a_study_answers_as_ask_does_and_keeps_what_the_answers_rest_on(study, small_run, clip):
    replies = adacm2_jax.load(small_run).ask(clip, [QUESTION, HOSTILE[:20]])
    for mine, other, layers in zip(study.replies, replies, study.kept, strict=True):
        assert mine.answer == other.answer and mine.moments == other.moments
        assert mine.score == pytest.approx(other.score, abs=1e-5)  # more rows in the products
        assert max(map(len, layers)) == mine.kept_tokens
        tokens = {
            m.time: m.tokens
            for m in adacm2_jax.load(small_run).ask(clip, mine.question, moments=99).moments
        }
        times = study.times[np.concatenate(layers)[:, 0]]
        assert {time: int((times == time).sum()) for time in times} == tokens
    assert study.frame_ms > 0 and study.first_token_ms > 0
    assert study.grid == (2, 2) and len(study.times) == 20


def test_beside_it_are_as_many_of_the_newest_tokens(study):
    for mine, other in zip(study.replies, study.beside["recent"], strict=True):
        assert other.policy == "recent" and other.kept_tokens == mine.kept_tokens
        assert other.moments[0].time == study.times[-1]
    assert counts_of(study, 0).bound >= study.replies[0].kept_tokens


def test_the_bytes_are_flat_and_those_of_keeping_all_are_what_full_allocates(study):
    assert [frames for frames, _ in study.bytes] == [3, 6, 9, 12, 15, 18, 20]
    assert len({size for _, size in study.bytes}) == 1
    config = dataclasses.replace(small_model(), memory=MemoryConfig(policy="full", max_frames=17))
    state = init_state(config, np.zeros(1, np.int32))
    assert study.keep_all.at(17) == sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory))
    state = init_state(small_model(), np.zeros(1, np.int32))
    assert study.bytes[0][1] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.memory))


@pytest.mark.parametrize(
    ("given", "capacity"),
    [
        (dict(policy="adacm2", novelty=0.5), None),
        (dict(policy="random"), None),
        (dict(policy="budget", capacity=7, novelty=1.0), 7),
        (dict(policy="merge", bank_frames=3), 15),
    ],
)
def test_the_newest_instead_are_as_many(given, capacity):
    """After every number of live tokens; and of the older ones none stays by rank."""
    config = MemoryConfig(recent_ratio="0.3", conserve_ratio="0.5", **given)
    plan = retention_plan(newest_instead(config, 5), 5, 1)
    assert not plan.older.any()
    if capacity:
        expected = np.minimum(np.arange(capacity + 6), capacity)
    else:
        theirs = retention_plan(config, 5, 1)
        expected = (theirs.recent + theirs.older)[0]
    np.testing.assert_array_equal(plan.recent[0], expected)


@pytest.mark.parametrize("policy", ["full", "recent"])
def test_what_has_no_other_choice_is_compared_with_nothing(policy):
    assert newest_instead(MemoryConfig(policy=policy, max_frames=3), 5) is None


def test_the_page_says_what_was_computed_and_needs_nothing_from_elsewhere(study):
    text = page(make_report(study, "runs/small"))
    tags = Tags(text)
    for number, reply in enumerate(study.replies):
        assert reply.question in tags.text
        for other in (reply, study.beside["recent"][number]):
            assert f"{other.kept_tokens:,} tokens; score {other.score:.3f}" in tags.text
    assert f"{study.replies[0].total_tokens:,}" in tags.text and "runs/small" in tags.text
    assert size_text(study.keep_all.at(20)) in tags.text
    assert f"{study.first_token_ms:.3g} ms" in tags.text
    assert tags.targets and all(each.startswith("data:image/jpeg;base64,") for each in tags.targets)
    assert not {"script", "link", "iframe", "object"} & set(tags.names) and not tags.handlers
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text


@pytest.mark.parametrize(("bound", "told"), [(1234, "1,234"), (0, "0"), (None, "no bound")])
def test_a_memory_that_holds_nothing_between_frames_has_a_bound_and_one_that_grows_has_none(
    study, bound, told
):
    text = page(make_report(dataclasses.replace(study, bound=bound), "runs/small"))
    assert Tags(text).text.count(f"fullest layer{told}the most that a layer") == 2
    assert ("no bound" in text) is (bound is None)


def test_what_comes_from_outside_is_only_text(study):
    replies = tuple(
        dataclasses.replace(reply, question=HOSTILE, answer=HOSTILE + "\x1b[31m", policy="merge")
        for reply in study.replies
    )
    hostile = dataclasses.replace(
        study, replies=replies, beside={HOSTILE: replies}, kept=((), ()), times=np.arange(20.0)
    )
    tags = Tags(page(make_report(hostile, HOSTILE)))
    assert tags.text.count(HOSTILE) >= 5 and "\x1b" not in tags.text
    assert not {"script", "img"} & set(tags.names) and not tags.handlers and not tags.targets
    assert "belongs to a frame" in tags.text  # under merge nothing can be drawn


def test_every_frame_that_holds_tokens_is_drawn_and_has_its_bars(study):
    kept = [np.array([[3, 1], [3, 4], [9, 0]]), np.array([[9, 2]])]
    pictures = {t: encode_picture(np.zeros((32, 48, 3), np.uint8)) for t in (3, 7, 9)}
    shown = Shown(kept, 10, lambda t: t / 2, (2, 2), pictures)
    assert shown.counts() == {3: [2, 0], 9: [1, 1]}
    text = timeline(shown, [3, 7], "a")
    assert re.findall(r"<title>(.*?)</title>", text) == [
        "0:01.5: 2 tokens",
        "0:04.5: 1 tokens",
        "0:04.5: 1 tokens",
    ]
    assert text.count("<image") == 3 and "1 more frames hold tokens" in text
    assert text.count(">CLS<") == 2  # of all layers together, and of layer 1
    assert text.count('type="radio"') == 3
    assert (pictures[3].width, pictures[3].height) == (176, 117)


def test_bytes_lie_where_they_should():
    text = bytes_lines([(5, 100), (10, 100)], Line(10, 50))
    flat = re.search(r'd="M([^"]*)" fill="none" stroke="#0d9488" stroke-width="3"', text)[1]
    points = [tuple(map(float, point.split())) for point in flat.split(" L")]
    assert len({y for _, y in points}) == 1
    grows = re.search(r'd="M([^"]*)" fill="none" stroke="#b45309"', text)[1]
    (x0, y0), (x1, y1) = (tuple(map(float, point.split())) for point in grows.split(" L"))
    assert (x0, x1) == (points[0][0], points[-1][0])
    # 10 bytes at the beginning and 510 at the end: 100 lie 90 / 500 of the way between.
    assert (y0 - points[0][1]) / (y0 - y1) == pytest.approx(90 / 500, abs=1e-3)
    assert "510 B" in text and "100 B" in text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (58_000, "58 kB"), (1_234_567, "1.2 MB")]
)
def test_bytes_are_for_people(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (0.96, "0:01"), (67.25, "1:07.2"), (3723, "1:02:03")]
)
def test_times_are_for_people(seconds, text):
    assert clock(seconds) == text


def test_markup_and_control_characters_are_text():
    assert escaped("<b>&\"'\x00\n") == "&lt;b&gt;&amp;&quot;&#x27;\\x00\n"


def test_keeping_all_begins_with_the_room_for_a_frame():
    """As every memory does, which attends to a frame before it drops anything."""
    line = keep_all(small_model())
    assert line.first == line.each + 4  # and the number of live tokens, int32
