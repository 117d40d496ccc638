"""Nothing is half-written, and nothing of before is overwritten."""

import json

import pytest

from adacm2_jax.files import keep_earlier, write_json, write_text


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_json(tmp_path / "a.json", {"kept": True})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "half a pair: \ud83d")
    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_earlier_files_get_the_next_number_that_is_free(tmp_path):
    path = tmp_path / "predictions.jsonl"
    keep_earlier(path)  # there is none
    for text in ("one", "two", "three"):
        keep_earlier(path)
        path.write_text(text)
    found = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert found == {
        "predictions.jsonl": "three",
        "predictions.1.jsonl": "one",
        "predictions.2.jsonl": "two",
    }
