"""Trains the tiny model on the suite of generated tasks and answers held-out videos, task by task.

    python benchmarks/suite.py --workdir runs/suite [--styles grounds,film] [--seed 0]
    python benchmarks/suite.py --workdir runs/suite --vision_only

Makes the ViT (``vision``), trains the stages of ``configs/suite.py`` and answers one split under
the given policies. What is done is left as it is. Hyper-parameters are chosen on ``val``; ``test``
is for what is reported. Writes ``WORKDIR/SPLIT-tFRAMES/results.json``: accuracy by policy and task
with its 95 % interval, beside chance.
"""

import dataclasses
import json
import pathlib
import sys
import time

from absl import flags
from etils import epath

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.commands.evaluate import evaluate  # noqa: E402
from adacm2_jax.commands.train import train_and_evaluate  # noqa: E402
from adacm2_jax.files import write_json  # noqa: E402
from adacm2_jax.inference.processor import Processor, train_tokenizers  # noqa: E402
from adacm2_jax.port.base import write_base  # noqa: E402
from adacm2_jax.port.store import LazyArray  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.experiment import Experiment, read  # noqa: E402
from adacm2_jax.runs.load import load_params, make_answerer  # noqa: E402
from adacm2_jax.runs.lock import locked_output  # noqa: E402
from adacm2_jax.runs.workdir import check_path, is_base, saved_steps  # noqa: E402
from adacm2_jax.scoring.intervals import wilson_interval  # noqa: E402
from adacm2_jax.training.pretrain import pretrain_vision  # noqa: E402
from configs import suite  # noqa: E402
from data.sources import open_source  # noqa: E402
from data.suite.drawn import LABELS, labelled_frames  # noqa: E402
from data.suite.plan import chance  # noqa: E402


def main() -> None:
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir)
    check_path(workdir, f"--workdir={workdir}")
    make_vision(workdir)
    if args.vision_only:
        return
    for stage in suite.STAGES:
        train_stage(stage, workdir)
    rows = answer(workdir, args.split, args.frames, tuple(args.policies))
    print(f"{'policy':8} {'task':8} {'accuracy':>9} {'95 % interval':>17} {'chance':>7}")
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['policy']:8} {row['task']:8} {row['accuracy']:>9.1%} "
            f"{f'{low:.1%} to {high:.1%}':>17} {row['chance']:>7.1%}"
        )


def experiment_of(stage: str, workdir: pathlib.Path) -> Experiment:
    """The experiment of a stage in this work directory."""
    args = flags.FLAGS
    config = suite.get_config(stage)
    config.seed = args.seed
    config.init_from = str(workdir / suite.STAGES[stage].start)
    config.data.data_dir = str(workdir / "data")
    config.data.suite.styles = tuple(args.styles)
    config.checkpoint.every, config.checkpoint.keep = 200, 1
    return read(config)


def make_vision(workdir: pathlib.Path) -> None:
    """Makes the ViT, with the tokenizers beside it, unless it is there: ``vision``."""
    if is_base(workdir / "vision"):
        return
    batch_size, steps, learning_rate = suite.VISION
    print(f"the ViT: {steps} steps, each of {batch_size} frames", flush=True)
    first = experiment_of("first", workdir)
    vision, data, seed = first.model.vision, first.data.suite, first.seed
    frames = labelled_frames(batch_size, vision.image_size, data.styles, data.share, seed)
    params = pretrain_vision(
        vision, frames, LABELS, steps=steps, learning_rate=learning_rate, seed=seed
    )
    clips = open_source(first.data, "train")
    texts = (text for clip in clips for text in (clip.question, clip.answer))
    write_base(
        epath.Path(workdir / "vision"),
        first.model,
        {path: LazyArray.of(values) for path, values in params.items()},
        train_tokenizers(texts, first.model),
        sources=["data/suite/drawn.py"],
    )


def train_stage(stage: str, workdir: pathlib.Path) -> None:
    """Trains a stage, or goes on with it; one that is done is left as it is."""
    steps = suite.STAGES[stage].steps
    if saved_steps(workdir / stage)[-1:] == [steps]:
        return
    begun = time.perf_counter()
    train_and_evaluate(experiment_of(stage, workdir), workdir / stage, at_the_end=False)
    print(f"stage {stage}: {steps} steps in {time.perf_counter() - begun:.0f} s", flush=True)


def answer(workdir: pathlib.Path, split: str, frames: int, policies: tuple[str, ...]) -> list[dict]:
    """Every policy on every task of a split, as rows of results.json."""
    output = workdir / f"{split}-t{frames}"
    main = experiment_of("main", workdir)
    task = dataclasses.replace(main.data.suite, num_frames=frames, test_size=flags.FLAGS.videos)
    sampling = dataclasses.replace(main.data.sampling, num_frames=frames)
    main = dataclasses.replace(
        main,
        data=dataclasses.replace(main.data, suite=task, sampling=sampling),
        eval=dataclasses.replace(main.eval, policies=policies),
    )
    answerer = make_answerer(
        main,
        load_params(main, workdir / "main"),
        Processor.load(workdir / "main", main.model),
    )
    with locked_output(output):
        evaluate(main, answerer, open_source(main.data, split), output)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    rows = []
    for policy in policies:
        for name in dict.fromkeys(task.tasks):
            mine = [x for x in lines if (x["policy"], x["category"]) == (policy, name)]
            right = sum(line["correct"] for line in mine)
            rows.append(
                {
                    "policy": policy,
                    "task": name,
                    "T": frames,
                    "questions": len(mine),
                    "videos": len({line["group"] for line in mine}),
                    "accuracy": right / len(mine),
                    # Questions about one video are taken as independent here.
                    "interval": list(wilson_interval(right, len(mine))),
                    "chance": chance(name, frames),
                }
            )
    write_json(output / "results.json", rows)
    return rows


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/suite", "Where everything is written.", **options)
    flags.DEFINE_integer("seed", 0, "Of the first parameters and the clips' order.", **options)
    flags.DEFINE_list("styles", ["grounds"], "Styles of the videos.", **options)
    flags.DEFINE_list("policies", ["full"], "Memories that answer.", **options)
    flags.DEFINE_string("split", "val", "val or test.", **options)
    flags.DEFINE_integer("frames", 16, "Frames of a video that is answered.", **options)
    flags.DEFINE_integer("videos", 100, "Videos of each task.", **options)
    flags.DEFINE_boolean("vision_only", False, "Make the ViT alone.", **options)


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
