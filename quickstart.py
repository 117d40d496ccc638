"""The paper's central claim on a laptop, in minutes: ``make quickstart``.

Makes a small ViT and trains the tiny model around it on the needle task (videos in which one frame
answers the question), on clips of up to 16 frames with every token kept. Then it answers questions
about videos of 16, 64 and 256 frames under each memory policy. A tiny memory chosen by
cross-attention answers as well as keeping everything; a memory of the same size filled otherwise
does not.

Writes ``results.json``, ``results.png``, the trained model, two clips to ask about, and
``memory.png``, what the model remembered of the first, to the work directory.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports, too, which take seconds
    from adacm2_jax import interrupt

    interrupt.end_at_once()

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time

import numpy as np
from absl import flags

from adacm2_jax.commands import vision
from adacm2_jax.commands.evaluate import evaluate
from adacm2_jax.commands.train import train_and_evaluate
from adacm2_jax.files import write_json, write_text
from adacm2_jax.inference.answerer import Answerer
from adacm2_jax.inference.picture import Counts, draw_memory
from adacm2_jax.inference.processor import Processor
from adacm2_jax.memory.policies import plan_for
from adacm2_jax.runs import app
from adacm2_jax.runs.experiment import Experiment, read
from adacm2_jax.runs.load import load_params, make_answerer
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.runs.workdir import check_path, is_base, saved_steps
from adacm2_jax.video.frames import read_clip
from adacm2_jax.video.sampling import ONE_A_SECOND
from configs import needle
from data.needle.builder import build, make_record
from data.needle.drawn import LABELS, labelled_frames
from data.sources import open_source

POLICIES = ("adacm2", "full", "uniform", "random", "recent")
#: Frames of a video → questions asked, each about a video of its own.
LENGTHS = {16: 300, 64: 300, 256: 200}
#: Clips to watch and ask about: how many, seconds at one frame a second, pixels of a side.
CLIPS, CLIP_FRAMES, CLIP_SIZE = 2, 96, 256


def main() -> None:
    workdir = pathlib.Path(flags.FLAGS.workdir)
    check_path(workdir, f"--workdir={workdir}")
    if flags.FLAGS.vision_only:
        make_vision(workdir)
        print(f"the ViT is in {workdir / 'vision'}: --config.init_from={workdir / 'vision'}")
        return
    start = time.perf_counter()
    # The test videos are made beside the training, which leaves a part of the processor idle.
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        videos = beside.submit(make_videos, workdir)
        make_vision(workdir)
        for stage in needle.STAGES:
            train_stage(stage, workdir)
        if not videos.done():
            print("waiting for the test videos", flush=True)
        clips = videos.result()

    rows = [row for frames in LENGTHS for row in answer(frames, workdir)]
    write_json(workdir / "results.json", rows)
    draw(rows, workdir / "results.png")
    ask_about(clips, workdir)
    print(table(rows))
    print(what_next(workdir, clips[0], (time.perf_counter() - start) / 60))


def make_videos(workdir: pathlib.Path) -> list[dict]:
    """Makes the test sets and the clips that people watch, unless they are there.

    Returns:
      For each clip its ``video`` (the path), ``question`` and ``answer``.
    """
    for frames, questions in LENGTHS.items():
        build(workdir / "data", frames, {"test": questions}, shown=False)
    folder = workdir / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for number in range(CLIPS):
        record = make_record("test", CLIP_FRAMES, number, CLIP_SIZE)
        path = folder / f"needle{number + 1}.mp4"
        path.write_bytes(record["video"])
        clips.append({"video": str(path), **{key: record[key] for key in ("question", "answer")}})
    lines = [json.dumps(clip | {"video": pathlib.Path(clip["video"]).name}) for clip in clips]
    write_text(folder / "questions.jsonl", "\n".join(lines) + "\n")
    return clips


def experiment_of(stage: str, workdir: pathlib.Path) -> Experiment:
    """The experiment of a stage in this work directory."""
    config = needle.get_config(stage)
    config.seed = flags.FLAGS.seed
    config.init_from = str(workdir / needle.STAGES[stage].start)
    config.data.data_dir = str(workdir / "data")
    config.data.needle.test_size = LENGTHS[16]
    config.checkpoint.every, config.checkpoint.keep = 200, 1
    return read(config)


def make_vision(workdir: pathlib.Path) -> None:
    """Makes the ViT, with the tokenizers beside it, unless it is there: what training starts from,
    ``vision``."""
    if is_base(workdir / "vision"):
        return
    batch_size, steps, learning_rate = needle.VISION
    print(f"the ViT: {steps} steps, each of {batch_size} frames", flush=True)
    first = experiment_of("first", workdir)
    vision.make_vision(
        workdir / "vision",
        first,
        labelled_frames(batch_size, first.model.vision.image_size, first.seed),
        LABELS,
        steps=steps,
        learning_rate=learning_rate,
        sources=["data/needle/drawn.py"],
    )


def train_stage(stage: str, workdir: pathlib.Path) -> None:
    """Trains a stage, or goes on with it; one that is done is left as it is."""
    _, frames, batch_size, steps, *_ = needle.STAGES[stage]
    if saved_steps(workdir / stage)[-1:] == [steps]:
        return
    print(
        f"stage {stage}: {steps} steps, each of {batch_size} clips of {frames} frames", flush=True
    )
    train_and_evaluate(experiment_of(stage, workdir), workdir / stage, at_the_end=False)


def answer(frames: int, workdir: pathlib.Path) -> list[dict]:
    """Every policy on held-out digits in videos of ``frames`` frames, as rows of results.json."""
    output = workdir / f"frames{frames}"
    if not (output / "metrics.json").exists():
        main = experiment_of("main", workdir)
        task = dataclasses.replace(main.data.needle, num_frames=frames, test_size=LENGTHS[frames])
        sampling = dataclasses.replace(main.data.sampling, num_frames=frames)
        main = dataclasses.replace(
            main,
            data=dataclasses.replace(main.data, needle=task, sampling=sampling),
            eval=dataclasses.replace(main.eval, policies=POLICIES),
        )
        print(f"answering {LENGTHS[frames]} questions about videos of {frames} frames", flush=True)
        with locked_output(output):
            evaluate(main, open_model(main, workdir), open_source(main.data, "test"), output)
    results = json.loads((output / "metrics.json").read_text())
    return [{"policy": name, "T": frames, **row} for name, row in results["policies"].items()]


def open_model(experiment: Experiment, workdir: pathlib.Path) -> Answerer:
    """The trained model under the policies of an experiment."""
    processor = Processor.load(workdir / "main", experiment.model)
    return make_answerer(experiment, load_params(experiment, workdir / "main"), processor)


def ask_about(clips: list[dict], workdir: pathlib.Path) -> None:
    """Asks about the clips and draws what is remembered of the first, ``memory.png``."""
    main = experiment_of("main", workdir)
    answerer, (policy,) = open_model(main, workdir), main.eval.policies
    vision = main.model.vision
    # Rows and chunks are those of the evaluation, so that nothing is compiled anew.
    rows, chunk = main.eval.batch_size, main.eval.chunk
    frames = np.zeros((rows, CLIP_FRAMES, vision.image_size, vision.image_size, 3), np.uint8)
    for i, clip in enumerate(clips):
        frames[i] = read_clip(clip["video"], ONE_A_SECOND, size=vision.image_size)
    valid = np.zeros((rows, chunk), bool)
    valid[: len(clips)] = True
    questions = [clip["question"] for clip in clips] + [""] * (rows - len(clips))
    reading = answerer.start(questions, np.full(rows, CLIP_FRAMES), np.zeros(rows, np.uint32))
    for first in range(0, CLIP_FRAMES, chunk):
        answerer.read(reading, frames[:, first : first + chunk], valid)
    answers = [best[0].text for best in answerer.answer(reading, policy)[: len(clips)]]
    for clip, given in zip(clips, answers, strict=True):
        print(f"{clip['video']}: {clip['question']} {given} (right: {clip['answer']})")

    kept = answerer.kept_patches(reading, policy, 0)
    counts = Counts(
        seen=CLIP_FRAMES * vision.tokens_per_frame,
        kept=max(len(pairs) for pairs in kept),
        bound=plan_for(answerer.models[policy].config).capacity,
    )
    side = vision.image_size // vision.patch_size
    draw_memory(
        workdir / "memory.png",
        read_clip(clips[0]["video"], ONE_A_SECOND, size=CLIP_SIZE),
        kept,
        np.arange(CLIP_FRAMES),
        clips[0]["question"],
        answers[0],
        counts,
        grid=(side, side),
        truth=clips[0]["answer"],
    )


def table(rows: list[dict]) -> str:
    """Accuracy by policy and length, with its 95 % interval and the tokens kept in a layer."""
    lines = [f"{'policy':8}" + "".join(f"{f'T = {t}':>32}" for t in LENGTHS)]
    for policy in POLICIES:
        cells = []
        for row in (row for row in rows if row["policy"] == policy):
            low, high = row["interval"]
            kept = f"{row['kept_tokens']}/{row['total_tokens']}"
            cells.append(f"{row['accuracy']:.1%} ({low:.1%}-{high:.1%}) {kept:>9}")
        lines.append(f"{policy:8}" + "".join(f"{cell:>32}" for cell in cells))
    return "\n".join(["", "accuracy (95 % interval), tokens kept of all tokens seen", *lines, ""])


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Accuracy against T by policy, and tokens kept against T."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for policy, marker in zip(POLICIES, itertools.cycle("os^Dv"), strict=False):
        mine = [row for row in rows if row["policy"] == policy]
        lengths = [row["T"] for row in mine]
        accuracy = np.array([row["accuracy"] for row in mine])
        low, high = np.array([row["interval"] for row in mine]).T
        spread = np.maximum([accuracy - low, high - accuracy], 0) * 100
        left.errorbar(lengths, accuracy * 100, spread, marker=marker, capsize=3, label=policy)
        if policy in ("adacm2", "full"):
            label = "full" if policy == "full" else "adacm2 (and the others)"
            right.plot(lengths, [row["kept_tokens"] for row in mine], marker=marker, label=label)
    left.axhline(10, color="gray", linewidth=1, linestyle=":")
    left.set(ylabel="held-out accuracy, %", ylim=(0, 101), title="answers")
    right.set(ylabel="tokens kept in a layer", yscale="log", title="memory")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(LENGTHS), [str(t) for t in LENGTHS])
        axes.set_xlabel("frames of the video")
        axes.legend()
    figure.savefig(path, dpi=150)


def what_next(workdir: pathlib.Path, clip: dict, minutes: float) -> str:
    """What was written, and commands to go on with, as they can be pasted here."""
    python = pathlib.Path(sys.executable)
    return NEXT.format(
        workdir=workdir,
        minutes=minutes,
        python=os.path.relpath(python),
        command=os.path.relpath(python.with_name("adacm2")),
        clip=clip["video"],
        question=clip["question"],
    )


NEXT = """Done in {minutes:.1f} minutes. In {workdir}/:
  results.json, results.png   the table
  memory.png                  what was remembered of the first clip
  clips/                      two videos to watch, and questions.jsonl with what to ask

What next:
  ask about a clip (or any video)
    {command} ask {clip} --model {workdir}/main \\
      --question "{question}"
  try another memory on longer videos
    {python} eval.py --workdir {workdir}/main --config.model.memory.recent_ratio=0.2 \\
      --config.data.needle.num_frames=64 --config.data.sampling.num_frames=64
  train on your own videos
    {python} train.py --config configs/videos.py:train.jsonl,test.jsonl --workdir runs/mine
This model has seen nothing but digits on coloured grounds; docs/ says how to go on from there.
"""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.", **options)
    flags.DEFINE_integer(
        "seed", 0, "Of the model's first parameters and the order of the clips.", **options
    )
    flags.DEFINE_boolean(
        "vision_only", False, "Make the ViT, which training starts from, alone.", **options
    )


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
