"""Items of an annotation are checked as they are read."""

import dataclasses
import os

import pytest

from adacm2_jax import tasks
from adacm2_jax.errors import DataError, UserError
from adacm2_jax.tasks.annotation import read_json
from adacm2_jax.tasks.task import Item, Task, every, items_of
from configs import lvu

GOOD = Item("a", "v", "what?", ("tea",), ("tea", "milk"), start=0.0, end=2.0)


def read(*items, split="test", reader=None):
    task = Task("trial", reader or (lambda *_: items), ("test",), ())
    return items_of(task, None, split)


def test_what_can_be_is_read():
    other = dataclasses.replace(GOOD, id="b", choices=(), at=3.0)
    assert read(GOOD, other) == [GOOD, other]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"start": -1.0}, "id a: start = -1.0 is no time"),
        ({"end": float("nan")}, "end = nan is no time"),
        ({"at": float("inf")}, "at = inf is no time"),
        ({"start": 2.0, "end": 1.0}, "ends at 1 s, but begins at 2 s"),
        ({"answers": ("water",)}, "the answer 'water' is none of its choices"),
        ({"question": "\ud800"}, "is no text"),
    ],
)
def test_what_cannot_be_is_named(fields, said):
    with pytest.raises(DataError, match=said):
        read(dataclasses.replace(GOOD, **fields))


def test_an_id_twice_an_empty_split_and_another_form_are_refused():
    with pytest.raises(DataError, match="id a is there twice"):
        read(GOOD, GOOD)
    with pytest.raises(DataError, match="nothing is asked in test"):
        read()
    with pytest.raises(DataError, match="has no split 'val'; it has test"):
        read(GOOD, split="val")

    def wrong(*_):
        return [len(5)]

    with pytest.raises(DataError, match=r"another form than is read \(TypeError"):
        read(reader=wrong)


def test_a_task_file_that_is_broken_stops_no_other_task(tmp_path, monkeypatch, caplog):
    (tmp_path / "unfinished.py").write_text("TASKS = (\n")
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    assert "lvu_scene" in every()
    assert "adacm2_jax.tasks.unfinished is left out" in caplog.text
    assert "never closed" in caplog.text


def test_an_annotation_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "questions.json")
    with pytest.raises(DataError, match=r"questions\.json: is no file"):
        read_json(tmp_path, "questions.json", dict)


def test_a_task_of_lvu_that_there_is_not_is_named():
    with pytest.raises(UserError, match=r"task 'lvu_scenes' is unknown; there are .*lvu_scene"):
        lvu.get_config("weights,lvu_scenes,annotation,videos")
