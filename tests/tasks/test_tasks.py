"""The benchmarks: what is asked about which part of which video, as worked out by hand."""

import json

import pytest

from adacm2_jax.errors import DataError, UserError
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.scoring.metrics import METRICS
from adacm2_jax.tasks import lvu
from adacm2_jax.tasks.ma_lmm import clean_caption, clean_question, video_name
from adacm2_jax.tasks.task import every, find


@pytest.fixture
def written(tmp_path):
    """Writes the files of an annotation and reads a task's split from it."""

    def read(task: str, split: str, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return list(find(task).read(tmp_path, split))

    return read


def test_there_are_all_tasks_and_each_is_sound():
    tasks = every()
    assert len(tasks) == 28 and sum(name.startswith("lvu_") for name in tasks) == 7
    for name, task in tasks.items():
        assert name == task.name and task.splits and task.files and task.metrics
        assert set(task.metrics) <= set(METRICS), name
        assert task.by in ("generate", "likelihood")
        GenerationConfig(**task.generation)
        assert task.prompt.format(question="why?").count("why?") == 1
    with pytest.raises(UserError, match=r"task 'lvu' is unknown; there are activitynet_qa, "):
        find("lvu")


@pytest.mark.parametrize(
    ("duration", "starts"),
    [
        (42, [0]),
        (100, [0]),
        (119, [0]),
        (120, [0, 20]),
        (162, [0, 20, 40, 60]),
        (180, [0, 20, 40, 60, 80]),
    ],
)
def test_windows_of_lvu_begin_every_twenty_seconds_while_a_whole_one_fits(duration, starts):
    assert lvu.starts(duration) == starts


def test_lvu_reads_a_task_s_clips_with_their_windows(written):
    clips = {
        "0Ij2veeSsE4": {
            "duration": 132,
            "num_frames": 1623,
            "director": "steven",
            "director_answer": "(a)",
        },
        "-5v5JjUZpAPk": {"duration": 42, "num_frames": 717, "way_speaking": "explain "},
        "short": {"duration": 42, "num_frames": 300, "way_speaking": "teach"},
    }
    first, second = written("lvu_director", "test", test=clips)
    assert first.id == "0Ij2veeSsE4_0" and second.id == "0Ij2veeSsE4_20"
    # Frames 0 to 990 and 200 to 1190 of ten a second; the last one is shown for a tenth.
    assert (first.start, first.end, second.start, second.end) == (0, 99.1, 20, 119.1)
    assert first.question == "what is the director of the movie?"
    assert first.video == "0Ij2veeSsE4" and first.answers == ("steven",) and not first.choices
    speaking, short = written("lvu_way_speaking", "test")
    assert speaking.question == "what is the way_speaking of the movie?"
    assert speaking.answers == ("explain",)
    assert speaking.end == 71.7 and short.end == 30.0  # a short clip is read to its last frame


def test_breakfast_leaves_out_three_videos(written):
    entries = {
        "P03-cam01-P03_cereals": {"class_name": "cereal"},
        "P28-cam01-P28_cereals": {"class_name": "cereal"},
    }
    (item,) = written("breakfast", "train", train=entries)
    assert item.answers == ("cereal",) and item.start is None
    assert item.question == "what type of breakfast is shown in the video?"


def test_coin_takes_its_subset_and_passes_over_what_has_no_frames(written):
    entry = {"subset": "train", "target": "assemble bed", "num_frames_actual": 9, "duration": 3}
    videos = {
        "a": entry,
        "b": entry | {"subset": "val", "target": "make tea"},
        "c": {name: entry[name] for name in ("subset", "target")},
        "AfiVmAjfTNs": entry,
    }
    (item,) = written("coin", "train", COIN=videos)
    assert (item.id, item.answers) == ("a", ("assemble bed",))
    assert item.question == "what is the activity in the video?"
    (item,) = written("coin", "test")
    assert (item.id, item.answers) == ("b", ("make tea",))


QUESTIONS = {
    "0000000": {
        "question": "What is (the) man doing?",
        "answer": "Walking.",
        "answer_type": 3,
        "video": "video6513",
        "frame_length": 100,
    }
}


@pytest.mark.parametrize("task", ["msrvtt_qa", "msvd_qa", "activitynet_qa"])
def test_questions_are_cleaned_and_answers_to_score_are_not(written, task):
    (item,) = written(task, "val", qa_val=QUESTIONS)
    assert (item.id, item.video, item.category) == ("0000000", "video6513", "3")
    assert item.question == "what is the man doing?" and item.answers == ("Walking.",)
    prompt = find(task).prompt.format(question=item.question)
    assert prompt == "Question: what is the man doing? Short answer:"
    (item,) = written(task, "train", qa_train=QUESTIONS)
    assert item.answers == ("walking",)
    assert find(task).generation["max_new_tokens"] == 9
    assert find(task).generation["length_penalty"] == 0


@pytest.mark.parametrize("task", ["msrvtt_captions", "msvd_captions"])
def test_captions_of_a_video_are_one_item_to_score_and_many_to_learn(written, task):
    entry = {"image_id": "video1.mp4", "frame_length": 9}
    captions = {
        "0": entry | {"video": "video1.mp4", "caption": "A man walks."},
        "1": entry | {"video": "video2.mp4", "caption": "a cat"},
        "2": entry | {"video": "video1.mp4", "caption": "Someone: walking"},
    }
    first, second = written(task, "val", cap_val=captions)
    assert (first.id, first.video) == ("video1", "video1")
    assert first.answers == ("A man walks.", "Someone: walking") and second.answers == ("a cat",)
    assert first.question == "what does the video describe?"
    items = written(task, "train", cap_train=captions)
    assert [item.answers for item in items] == [("a man walks",), ("a cat",), ("someone walking",)]


def test_youcook2_reads_a_step_alone_within_its_video(written):
    step = {
        "video": "GLd3aX16zBg",
        "segment": "GLd3aX16zBg_0",
        "start_time": -1,
        "end_time": 102,
        "duration": 100.5,
        "frame_length": 1005,
        "caption": "Spread margarine!",
    }
    (item,) = written("youcook2_captions", "val", cap_val={"GLd3aX16zBg_0": step})
    assert (item.start, item.end, item.answers) == (0.0, 100.5, ("Spread margarine!",))
    (item,) = written("youcook2_captions", "test", cap_test={"x": step | {"caption": " "}})
    assert item.answers == ()
    (item,) = written("youcook2_captions", "train", cap_train={"x": step})
    assert item.answers == ("spread margarine",)


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ('A "man".  Runs!', "a man runs", "a man  runs"),
        ("wait; what?\n", "wait what?", "wait what?\n"),
        ("a-b's 1*2#3:4~5", "a-b's 1 2 3 4 5", "a-b's 12345"),
        ("w " * 60, "w" + " w" * 49, "w" + " w" * 49),
        ("", "", ""),
    ],
)
def test_texts_are_cleaned_as_by_lavis(text, caption, question):
    assert clean_caption(text) == caption
    assert clean_question(text) == question


def test_names_of_videos_lose_directory_and_suffix_alone():
    assert video_name("a/b/-1.x_2.MP4") == "-1.x_2" and video_name("v_abc.def") == "v_abc.def"


# --- annotations that are wrong -------------------------------------------------------------------


def test_a_wrong_annotation_is_named(tmp_path, written):
    with pytest.raises(DataError, match=r"test\.json: no such file: data/README\.md"):
        written("lvu_scene", "test")
    with pytest.raises(DataError, match="holds a list, not a dict"):
        written("lvu_scene", "test", test=[])
    (tmp_path / "test.json").write_text('{"a": ')
    with pytest.raises(DataError, match="is no readable JSON file"):
        written("lvu_scene", "test")
    entry = {"scene": "office", "duration": "99", "num_frames": 9}
    with pytest.raises(DataError, match=r"test\.json: x: field 'duration' is '99'"):
        written("lvu_scene", "test", test={"x": entry})
    with pytest.raises(DataError, match=r"qa_val\.json: 7: field 'answer' is None"):
        written("msvd_qa", "val", qa_val={"7": {"question": "why?", "video": "a"}})
