"""The user's own list of videos."""

from __future__ import annotations

import hashlib
import json
import pickle

import grain
import pytest

from adacm2_jax.errors import DataError
from data.jsonl import Example, JsonlSource

LINE = {"video": "a.mp4", "question": "What?", "answer": "A cat"}


@pytest.fixture
def write(tmp_path):
    def write(*lines: object, encoding: str = "utf-8") -> str:
        path = tmp_path / "clips.jsonl"
        text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


def test_every_field_is_read(write, tmp_path):
    path = write({**LINE, "start": 1, "end": 2.5, "id": "first"})
    assert JsonlSource(path)[0] == Example(
        "first", str(tmp_path / "a.mp4"), "What?", "A cat", 1.0, 2.5
    )


def test_what_benchmarks_have_is_read(write):
    line = {"video": "a.mp4", "question": "What?", "answers": ["a cat", "cats"], "at": 3}
    line |= {"choices": ["a dog", "cats"], "group": "a", "category": "animals"}
    example = JsonlSource(write(line))[0]
    assert example.answer == "a cat" and example.answers == ("a cat", "cats")
    assert example.choices == ("a dog", "cats") and example.at == 3.0
    assert (example.group, example.category) == ("a", "animals")


def test_the_identity_is_older_than_what_benchmarks_have(write):
    """Runs that were begun before must go on: their sources are what they were."""
    plain = JsonlSource(write(LINE)).identity()
    # sha256 of repr([("1", "a.mp4", "What?", "A cat", None, None)])
    assert (
        plain
        == hashlib.sha256(
            repr([("1", "a.mp4", "What?", "A cat", None, None)]).encode()
        ).hexdigest()[:16]
    )
    for more in ({"choices": ["A cat", "A dog"]}, {"at": 1}, {"group": "g"}, {"category": "c"}):
        assert JsonlSource(write({**LINE, **more})).identity() != plain


def test_id_is_the_line_number_and_blank_lines_count(write):
    source = JsonlSource(write("", LINE, "   ", LINE, ""))
    assert [source[i].id for i in range(len(source))] == ["2", "4"]


def test_absolute_paths_stay(write, tmp_path):
    assert JsonlSource(write({**LINE, "video": "/films/a.mp4"}))[0].video == "/films/a.mp4"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_byte_order_mark_windows_lines_and_any_script_are_read(write, encoding):
    line = json.dumps({**LINE, "question": "Qué\u2028¿日本?"}, ensure_ascii=False)
    source = JsonlSource(write(line + "\r", line + "\r", encoding=encoding))
    assert len(source) == 2
    assert source[1].question == "Qué\u2028¿日本?"


