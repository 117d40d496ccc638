"""The paper's central claim on a laptop, in minutes: ``make quickstart``.

Builds the needle task (videos in which one frame answers the question), trains the tiny model on
clips of up to 16 frames with every token kept, and then answers questions about videos of 16, 64
and 256 frames under each memory policy. A tiny memory chosen by cross-attention answers as well as
keeping everything; a memory of the same size filled otherwise does not.

Writes ``results.json``, ``results.png`` and the trained model to the work directory.
"""

import itertools
import pathlib
import sys
import time

import numpy as np
from absl import flags

import eval as evaluation
import train
from adacm2_jax.config import from_dict
from adacm2_jax.errors import DataError
from adacm2_jax.files import write_json
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs import app
from configs import needle

POLICIES = ("adacm2", "full", "uniform", "random", "recent")
#: Frames of a video → questions asked, each about a video of its own.
LENGTHS = {16: 600, 64: 600, 256: 200}


def main() -> None:
    workdir = pathlib.Path(flags.FLAGS.workdir)
    start = time.perf_counter()
    for stage, (before, frames, *_) in needle.STAGES.items():
        config = needle.get_config(stage)
        config.data.data_dir, config.data.cache_dir = str(workdir / "data"), str(workdir / "cache")
        config.init_from = str(workdir / before) if before else ""
        print(f"training on {frames} frames: {config.train.steps} steps", flush=True)
        train.train_and_evaluate(config.lock(), str(workdir / stage))

    config = config.unlock()
    config.eval.policies = POLICIES
    rows = []
    for frames, questions in LENGTHS.items():
        print(f"answering {questions} questions about videos of {frames} frames", flush=True)
        rows += evaluate(config, frames, questions, workdir)
    write_json(workdir / "results.json", rows)
    draw(rows, workdir / "results.png")
    print(table(rows))
    minutes = (time.perf_counter() - start) / 60
    print(NEXT.format(workdir=workdir, minutes=minutes))


def evaluate(config, frames: int, questions: int, workdir: pathlib.Path) -> list[dict]:
    """Every policy on held-out digits in videos of ``frames`` frames, as rows of results.json."""
    config.data.needle.num_frames = config.data.sampling.num_frames = frames
    config.data.needle.train_size, config.data.needle.test_size = 0, questions
    config.eval.chunk = min(frames, 64)  # policy full reads its whole memory once a chunk
    params = evaluation.load_params(config, workdir / "main")
    processor = Processor.load(workdir / "main", from_dict(config.model.to_dict()))
    output = workdir / f"frames{frames}"
    results = evaluation.evaluate(config, params, processor, output)
    return [{"policy": name, "T": frames, **row} for name, row in results["policies"].items()]


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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
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


NEXT = """Done in {minutes:.1f} minutes. Results: {workdir}/results.json, {workdir}/results.png

What next:
  ask about one video, read at one frame a second
    python eval.py --workdir {workdir}/main --video CLIP.mp4 --question "which digit was on ..." \\
      --config.data.sampling.mode=fps
  try another memory on longer videos
    python eval.py --workdir {workdir}/main --config.model.memory.recent_ratio=0.2 \\
      --config.data.needle.num_frames=64 --config.data.needle.train_size=0 \\
      --config.data.sampling.num_frames=64
  train on your own videos
    python train.py --config configs/videos.py:train.jsonl,test.jsonl --workdir runs/mine
This model has seen nothing but digits on coloured grounds; docs/ says how to go on from there.
"""


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.")
    app.run(main, sys.argv, (DataError,))
