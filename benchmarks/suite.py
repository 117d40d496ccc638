"""The suite of generated tasks: trains the tiny model on it, and compares memories.

    make suite
    python benchmarks/suite.py --workdir runs/suite [--seeds 0,1,2] [--split test] [--fast]
    python benchmarks/suite.py --workdir runs/suite --vision_only

For each seed it makes a ViT and trains the stages of ``configs/suite.py`` (SEED/vision, first,
main). Then ``adacm2 ablate`` answers held-out videos of every task under each memory at equal
tokens, and writes its tables to WORKDIR/SPLIT. What is done is left as it is; what was stopped goes
on. Hyper-parameters were chosen on ``val`` with seeds from 10 on; reported are ``test`` and the
seeds below.
"""

import argparse
import pathlib
import sys
import time

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.commands import vision  # noqa: E402
from adacm2_jax.commands.ablate import ablate  # noqa: E402
from adacm2_jax.commands.ablate_flags import add_flags  # noqa: E402
from adacm2_jax.commands.train import train_and_evaluate  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.experiment import Experiment, read  # noqa: E402
from adacm2_jax.runs.workdir import check_path, is_base, saved_steps  # noqa: E402
from configs import suite  # noqa: E402
from data.suite.drawn import LABELS, labelled_frames  # noqa: E402

#: Memories that are compared; those without a size of their own hold TOKENS a layer.
MEMORIES = (
    "adacm2",
    "running=adacm2:decay=0.7",
    "shared=adacm2:shared_choice=True",
    "hybrid=adacm2:novelty=0.5",
    "novelty=adacm2:novelty=1.0",
    "recent",
    "recent_frames",
    "last4=recent_frames:recent_frames=4",
    "last16=recent_frames:recent_frames=16",
    "uniform",
    "random",
    "merge",
)
#: Two frames' tokens: a 32nd of all at 64 frames, a 128th at 256.
TOKENS = 34
TASKS = ("needle", "order", "change", "late")
#: Lengths of the videos, and how many of each task, each with up to four questions; by --fast.
LENGTHS, VIDEOS = {False: "64,256", True: "64"}, {False: 84, True: 13}


def main() -> None:
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir)
    check_path(workdir, f"--workdir={workdir}")
    seeds = [int(seed) for seed in args.seeds]
    if args.vision_only:
        make_vision(workdir / str(seeds[0]), seeds[0])
        return
    for seed in seeds:
        train(workdir / str(seed), seed)
    compare(workdir, seeds)


def train(workdir: pathlib.Path, seed: int) -> None:
    """Trains the model of a seed, or goes on with it."""
    begun = time.perf_counter()
    make_vision(workdir, seed)
    for stage, settings in suite.STAGES.items():
        if saved_steps(workdir / stage)[-1:] != [settings.steps]:
            train_and_evaluate(experiment_of(stage, workdir, seed), workdir / stage, False)
    print(f"seed {seed}: {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


def compare(workdir: pathlib.Path, seeds: list[int]) -> None:
    """Answers held-out videos under all memories; tables and figures go to WORKDIR/SPLIT."""
    args = flags.FLAGS
    parser = argparse.ArgumentParser()
    add_flags(parser)
    words = [word for seed in seeds for word in ("--model", str(workdir / str(seed) / "main"))]
    words += [word for memory in MEMORIES for word in ("--memory", memory)]
    words += ["--tokens", str(TOKENS), "--frames", LENGTHS[args.fast], "--split", args.split]
    words += ["--vary", f"data.suite.tasks={','.join(TASKS)}"]
    words += ["--set", f"data.suite.test_size={VIDEOS[args.fast]}"]
    words += ["--set", f"data.data_dir={workdir / 'data'}"]
    ablate(parser.parse_args([*words, "--output", str(workdir / args.split)]))


def experiment_of(stage: str, workdir: pathlib.Path, seed: int) -> Experiment:
    """The experiment of a stage in this work directory."""
    config = suite.get_config(stage)
    config.seed = seed
    config.init_from = str(workdir / suite.STAGES[stage].start)
    config.data.data_dir = str(workdir.parent / "data")
    config.data.suite.styles = tuple(flags.FLAGS.styles)
    config.checkpoint.every, config.checkpoint.keep = 200, 1
    return read(config)


def make_vision(workdir: pathlib.Path, seed: int) -> None:
    """Makes the ViT, with the tokenizers beside it, unless it is there: ``vision``."""
    if is_base(workdir / "vision"):
        return
    batch_size, steps, learning_rate = suite.VISION
    print(f"the ViT: {steps} steps, each of {batch_size} frames", flush=True)
    first = experiment_of("first", workdir, seed)
    data, size = first.data.suite, first.model.vision.image_size
    vision.make_vision(
        workdir / "vision",
        first,
        labelled_frames(batch_size, size, data.styles, data.share, seed),
        LABELS,
        steps=steps,
        learning_rate=learning_rate,
        sources=["data/suite/drawn.py"],
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/suite", "Where everything is written.", **options)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "A model each.", **options)
    flags.DEFINE_list("styles", ["grounds"], "Styles of the videos.", **options)
    flags.DEFINE_string("split", "test", "val or test.", **options)
    flags.DEFINE_boolean("fast", False, "One length, a few videos.", **options)
    flags.DEFINE_boolean("vision_only", False, "Make the ViT of the first seed alone.", **options)


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