def test_answer_may_be_absent_only_where_it_is_not_needed(write):
    path = write({"video": "a.mp4", "question": ""})
    assert JsonlSource(path, require_answer=False)[0].answer is None
    with pytest.raises(DataError, match="line 1: field 'answer' is missing"):
        JsonlSource(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON at column 2"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a list; write a JSON object"),
        ("null", "is null"),
        ({"question": "?", "answer": ""}, "field 'video' is missing"),
        ({**LINE, "video": ""}, "field 'video': is empty"),
        ({**LINE, "video": 3}, "field 'video': is the number 3; give a string"),
        ({**LINE, "question": None}, "field 'question' is missing"),
        ({**LINE, "question": ["?"]}, "field 'question': is a list"),
        ({**LINE, "awnser": "x"}, "field 'awnser' is unknown; did you mean 'answer'?"),
        ({**LINE, "zzz": "x"}, "field 'zzz' is unknown; known are video, question"),
        ({**LINE, "answers": ["A cat"]}, "fields 'answer' and 'answers': give one of them"),
        ({**LINE, "choices": ["A dog", "cats"]}, "field 'choices': 'A cat' is none of them"),
        ({**LINE, "choices": ["A cat"]}, "field 'choices': has 1 items; give 2 or more"),
        ({**LINE, "choices": "A cat"}, "field 'choices': is a string; give a list"),
        ({**LINE, "choices": ["A cat", 3]}, "field 'choices': item 2: is the number 3"),
        ({**LINE, "at": 2, "start": 2}, "field 'at': 2 s is not after start=2 s"),
        ({**LINE, "group": 3}, "field 'group': is the number 3"),
        ({**LINE, "categry": "x"}, "field 'categry' is unknown; did you mean 'category'?"),
        ({**LINE, "start": "0:10"}, "field 'start': is a string; give seconds"),
        ({**LINE, "start": True}, "field 'start': is true or false"),
        ({**LINE, "start": -1}, "field 'start': -1 is not a time"),
        ('{"video": "a", "question": "", "answer": "", "end": NaN}', "field 'end': nan is not"),
        ({**LINE, "start": 5, "end": 2}, "field 'end': 2 s is not after start=5 s; swap them"),
        ({**LINE, "end": 0}, "field 'end': 0 s is not after start=0 s; the part is empty"),
        ({**LINE, "id": 7}, "field 'id': is the number 7; give a string"),
        # Half of a surrogate pair: "\ud83d" is the beginning of an emoji.
        ({**LINE, "question": "what \ud83d"}, "field 'question' is no text at character 6"),
        ({**LINE, "video": "\udcff.mp4"}, "field 'video' is no text at character 1"),
        ({**LINE, "id": "x\ud83d"}, "field 'id' is no text at character 2"),
        (
            '{"video": "a", "question": "?", "answer": "a", "answer": "b"}',
            "field 'answer' is given 2 times; give it once",
        ),
        (
            '{"video": "a", "question": "?", "answer": "a", "end": ' + "9" * 5000 + "}",
            "is not JSON",
        ),
        ({**LINE, "start": 10**400}, "field 'start': 1000"),
    ],
)
def test_a_wrong_line_is_named_with_its_field_and_remedy(write, line, message):
    path = write(LINE, line)
    with pytest.raises(DataError) as error:
        JsonlSource(path)
    assert str(error.value).startswith(f"{path}: line 2: {message}")
    assert "\n" not in str(error.value)


def test_an_id_is_given_once(write):
    with pytest.raises(DataError, match="line 3: field 'id': 'x' is line 1's id already"):
        JsonlSource(write({**LINE, "id": "x"}, LINE, {**LINE, "id": "x"}))


def test_the_first_five_wrong_lines_are_reported_in_one_line(write):
    with pytest.raises(DataError) as error:
        JsonlSource(write(*["{"] * 8))
    text = str(error.value)
    assert [f"line {i}:" in text for i in range(1, 9)] == [True] * 5 + [False] * 3
    assert text.endswith("and 3 more wrong lines")
    assert "\n" not in text


def test_a_file_that_cannot_be_used_is_named(write, tmp_path):
    for path, message in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "is a directory"),
        (write(""), "has no examples"),
    ]:
        with pytest.raises(DataError, match=message):
            JsonlSource(path)
    with pytest.raises(DataError) as error:
        JsonlSource(tmp_path / "a\x1b[31mb\n.jsonl")
    assert str(error.value) == f"{tmp_path}/a\\x1b[31mb\\n.jsonl: no such file: check the path"
    (tmp_path / "latin.jsonl").write_bytes(b'{"video": "\xe9"}')
    with pytest.raises(DataError, match="is not UTF-8"):
        JsonlSource(tmp_path / "latin.jsonl")


def test_missing_videos_are_listed_once_and_raise_nothing(write, tmp_path):
    (tmp_path / "here.mp4").write_bytes(b"x")
    source = JsonlSource(write(LINE, {**LINE, "video": "here.mp4"}, LINE))
    assert source.missing_videos() == [str(tmp_path / "a.mp4")]


def test_it_survives_pickling_and_feeds_grain(write):
    source = pickle.loads(pickle.dumps(JsonlSource(write(LINE, {**LINE, "question": "Who?"}))))
    assert isinstance(source, grain.sources.RandomAccessDataSource)
    dataset = grain.MapDataset.source(source).map(lambda example: example.question)
    assert list(dataset) == ["What?", "Who?"]
    with pytest.raises(IndexError):
        source[2]
