"""Does lmms-eval count what the library counts, through the server and through our model of it?

    make check-lmms-eval RUN=runs/quickstart/main

Draws clips of the needle task and asks ``adacm2_jax.load(RUN)`` about them. Then lmms-eval, from an
environment of its own, runs the tasks in ``benchmarks/lmms_eval`` with its model ``openai`` against
a server process: once with the videos by their ``file://`` addresses (``pass_video_url=True``),
once with their frames as pictures. Every answer and the score that it writes must be those of the
Python door.

Then its model ``adacm2`` (``adacm2_jax.lmms_eval``), in one process with our library, answers
QUESTIONS questions of a task that has the form of LVU, MA-LMM's annotation with windows; its
answers and its score must be those of ``eval.py`` about the same. Nothing is fetched. Exits with 1
if it is not so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is tried is how they talk

import adacm2_jax
from adacm2_jax.errors import UserError
from benchmarks._clips import Clip, as_png, make_clips
from benchmarks._server import ROOT, Server

CLIPS, FRAMES = 200, 16
#: Of the task in LVU's form, and the windows of each of its clips, seconds.
MORE_CLIPS, WINDOWS = 100, ((0.0, 16.0), (4.0, 16.0))
QUESTIONS = MORE_CLIPS * len(WINDOWS)
TOKEN, NAME = "the token of this check", "needle"
#: Task → arguments of lmms-eval's model: how it sends a clip.
TASKS = {"needle_video": "pass_video_url=True", "needle_frames": "pass_video_url=False"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("python", metavar="PYTHON", help="of an environment with lmms-eval")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run that knows the needle task")
    args = parser.parse_args()
    python = Path(args.python).absolute()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        clips = make_clips(root / "clips", CLIPS, FRAMES)
        try:
            wanted = ask_door(args.run, clips)
        except UserError as error:
            print(f"error: {error}; make quickstart makes a run, RUN=… names one", file=sys.stderr)
            return 2
        write_questions(root, clips)
        (root / "token").write_text(TOKEN)
        flags = ("--name", NAME, "--token-file", str(root / "token"), "--allow", str(root))
        server = Server(str(args.run), root / "state", *flags)
        try:
            failed = [
                name for name in TASKS if not check(name, root, python, server, clips, wanted[name])
            ]
        finally:
            server.stop()
        if not check_model(root / "own", python, args.run.absolute()):
            failed.append("lmms-eval's model adacm2")
    print(f"does not hold: {'; '.join(failed)}" if failed else "lmms-eval counts as we do")
    return 1 if failed else 0


def ask_door(run: Path, clips: list[Clip]) -> dict[str, list[str]]:
    """Task → what the library answers about each clip, without a server."""
    model = adacm2_jax.load(run)
    by_frames = []
    for clip in clips:
        session = model.session(clip.question)
        session.push(clip.frames)
        by_frames.append(session.ask(clip.question).answer)
    by_file = [model.ask(clip.path, clip.question).answer for clip in clips]
    return {"needle_video": by_file, "needle_frames": by_frames}


def write_questions(root: Path, clips: list[Clip]) -> None:
    """The data set, as the tasks expect it in the directory that lmms-eval runs in."""
    lines = []
    for clip in clips:
        pictures = []
        for number, frame in enumerate(clip.frames):
            pictures.append(str(clip.path.with_name(f"{clip.path.stem}-{number:02d}.png")))
            Path(pictures[-1]).write_bytes(as_png(frame))
        asked = {"question": clip.question, "answer": clip.answer}
        lines.append(json.dumps({"video": str(clip.path), "frames": pictures} | asked))
    (root / "questions.jsonl").write_text("\n".join(lines) + "\n")


def check(
    task: str, root: Path, python: Path, server: Server, clips: list[Clip], wanted: list[str]
) -> bool:
    """Runs one task, and compares."""
    options = f"model_version={NAME},max_retries=1,num_concurrent=8,{TASKS[task]}"
    environment = {
        "OPENAI_API_BASE": f"http://127.0.0.1:{server.port}/v1",
        "OPENAI_API_KEY": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    tasks = ROOT / "benchmarks/lmms_eval"
    model = ["openai", "--model_args", options, "--batch_size", "1"]
    found = run_lmms_eval(root, python, task, tasks, model, environment)
    if found is None:
        return False
    said, scores = found
    score = scores["exact_match,none"]
    ours = sum(text == clip.answer for text, clip in zip(wanted, clips, strict=True)) / len(clips)
    same = sum(said.get(number) == text for number, text in enumerate(wanted))
    holds = same == len(clips) and abs(score - ours) < 1e-9 and ours > 0.5
    print(
        f"{'holds' if holds else 'FAILS'}  {task}: exact_match {score:.4f}, the Python door's "
        f"{ours:.4f}; {same} of {len(clips)} answers are the same",
        flush=True,
    )
    return holds


def run_lmms_eval(
    root: Path, python: Path, task: str, tasks: Path, model: list[str], about: dict[str, str]
) -> tuple[dict[int, str], dict] | None:
    """Answers by question, and the scores that lmms-eval writes; None if it did not end well."""
    environment = os.environ | about
    environment |= {"HF_HUB_OFFLINE": "1"}  # nothing is fetched
    environment |= {"HF_HOME": str(root / "cache"), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [
            *(python, "-m", "lmms_eval", "eval", "--model", *model, "--tasks", task),
            *("--include_path", tasks, "--log_samples", "--output_path", root / task),
        ],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    results = sorted((root / task).rglob("*_results.json"))
    samples = sorted((root / task).rglob(f"*_samples_{task}.jsonl"))
    if done.returncode or len(results) != 1 or len(samples) != 1:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        print(f"FAILS  {task}: lmms-eval ended with {done.returncode}, and wrote {results}")
        return None
    lines = [json.loads(line) for line in samples[0].read_text().splitlines()]
    said = {sample["doc_id"]: answer_of(sample) for sample in lines}
    return said, json.loads(results[0].read_text())["results"][task]


def check_model(root: Path, python: Path, run: Path) -> bool:
    """Our model of lmms-eval against ``eval.py``: a task in LVU's form, with windows."""
    lines = [
        {
            "id": f"{clip.path.stem}_{start:g}",
            "video": str(clip.path),
            "question": clip.question,
            "answer": clip.answer,
            "start": start,
            "end": end,
            "group": clip.path.stem,
        }
        for clip in make_clips(root / "clips", MORE_CLIPS, FRAMES)
        for start, end in WINDOWS
    ]
    questions = root / "lvu_scene.jsonl"  # where the task looks
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = ["adacm2", "--model_args", f"model={run}", "--batch_size", "8"]
    tasks = ROOT / "adacm2_jax/lmms_eval/tasks"
    found = run_lmms_eval(root, python, "adacm2_lvu_scene", tasks, model, {})
    if found is None:
        return False
    said, scores = found
    done = subprocess.run(
        [
            *(sys.executable, "eval.py", "--workdir", run, "--output", root / "eval"),
            *("--config.data.source=jsonl", f"--config.data.jsonl.test={questions}"),
            # What the task prescribes, and one answer, not the five best.
            *("--config.generation.num_beams=5", "--config.generation.max_new_tokens=4"),
            "--config.eval.batch_size=8",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        print(f"FAILS  eval.py ended with {done.returncode}")
        return False
    rows = [json.loads(line) for line in (root / "eval/predictions.jsonl").open()]
    rows = [row for row in rows if row["policy"] == rows[0]["policy"]]
    ours = sum(row["correct"] for row in rows) / len(rows)
    same = sum(said.get(number) == row["prediction"].strip() for number, row in enumerate(rows))
    holds = same == len(rows) == QUESTIONS and abs(scores["top1,none"] - ours) < 1e-9 and ours > 0.5
    print(
        f"{'holds' if holds else 'FAILS'}  lmms-eval's model adacm2: top1 "
        f"{scores['top1,none']:.4f}, eval.py's {ours:.4f}; {same} of {QUESTIONS} answers are the "
        "same",
        flush=True,
    )
    return holds


def answer_of(sample: dict) -> str:
    """What came back, as lmms-eval writes it: nested in lists of one."""
    answer = sample["filtered_resps"]
    while isinstance(answer, list):
        (answer,) = answer
    return answer


if __name__ == "__main__":
    sys.exit(main())
