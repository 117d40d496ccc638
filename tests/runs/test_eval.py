"""Evaluation as a command: splits, policies, every kind of video file, and bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from adacm2_jax.commands.ask import reply_line
from adacm2_jax.commands.evaluate import evaluate
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs.experiment import Experiment
from adacm2_jax.runs.load import experiment_of, load_params, make_answerer, video_model
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.video.sampling import ONE_A_SECOND
from data.sources import open_source
from tests.small import QUESTION, error_line, quick_compilation, run_process, run_script
from tests.video.make_videos import (
    VP9,
    encode,
    encode_sound,
    numbered_frames,
    with_display_matrix,
)

POLICIES = ("adacm2", "full", "recent", "uniform", "random", "merge")


def predictions_in(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def run(small_run):
    """The finished run with its experiment, parameters and tokenizers."""
    experiment = experiment_of(small_run)
    processor = Processor.load(small_run, experiment.model)
    return experiment, load_params(experiment, small_run), processor


def changed(experiment, **sections) -> Experiment:
    """With other fields in its sections: ``eval={"limit": 3}``."""
    return dataclasses.replace(
        experiment,
        **{
            name: dataclasses.replace(getattr(experiment, name), **fields)
            for name, fields in sections.items()
        },
    )


def answer_split(run, output, **sections) -> dict:
    experiment = changed(run[0], **sections)
    answerer = make_answerer(experiment, *run[1:])
    return evaluate(experiment, answerer, open_source(experiment.data, "test"), output)


@pytest.fixture(scope="module")
def ask(run):
    """Answers questions about one file, as ``eval.py --video`` does; compiled once."""
    experiment, params, processor = run
    model = video_model(experiment, lambda: params, processor)

    def ask(video, questions=(QUESTION,), sampling=experiment.data.sampling) -> list[dict]:
        return list(map(reply_line, model.ask(video, questions, sampling=sampling)))

    return ask


# --- a split --------------------------------------------------------------------------------------


def test_a_split_is_answered_as_at_the_end_of_training(small_run, tmp_path, capsys):
    assert run_script("eval.py", f"--workdir={small_run}", f"--output={tmp_path}") == 0
    assert predictions_in(tmp_path) == predictions_in(small_run)
    rows = predictions_in(tmp_path)
    assert sorted(row["id"] for row in rows) == [f"test-t4-{n:05d}" for n in range(12)]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    accuracy = np.mean([row["correct"] for row in rows])
    assert metrics["policies"]["adacm2"]["accuracy"] == accuracy
    assert all(row["frames"] == 4 and 0 < row["kept_tokens"] < 20 for row in rows)
    assert f"{accuracy:.1%}" in capsys.readouterr().out


def test_policies_in_one_pass_equal_each_alone(run, tmp_path):
    memory = dataclasses.replace(run[0].model.memory, bank_frames=2)
    experiment = dataclasses.replace(run[0], model=dataclasses.replace(run[0].model, memory=memory))
    sampled = {"generation": {"temperature": 1.0}}
    given = experiment, *run[1:]
    together = answer_split(given, tmp_path / "together", eval={"policies": POLICIES}, **sampled)
    rows = predictions_in(tmp_path / "together")
    assert set(together["policies"]) == set(POLICIES) and len(rows) == 12 * len(POLICIES)
    for policy in POLICIES:
        answer_split(given, tmp_path / policy, eval={"policies": (policy,)}, **sampled)
        alone = predictions_in(tmp_path / policy)
        assert alone == [row for row in rows if row["policy"] == policy]
    assert len({row["score"] for row in rows if row["id"] == rows[0]["id"]}) > 2


def test_the_batch_changes_no_answer(run, tmp_path):
    answers = {}
    for size, chunk in ((1, 4), (5, 4), (12, 1)):
        answer_split(run, tmp_path / str(size), eval={"batch_size": size, "chunk": chunk})
        answers[size] = predictions_in(tmp_path / str(size))
    for size in (5, 12):
        for one, other in zip(map(dict, answers[1]), answers[size], strict=True):
            # Other shapes sum in another order: a few roundings of a log-probability near 5.
            pairs = [(one, other), *zip(one.pop("moments"), other["moments"], strict=True)]
            for mine, its in pairs:
                assert mine["score"] == pytest.approx(its["score"], abs=1e-5)
                assert mine | {"score": 0} == {key: its[key] for key in mine} | {"score": 0}


def test_who_shares_a_batch_changes_no_bit(run, tmp_path):
    answer_split(run, tmp_path / "five", eval={"limit": 5})
    answer_split(run, tmp_path / "two", eval={"limit": 2})  # the other three rows are padding
    assert predictions_in(tmp_path / "two") == predictions_in(tmp_path / "five")[:2]


def test_bad_videos_are_listed_and_all_others_answered(small_run, tmp_path, capsys):
    encode(tmp_path / "good.mp4", numbered_frames(30), fps=10)
    whole = encode(None, numbered_frames(100), fps=10, container="matroska")
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    (tmp_path / "empty.mp4").touch()
    names = ["text.mp4", "good.mp4", "cut.mkv", "good.mp4", "empty.mp4", "gone.mp4"]
    lines = [
        json.dumps({"id": f"{number} {name}", "video": name, "question": QUESTION, "answer": "1"})
        for number, name in enumerate(names)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    done = run_process(
        "eval.py",
        f"--workdir={small_run}",
        f"--output={tmp_path / 'out'}",
        "--config.data.source=jsonl",
        f"--config.data.jsonl.test={tmp_path / 'test.jsonl'}",
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    rows = predictions_in(tmp_path / "out")
    assert [row["id"] for row in rows] == ["1 good.mp4", "3 good.mp4"]
    assert rows[0]["score"] == rows[1]["score"]
    assert "4 video(s) could not be read" in done.stdout
    failed = json.loads((tmp_path / "out" / "metrics.json").read_text())["failed"]
    assert sorted(row["id"] for row in failed) == [
        "0 text.mp4",
        "2 cut.mkv",
        "4 empty.mp4",
        "5 gone.mp4",
    ]
    for row in failed:
        assert row["id"].split()[1] in row["error"] and "\n" not in row["error"]
        assert row["error"] in done.stdout


# --- one video ------------------------------------------------------------------------------------

TIMES = [0, 0.1, 0.15, 1.0, 1.05, 3.0]
KINDS = {
    "h264.mp4": {},
    "h264-with-sound.mp4": {"sound": True},
    "h264.mkv": {"container": "matroska"},
    "vp9.webm": {"container": "webm", **VP9},
    "vp9-with-sound.webm": {"container": "webm", "sound": True, **VP9},
    "mpeg4.avi": {"container": "avi", "codec": "mpeg4"},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "variable-frame-rate.mp4": {"count": len(TIMES), "times": TIMES},
    "one-frame.mp4": {"count": 1},
    "portrait.mp4": {"width": 36, "height": 64},
    "4k.mp4": {"count": 2, "width": 3840, "height": 2160, "options": {"preset": "ultrafast"}},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_answered(ask, tmp_path, name):
    options = dict(KINDS[name])
    size = options.pop("width", 64), options.pop("height", 64)
    encode(tmp_path / name, numbered_frames(options.pop("count", 30), *size), **options)
    (line,) = ask(tmp_path / name)
    assert line["video"] == str(tmp_path / name) and line["question"] == QUESTION
    assert (
        line["frames"] == 4 and np.isfinite(line["score"]) and isinstance(line["prediction"], str)
    )


def test_a_phone_s_video_is_turned_upright(ask, tmp_path):
    upright = [np.ascontiguousarray(np.rot90(f, -1)) for f in numbered_frames(20, 64, 64)]
    stored = encode(None, numbered_frames(20, 64, 64), options={"crf": "0"}, fps=10)
    (tmp_path / "phone.mp4").write_bytes(with_display_matrix(stored, (0, 1, -1, 0)))
    encode(tmp_path / "upright.mp4", upright, options={"crf": "0"}, fps=10)
    (tmp_path / "stored.mp4").write_bytes(stored)
    scores = [ask(tmp_path / f"{n}.mp4")[0]["score"] for n in ("phone", "upright", "stored")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert abs(scores[0] - scores[2]) > 1e-3


def test_several_questions_in_one_pass_equal_each_alone(ask, tmp_path):
    encode(tmp_path / "clip.mp4", numbered_frames(50), fps=10)
    questions = [QUESTION, "what is shown?", "", QUESTION]
    together = ask(tmp_path / "clip.mp4", questions)
    assert [line["question"] for line in together] == questions
    for line, question in zip(together, questions, strict=True):
        (alone,) = ask(tmp_path / "clip.mp4", [question])
        assert alone.pop("score") == pytest.approx(line.pop("score"), abs=1e-5)
        for one, other in zip(alone.pop("moments"), line.pop("moments"), strict=True):
            assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-5)
            assert one == other
        assert alone == line


def test_a_long_video_at_one_frame_a_second(ask, tmp_path):
    encode(tmp_path / "long.mp4", numbered_frames(300), fps=2)
    (line,) = ask(tmp_path / "long.mp4", sampling=ONE_A_SECOND)
    assert line["frames"] == 150 and line["total_tokens"] == 750 and line["kept_tokens"] <= 9


def test_from_the_command_line(small_run, tmp_path):
    encode(tmp_path / "clip.mp4", numbered_frames(30), fps=10, sound=True)
    done = run_process(
        "eval.py",
        f"--workdir={small_run}",
        f"--video={tmp_path / 'clip.mp4'}",
        f"--question={QUESTION}",
        "--question=what is shown?",
        f"--output={tmp_path / 'out'}",
        "--config.eval.policies=('adacm2', 'random')",
    )
    assert done.returncode == 0, done.stderr
    rows = predictions_in(tmp_path / "out")
    assert [(row["policy"], row["question"]) for row in rows] == [
        ("adacm2", QUESTION),
        ("adacm2", "what is shown?"),
        ("random", QUESTION),
        ("random", "what is shown?"),
    ]
    printed = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert done.stdout.count("remembered most: ") == 4
    assert printed == [f"[{row['policy']}] {row['question']}  {row['prediction']}" for row in rows]


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def no_parameters(monkeypatch):
    """Fails when parameters are loaded: what is cheap to find is found before."""

    def load(*_):
        raise AssertionError("parameters were loaded first")

    monkeypatch.setattr("adacm2_jax.runs.load.restore_params", load)


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    encode_sound(tmp_path / "sound.mp4")
    encode(tmp_path / "good.mp4", numbered_frames(20), fps=10)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.mp4", ["gone.mp4", "no such file"]),
        ("", ["is a directory"]),
        ("empty.mp4", ["empty.mp4", "empty"]),
        ("text.mp4", ["text.mp4"]),
        ("sound.mp4", ["sound.mp4", "no video track"]),
    ],
)
def test_what_is_no_video_is_named_before_parameters_are_loaded(
    small_run, bad_files, no_parameters, capsys, name, words
):
    command = [f"--workdir={small_run}", f"--video={bad_files / name}", f"--question={QUESTION}"]
    assert run_script("eval.py", *command) == 2
    line = error_line(capsys)
    for word in words:
        assert word in line, line


def test_a_question_too_long_is_found_before_the_video_is_opened(
    small_run, tmp_path, no_parameters, capsys
):
    command = [f"--workdir={small_run}", f"--video={tmp_path / 'gone.mp4'}"]
    assert run_script("eval.py", *command, f"--question={'why ' * 40}") == 2
    line = error_line(capsys)
    assert "the limit is 24" in line and "shorten it" in line


def test_a_truncated_video_says_how_far_it_got_and_can_be_used(small_run, tmp_path, capsys):
    whole = encode(None, numbered_frames(200), fps=10, options={"g": "10"}, container="matroska")
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    command = [f"--workdir={small_run}", f"--video={tmp_path / 'cut.mkv'}"]
    command += [f"--question={QUESTION}", f"--output={tmp_path / 'out'}"]
    assert run_script("eval.py", *command) == 2
    line = error_line(capsys)
    assert "cut.mkv" in line and "of 20.0 s" in line and "nothing was answered" in line
    assert "--config.data.on_truncated=use" in line
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    assert run_script("eval.py", *command, "--config.data.on_truncated=use") == 0
    text = capsys.readouterr().err
    assert "warning: " in text and "cut.mkv" in text and "are used" in text
    (row,) = predictions_in(tmp_path / "out")
    assert row["frames"] in range(8, 12)  # one a second of what is there


def test_a_truncated_mp4_is_found_by_its_index(small_run, tmp_path, no_parameters, capsys):
    whole = encode(None, numbered_frames(200), fps=10, container_options={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    command = [f"--workdir={small_run}", f"--video={tmp_path / 'cut.mp4'}"]
    assert run_script("eval.py", *command, f"--question={QUESTION}") == 2
    line = error_line(capsys)
    assert "cut.mp4" in line and "of 20.0 s" in line and "on_truncated=use" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--config.model.memory.recent_ratio=-0.1"], ["recent_ratio", "[0, 1]", "-0.1"]),
        (["--config.model.memory.conserve_ratio=2"], ["conserve_ratio", "[0, 1]", "2"]),
        (["--config.model.memory.recent_ratio=1"], ["recent_ratio", "full"]),
        (["--config.model.memory.recent_ratio=lots"], ["recent_ratio", "lots"]),
        (["--config.eval.policies=('best',)"], ["policy", "best"]),
        (["--config.eval.chunk=0"], ["eval.chunk = 0"]),
        (["--config.eval.chnk=1"], ["chnk"]),
        (["--config.eval.chunk=one"], ["eval.chunk", "one"]),
        (["--config.eval.split=holdout"], ["holdout", "test"]),
        (["--config.data.on_truncated=maybe"], ["on_truncated", "maybe"]),
        (
            ["--config.data.resize=nearest"],
            ["data.resize", "nearest", "clean or ma_lmm"],
        ),
        (["--video=clip.mp4"], ["--video", "--question"]),
        (["--question=why?"], ["--video", "--question"]),
        (["--output="], ["--output is empty; name a directory"]),
        (["--video=a.mp4", "--question= "], ["--question or --video is empty"]),
        (["--video=", "--question=why?"], ["--question or --video is empty"]),
        (["--colour=red"], ["colour"]),
    ],
)
def test_wrong_options_are_named_in_one_line(small_run, no_parameters, capsys, overrides, words):
    assert run_script("eval.py", f"--workdir={small_run}", *overrides) == 2
    line = error_line(capsys)
    for word in words:
        assert word in line, line


def test_a_second_evaluation_in_the_same_directory_is_refused(
    small_run, no_parameters, tmp_path, capsys
):
    (tmp_path / "predictions.partial.jsonl").write_text("of the first")
    for given in ([], ["--video", clip_in(tmp_path), "--question", QUESTION]):
        with locked_output(tmp_path):
            command = (f"--workdir={small_run}", f"--output={tmp_path}", *given)
            assert run_script("eval.py", *command) == 2
        line = error_line(capsys)
        assert f"{tmp_path}: another process is writing there" in line and "--output" in line
    assert (tmp_path / "predictions.partial.jsonl").read_text() == "of the first"
    assert not (tmp_path / "predictions.jsonl").exists()


def test_what_a_line_of_the_data_says_stays_one_line(small_run, no_parameters, tmp_path, capsys):
    """Of a name with a line end or with the escape that colours a terminal."""
    path = tmp_path / "te\nst.jsonl"
    name = "a\nb\x1b[31m"
    line = {"id": name, "video": clip_in(tmp_path), "question": "why " * 40}
    path.write_text(json.dumps(line))
    given = ("--config.data.source=jsonl", f"--config.data.jsonl.test={path}")
    assert run_script("eval.py", f"--workdir={small_run}", *given) == 2
    text = capsys.readouterr().err
    assert "te\\nst.jsonl: id a\\nb\\x1b[31m: " in error_line(text)
    assert "the limit is 24" in error_line(text) and "\x1b" not in text
    path.write_text(json.dumps(line | {"video": name, "question": QUESTION}))
    assert run_script("eval.py", f"--workdir={small_run}", *given) == 2
    text = capsys.readouterr().err
    assert "the first is " in error_line(text) and "a\\nb\\x1b[31m; paths" in error_line(text)
    assert "\x1b" not in text


def clip_in(directory) -> str:
    encode(directory / "clip.mp4", numbered_frames(10))
    return str(directory / "clip.mp4")


def test_a_run_in_brackets_is_evaluated(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run[1]")
    assert run_script("eval.py", f"--workdir={tmp_path / 'run[1]'}") == 0
    assert predictions_in(tmp_path / "run[1]" / "eval") == predictions_in(small_run)


def test_another_model_is_refused_with_the_difference(small_run, capsys):
    status = run_script("eval.py", f"--workdir={small_run}", "--config.model.llm.width=32")
    text = capsys.readouterr().err
    assert status == 2 and "another configuration" in error_line(text)
    assert " - model.llm.width = 16\n + model.llm.width = 32" in text


def test_no_run_and_no_checkpoint_are_told_apart(small_run, tmp_path, capsys):
    assert run_script("eval.py", f"--workdir={tmp_path}") == 2
    line = error_line(capsys)
    assert str(tmp_path) in line and "config.json" in line
    ignore = shutil.ignore_patterns("checkpoints")
    shutil.copytree(small_run, tmp_path / "fresh", ignore=ignore)
    for given in ([], [f"--config.init_from={small_run}"]):  # which is not the run's own model
        assert run_script("eval.py", f"--workdir={tmp_path / 'fresh'}", *given) == 2
        assert "no checkpoint here; train first" in error_line(capsys)


def test_parameters_of_another_model_are_listed(small_run, tmp_path, capsys):
    shutil.copytree(small_run, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    stored["model"]["qformer"]["mlp_width"] = 48
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    assert run_script("eval.py", f"--workdir={tmp_path / 'run'}") == 2
    text = capsys.readouterr().err
    assert "parameters of another model" in error_line(text)
    assert "\n - qformer/" in text and "\n + qformer/" in text
    assert "32" in text and "48" in text


@pytest.mark.usefixtures("abandoned_reads")
@pytest.mark.parametrize("part", ["checkpoints/9/learned", "frozen"])
def test_a_damaged_checkpoint_is_named(small_run, tmp_path, capsys, part):
    shutil.copytree(small_run, tmp_path / "run")
    for path in (tmp_path / "run" / part).rglob("d/*"):
        if path.stat().st_size > 4096:  # all that may hold values: not each of them is read
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run_script("eval.py", f"--workdir={tmp_path / 'run'}") == 2
    line = error_line(capsys)
    assert str(tmp_path / "run" / part) in line and "damaged" in line


def test_a_half_written_checkpoint_is_not_taken_for_the_newest(small_run, tmp_path):
    shutil.copytree(small_run, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "9", steps / "12.orbax-checkpoint-tmp")
    shutil.rmtree(steps / "12.orbax-checkpoint-tmp" / "learned")
    output = tmp_path / "out"
    assert run_script("eval.py", f"--workdir={tmp_path / 'run'}", f"--output={output}") == 0
    assert predictions_in(output) == predictions_in(small_run)
