"""What is said of long work, on a terminal and elsewhere."""

import io
import re
import time

import pytest

from adacm2_jax import progress
from adacm2_jax.progress import Progress, compiling, duration, patience


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_comes_every_fifteen_seconds(clock):
    out = io.StringIO()
    with Progress("train", 100, stream=out) as bar:
        for _ in range(40):
            clock[0] += 1
            bar.update(loss=0.5)
    lines = out.getvalue().splitlines()
    assert lines[:2] == [
        "train 15/100 steps, loss 0.5, 1 min 25 s left",
        "train 30/100 steps, loss 0.5, 1 min 10 s left",
    ]
    assert lines[2:] == ["train 40/100 steps, 40 s in all"]


def test_the_first_step_which_compiles_does_not_count_in_the_time_left(clock):
    out = io.StringIO()
    bar = Progress("train", 11, stream=out)
    clock[0] += 1000
    bar.update()
    assert out.getvalue() == "train 1/11 steps\n"  # nothing of the time left
    for _ in range(5):
        clock[0] += 4
        bar.update()
    assert out.getvalue().splitlines()[1] == "train 5/11 steps, 24 s left"


def test_work_that_is_short_says_nothing(clock):
    out = io.StringIO()
    with Progress("read", 3, stream=out) as bar:
        clock[0] += 5
        bar.update(3)
    assert out.getvalue() == ""


def test_a_process_that_shows_nothing_shows_nothing(clock):
    out = Terminal()
    with Progress("read", 3, stream=out, shown=False) as bar:
        clock[0] += 50
        bar.update()
    assert out.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_whose_time_left_begins_with_the_second_step():
    out = Terminal()
    with Progress("train", 4, initial=1, stream=out) as bar:
        assert "1/4 steps" in out.getvalue()
        bar.update(loss=2.0)
        assert "left" not in out.getvalue()
        bar._bar.mininterval = 0
        bar.update(loss=1.0)
        assert re.search(r"3/4 steps \[00:0\d, loss 1, 0 s left\]", out.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.6, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_compiling_is_one_line_with_its_seconds(clock, capsys):
    with compiling("the step"):
        clock[0] += 12.34
    assert capsys.readouterr().err == "compiling the step … 12.3 s\n"
    with pytest.raises(ValueError), compiling("the step"):
        raise ValueError
    assert capsys.readouterr().err == "compiling the step … stopped\n"


def test_what_takes_long_is_told_and_what_does_not_is_not(capsys):
    with patience("loading the model", after=60):
        pass
    assert capsys.readouterr().err == ""
    with patience("loading the model", after=0.01):
        time.sleep(0.2)
    assert re.fullmatch(r"loading the model … 0\.\d s\n", capsys.readouterr().err)


def test_what_fails_after_a_while_ends_its_line(capsys):
    with pytest.raises(ValueError, match="damaged"), patience("loading", after=0.01):
        time.sleep(0.2)
        raise ValueError("damaged")
    assert capsys.readouterr().err == "loading … stopped\n"
