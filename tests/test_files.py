"""Nothing is half-written, and nothing of before is overwritten."""

import json

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.files import check_writable, keep_earlier, write_json, write_text


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_json(tmp_path / "a.json", {"kept": True})
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "half a pair: \ud83d")
    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_directory_that_can_be_made_is_not_made_yet(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("new", "new/below", "link/new", "new/../other", "é" * 127):
        check_writable(tmp_path / name, "--output")
        (tmp_path / name).mkdir(parents=True, exist_ok=True)  # and it can
    check_writable(tmp_path / "new", "--output")
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dangling", "a link that leads nowhere"),
        ("dangling/below", "a link that leads nowhere"),
        ("loop", "a link that leads nowhere"),
        ("loop/below", "a link that leads nowhere"),
        ("file/below", "Not a directory"),
        ("a" * 300, "File name too long"),
        ("new/" + "é" * 128, "File name too long"),
        ("/".join(["a" * 100] * 60), "File name too long"),
    ],
)
def test_a_directory_that_can_never_be_made_is_refused_before_the_work(tmp_path, name, reason):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError):  # what would come after the work
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=f"--output: nothing can be written to .*{reason}"):
        check_writable(tmp_path / name, "--output")
    assert [each for each in sorted(tmp_path.iterdir()) if each.name != "new"] == before


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
