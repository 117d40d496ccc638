"""Where examples come from: TFDS directories and JSON lines behind one function."""

import json

import ml_collections
import pytest

from adacm2_jax.errors import DataError
from data.jsonl import JsonlSource
from data.needle.builder import build
from data.sources import RecordSource, open_source


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return build(tmp_path_factory.mktemp("needle"), 3, {"train": 6, "test": 2})


def settings(**changes) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(
        {
            "source": "needle",
            "jsonl": {"train": "", "test": ""},
            "needle": {
                "num_frames": 3,
                "train_size": 6,
                "test_size": 2,
                "evidence_only": False,
            },
            "data_dir": "",
        }
    )
    config.update(changes)
    return config


def test_records_are_examples_in_a_fixed_order(directory):
    source = RecordSource(directory, "train")
    assert len(source) == 6 and len({example.id for example in source}) == 6
    assert [source[i] for i in range(6)] == list(source)
    assert isinstance(source[0].video, bytes) and source[0].answer in "0123456789"
    with pytest.raises(IndexError):
        source[6]
    assert len(RecordSource(directory, "train[:2]")) == 2
    assert RecordSource(directory, "train[:2]")[1] == source[1]


def test_a_fingerprint_changes_with_what_is_read(directory):
    prints = {
        RecordSource(directory, "train").fingerprint(),
        RecordSource(directory, "test").fingerprint(),
        RecordSource(directory, "train", evidence_only=True).fingerprint(),
    }
    assert len(prints) == 3
    before = RecordSource(directory, "train").fingerprint()
    assert before in prints
    file = next(path for path in directory.iterdir() if "array_record" in path.name)
    stat = file.stat()
    import os

    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert RecordSource(directory, "train").fingerprint() not in prints


def test_no_data_set_and_no_split_are_named(directory, tmp_path):
    with pytest.raises(DataError, match="no prepared TFDS data set here; build it first"):
        RecordSource(tmp_path, "train")
    with pytest.raises(DataError, match="no split 'holdout'; it has"):
        RecordSource(directory, "holdout")


def test_an_experiment_opens_its_splits(tmp_path):
    config = settings(data_dir=str(tmp_path))
    assert len(open_source(config, "train")) == 6 and len(open_source(config, "test")) == 2
    config.needle.evidence_only = True
    assert open_source(config, "test")[0].start is not None
    config.needle.train_size = 0
    with pytest.raises(DataError, match="no split 'train'"):
        open_source(config, "train")


def test_json_lines_need_answers_for_training_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "question": "what?"}))
    config = settings(source="jsonl", jsonl={"train": str(path), "test": str(path)})
    source = open_source(config, "test")
    assert isinstance(source, JsonlSource) and source[0].answer is None
    with pytest.raises(DataError, match="line 1: field 'answer' is missing"):
        open_source(config, "train")


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"source": "jsonl"}, "train", "data.jsonl.train is empty"),
        ({"source": "jsonl"}, "holdout", "split 'holdout' is unknown; data.jsonl has"),
        ({"source": "vhs"}, "train", "data.source is 'vhs'; it must be"),
        (
            {"source": "jsonl", "jsonl": {"train": "none.jsonl"}},
            "train",
            "none.jsonl: no such file",
        ),
    ],
)
def test_what_cannot_be_opened_is_named(changes, split, message):
    with pytest.raises(DataError, match=message):
        open_source(settings(**changes), split)
