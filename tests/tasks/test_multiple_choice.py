"""Questions with choices: how they are put, and the benchmarks that have them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from adacm2_jax.errors import DataError, UserError
from adacm2_jax.tasks.annotation import seconds
from adacm2_jax.tasks.multiple_choice import DIGITS, ask, right_choice, without_labels
from adacm2_jax.tasks.task import find

FRUIT = ("a pear", "a plum", "figs")


def read(directory, task, split="test", **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return list(find(task).read(directory, split))


def test_choices_are_shown_with_letters_digits_or_any_labels():
    assert ask("what is eaten?", FRUIT) == (
        "Question: what is eaten?\nOptions:\n(A) a pear\n(B) a plum\n(C) figs\n"
        "Answer with the letter of the right option:"
    )
    assert "(2) a plum" in ask("?", FRUIT, DIGITS) and "the number of" in ask("?", FRUIT, DIGITS)
    assert "(x) a plum\n(y) figs" in ask("?", FRUIT, "wxy")
    with pytest.raises(DataError, match="3 choices, but there are labels for 2"):
        ask("?", FRUIT, "xy")


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (["A. a pear", "B. a plum"], ("a pear", "a plum")),
        (["(A) a pear", "(B)a plum"], ("a pear", "a plum")),
        (["A.a pear", "B) a plum", "C: figs"], ("a pear", "a plum", "figs")),
        (["A. a pear", "a plum"], ("A. a pear", "a plum")),  # not all
        (["B. a pear", "A. a plum"], ("B. a pear", "A. a plum")),  # not in order
        ([" a pear "], ("a pear",)),
    ],
)
def test_labels_of_an_annotation_are_taken_off(given, texts):
    assert without_labels(given) == texts


def test_the_right_choice_is_named_by_letter_index_or_text():
    for answer in ("B", "(B)", "B.", 1, "a plum"):
        assert right_choice(answer, FRUIT, "q") == "a plum"
    for answer in ("D", 3, -1, "plum", "", None):
        with pytest.raises(DataError, match=r"q: the answer .* is none of its 3 choices"):
            right_choice(answer, FRUIT, "q")


ROW = {
    "video_id": "001",
    "duration": "short",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}


def test_video_mme_is_read_from_all_its_forms(tmp_path):
    forms = {name: tmp_path / name for name in ("rows", "lines", "parquet", "nested")}
    for directory in forms.values():
        directory.mkdir()
    (forms["lines"] / "video_mme.jsonl").write_text(json.dumps(ROW) + "\n\n")
    table = pyarrow.Table.from_pylist([ROW])
    pyarrow.parquet.write_table(table, forms["parquet"] / "test-00000-of-00001.parquet")
    nested = {
        "video_id": "fFjv93ACGo8",
        "duration_category": "short",
        "questions": [{**ROW, "choices": ROW["options"]}],
    }
    del nested["questions"][0]["options"]
    found = [
        read(forms["rows"], "video_mme_ranked", video_mme=[ROW]),
        read(forms["lines"], "video_mme_ranked"),
        read(forms["parquet"], "video_mme_ranked"),
        read(forms["nested"], "video_mme_ranked", output_test_template=[nested]),
    ]
    (item,) = found[0]
    assert all(items == [item] for items in found)
    assert (item.id, item.video, item.category) == ("001-1", "fFjv93ACGo8", "short")
    assert item.question == "How many?" and item.answers == ("Three.",)
    assert item.choices == ("One.", "Two.", "Three.", "Four.")
    (shown,) = read(forms["rows"], "video_mme")
    assert shown.question == ask("How many?", item.choices) and shown.answers == item.answers
    assert find("video_mme").by == "generate" and find("video_mme_ranked").by == "likelihood"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="is no readable Parquet file"):
        read(tmp_path, "video_mme")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="Parquet needs pyarrow: pip install pyarrow, or write"):
        read(tmp_path, "video_mme")


def test_mlvu_joins_the_files_that_are_there(tmp_path):
    entry = {
        "video": "movie101_66.mp4",
        "duration": 246,
        "question": "What color is the main male character in the video?",
        "candidates": ["Yellow", "Red"],
        "answer": "Yellow",
        "question_type": "plotQA",
    }
    count = entry | {"candidates": ["2", "3"], "answer": "3", "question_type": "count"}
    plot, counted = read(tmp_path, "mlvu_ranked", **{"1_plotQA": [entry], "4_count": [count]})
    assert (plot.id, plot.video, plot.category) == ("1_plotQA_0", "movie101_66", "plotQA")
    assert (counted.id, counted.answers, counted.choices) == ("4_count_0", ("3",), ("2", "3"))
    with pytest.raises(DataError, match=r"1_plotQA\.json or 2_needle\.json .*: no such file"):
        read(tmp_path / "none", "mlvu")


def test_egoschema_knows_the_answers_of_its_subset(tmp_path):
    options = {f"option {i}": f"C does {i}" for i in range(5)}
    questions = [{"q_uid": name, "question": "what?", **options} for name in ("a", "b")]
    files = {"questions": questions, "subset_answers": {"b": 3}}
    (item,) = read(tmp_path, "egoschema_ranked", "subset", **files)
    assert (item.id, item.video, item.answers) == ("b", "b", ("C does 3",))
    first, second = read(tmp_path, "egoschema_ranked")
    assert first.answers == () and second == item and len(item.choices) == 5


def test_streamingbench_asks_at_a_time(tmp_path):
    part = {
        "time": "[0:01:00 - 0:02:00]",
        "video_path": "./videos/sample_2_real.mp4",
        "questions": [
            {
                "task_type": "Object Perception",
                "question": "What is on the table now?",
                "time_stamp": "00:01:52",
                "answer": "B",
                "options": ["A.a cup", "B.a card"],
            }
        ],
    }
    (item,) = read(tmp_path, "streamingbench_real_ranked", questions_real=[part])
    assert (item.video, item.at, item.category) == ("sample_2_real", 112.0, "Object Perception")
    assert item.answers == ("a card",) and item.choices == ("a cup", "a card")


def test_ovo_bench_has_choices_and_forward_questions(tmp_path):
    entries = [
        {
            "id": 7,
            "task": "EPM",
            "video": "Ego4D/a.mp4",
            "question": "where?",
            "options": ["here", "there"],
            "gt": 1,
            "realtime": 62.5,
        },
        {
            "id": 8,
            "task": "REC",
            "video": "b.mp4",
            "activity": "jump",
            "test_info": [{"realtime": 3, "count": 0}, {"realtime": 9, "count": 12}],
        },
        {
            "id": 9,
            "task": "SSR",
            "video": "c.mp4",
            "test_info": [{"realtime": 4, "type": 1, "step": "cut it"}],
        },
        {
            "id": 10,
            "task": "CRR",
            "video": "c.mp4",
            "question": "who?",
            "test_info": [{"realtime": 4, "type": 0}],
        },
    ]
    (item,) = read(tmp_path, "ovo_bench_ranked", ovo_bench_new=entries)
    assert (item.id, item.video, item.at, item.answers) == ("7", "a", 62.5, ("there",))
    none, twelve, step, open_ = read(tmp_path, "ovo_bench_forward")
    assert (none.answers, twelve.answers, twelve.at, twelve.id) == (("0",), ("12",), 9.0, "8_1")
    assert twelve.question == "How many times did they jump? Answer with a number."
    assert step.answers == ("Yes",) and "cut it" in step.question and step.category == "SSR"
    assert open_.answers == ("No",) and "who?" in open_.question


def test_times_are_read_as_clocks_show_them():
    assert [seconds(t, "q") for t in ("00:01:52", "1:52", "7.5", "1:00:00")] == [
        112,
        112,
        7.5,
        3600,
    ]
    for text in ("", "1:2:3:4", "now"):
        with pytest.raises(DataError, match=r"q: .* is no time"):
            seconds(text, "q")
