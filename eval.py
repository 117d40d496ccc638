"""Answers questions about videos: a whole split, or one video.

    python eval.py --workdir runs/quickstart/main
    python eval.py --workdir runs/quickstart/main --video clip.mp4 --question "which digit …?"

Writes ``predictions.jsonl`` and ``metrics.json``. The experiment is that of the run; fields are
overridden as in training, for example ``--config.model.memory.recent_ratio=0.2``.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from adacm2_jax.config import AdaCM2Config, MemoryConfig, from_dict
from adacm2_jax.distributed import connect, is_main, main_first
from adacm2_jax.errors import DataError, UserError
from adacm2_jax.inference.answerer import Answer, Answerer, Reading
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.scores import exact_match, wilson_interval
from adacm2_jax.models.adacm2 import check_memory
from adacm2_jax.models.params import abstract_params, join_params
from adacm2_jax.runs import app
from adacm2_jax.runs.checkpoint import (
    check_same,
    is_base,
    read_config,
    restore_params,
    write_json,
)
from adacm2_jax.runs.load import check_base, start_params
from adacm2_jax.sharding import make_mesh
from adacm2_jax.video.frames import Sampling
from adacm2_jax.video.resize import RESIZES
from adacm2_jax.video.stream import Row, lock_step, open_video, video_batches
from data.jsonl import Example, JsonlSource
from data.sources import open_source

#: Fields of an experiment that evaluation may change.
FREE = (
    "model.memory.",
    "model.dtype",
    "model.qformer_dtype",
    "model.remat",
    *("checkpoint.", "data.", "eval.", "generation.", "optim.", "train."),
    *("init_from", "mesh", "seed", "tokenizers"),
)

#: The least value of fields whose type alone says too little.
LEAST = {
    "data.workers": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.num_frames": 1,
    "train.log_every": 1,
    "optim.warmup_steps": 0,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "eval.every": 0,
    "eval.limit": 0,
    "eval.batch_size": 1,
    "eval.chunk": 1,
    "eval.workers": 1,
}


def check(config: ConfigDict) -> AdaCM2Config:
    """Finds what is wrong in an experiment before anything is loaded; returns its model.

    Raises:
      UserError, DataError: for a field out of range.
    """
    for name, least in LEAST.items():
        section, field = name.split(".")
        if config[section][field] < least:
            raise UserError(f"{name} = {config[section][field]} must be at least {least}")
    try:
        config.data.prompt.format(question="")
    except (AttributeError, LookupError, ValueError):
        raise UserError(
            f"data.prompt = {config.data.prompt!r}: its only field is {{question}}; write other "
            "braces twice"
        ) from None
    make_sampling(config.data.sampling)
    if config.data.on_truncated not in ("error", "use"):
        raise UserError(f"data.on_truncated = {config.data.on_truncated!r}: must be error or use")
    if config.data.resize not in RESIZES:
        raise UserError(f"data.resize = {config.data.resize!r}: must be {' or '.join(RESIZES)}")
    GenerationConfig(**config.generation)
    model_config = from_dict(config.model.to_dict())
    check_memory(model_config)
    make_memories(config, model_config)
    return model_config


def check_questions(config: ConfigDict, processor: Processor, source: Sequence[Example]) -> None:
    """Finds a question in JSON lines that is too long before any video is decoded.

    Raises:
      UserError: naming the first.
    """
    for example in source if isinstance(source, JsonlSource) else ():
        try:
            processor.questions([config.data.prompt.format(question=example.question)])
        except UserError as error:
            raise UserError(f"{source.path}: id {example.id}: {error}") from None


def missing_videos(source: Sequence[Example]) -> list[str]:
    """Videos of JSON lines that are no files.

    Raises:
      DataError: if none is one.
    """
    missing = source.missing_videos() if isinstance(source, JsonlSource) else []
    if missing and len(missing) == len({example.video for example in source}):
        raise DataError(
            f"{source.path}: none of its videos is there, the first is {missing[0]}; paths are "
            "relative to the JSON-lines file"
        )
    return missing


def make_sampling(config: ConfigDict) -> Sampling:
    """``config.data.sampling`` as the data code's own type."""
    return Sampling(
        mode=config.mode,
        fps=config.fps,
        num_frames=config.num_frames,
        max_frames=config.max_frames or None,
    )


def make_memories(config: ConfigDict, model_config: AdaCM2Config) -> dict[str, MemoryConfig]:
    """The memory of every policy in ``eval.policies``, with the ratios of ``model.memory``."""
    sampling = config.data.sampling
    sampled = sampling.num_frames if sampling.mode == "uniform" else sampling.max_frames
    frames = config.eval.full_frames or sampled
    if not config.eval.policies:
        raise UserError("eval.policies is empty; name at least one, such as ('adacm2',)")
    if "full" in config.eval.policies and not frames:
        raise UserError(
            "eval.policies has 'full', which must hold all frames, but data.sampling.mode = "
            f"{sampling.mode!r} has no most; set eval.full_frames or data.sampling.max_frames"
        )
    memories = {}
    for policy in config.eval.policies:
        options = {"policy": policy} | ({"max_frames": frames} if policy == "full" else {})
        memory = dataclasses.replace(model_config.memory, **options)
        check_memory(dataclasses.replace(model_config, memory=memory))
        memories[policy] = memory
    return memories


def make_answerer(config: ConfigDict, params: dict, processor: Processor) -> Answerer:
    """The model of an experiment, ready to answer."""
    model_config = from_dict(config.model.to_dict())
    generation = GenerationConfig(**config.generation)
    memories = make_memories(config, model_config)
    return Answerer(model_config, params, processor, memories, generation, config.seed)


def load_params(config: ConfigDict, workdir: str | os.PathLike) -> dict:
    """Parameters alone, on whatever devices this process has: those of the run, or of the converted
    checkpoint in its place, else those of ``init_from``."""
    model_config, mesh = from_dict(config.model.to_dict()), make_mesh(tuple(config.mesh))
    connect(mesh)
    abstract = abstract_params(model_config, config.optim.groups, mesh)
    run = (pathlib.Path(workdir) / "config.json").exists() and not is_base(workdir)
    if run or not (config.init_from or is_base(workdir)):
        return join_params(restore_params(workdir, abstract, base=config.init_from), {})
    source = workdir if is_base(workdir) else config.init_from
    return start_params(source, model_config, abstract, config.init_missing, config.seed)


def evaluate(config: ConfigDict, params: dict, processor: Processor, output: pathlib.Path) -> dict:
    """Answers a split under every policy and writes ``predictions.jsonl`` and ``metrics.json``.

    Of several processes all answer, for each holds a part of the parameters; the first writes.
    Videos that cannot be read are listed under ``failed``; all others are answered.

    Returns:
      What ``metrics.json`` holds.
    """
    source = main_first(lambda: open_source(config.data, config.eval.split))
    limit = config.eval.limit or len(source)
    answerer = make_answerer(config, params, processor)
    predictions, failed, seconds = answer_split(config, answerer, itertools.islice(source, limit))
    results = {"policies": summarise(predictions, seconds), "failed": failed}
    if is_main():
        output.mkdir(parents=True, exist_ok=True)
        write_lines(output / "predictions.jsonl", predictions)
        write_json(output / "metrics.json", results)
    return results


def answer_split(
    config: ConfigDict, answerer: Answerer, examples: Iterable[Example]
) -> tuple[list[dict], list[dict], dict[str, float]]:
    """Answers examples in batches; returns predictions, failures and the seconds of each policy."""
    predictions: list[dict] = []
    failed: list[dict] = []
    seconds = dict.fromkeys(answerer.models, 0.0)
    rows = config.eval.batch_size
    batches = video_batches(
        examples,
        batch_size=rows,
        chunk=config.eval.chunk,
        size=next(iter(answerer.models.values())).config.vision.image_size,
        workers=config.eval.workers,
        on_bad_video=lambda example, error: failed.append({"id": example.id, "error": error}),
        **reading(config),
    )
    bar = tqdm(desc="evaluate", unit="video", disable=not is_main() or None)
    for batch in batches:
        spare = rows - len(batch.rows)  # a short last batch is filled up with empty rows
        prompts = [config.data.prompt.format(question=row.example.question) for row in batch.rows]
        totals = np.array([row.total for row in batch.rows] + [1] * spare)
        seeds = np.array([row.number for row in batch.rows] + [0] * spare)
        videos = answerer.start(prompts + [""] * spare, totals, seeds)
        for frames, valid in batch.chunks:
            answerer.read(videos, frames, valid)
        failed += [{"id": r.example.id, "error": r.error} for r in batch.rows if r.error]
        for name in videos.states:
            answers = answerer.answer(videos, name)
            for i, row in enumerate(batch.rows):
                if row.error is None:
                    line = prediction(row.example, answers[i])
                    predictions.append(line | usage(answerer, videos, name, i))
            seconds[name] += videos.seconds[name]
        bar.update(len(batch.rows))
    bar.close()
    return predictions, failed, seconds


def answer_video(
    config: ConfigDict, answerer: Answerer, video: str, questions: Sequence[str]
) -> list[dict]:
    """Several questions about one video, in one pass over it.

    Raises:
      DataError: if the video cannot be read to its end.
    """
    model_config = next(iter(answerer.models.values())).config
    chunk, size, count = config.eval.chunk, model_config.vision.image_size, len(questions)
    prompts = [config.data.prompt.format(question=question) for question in questions]
    row = open_one(config, video)
    videos = answerer.start(prompts, np.full(count, row.total), np.zeros(count, np.uint32))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        chunks = lock_step([row], pool, 1, chunk, size)
        total = -(-row.total // chunk)
        for frames, valid in tqdm(chunks, desc="watch", unit="chunk", total=total, disable=None):
            answerer.read(videos, frames, valid)
    if row.error:
        raise DataError(row.error)
    predictions = []
    for name in videos.states:
        answers = answerer.answer(videos, name)
        for i, question in enumerate(questions):
            line = prediction(dataclasses.replace(row.example, question=question), answers[i])
            predictions.append(line | usage(answerer, videos, name, i))
    return predictions


def open_one(config: ConfigDict, video: str) -> Row:
    """Opens a video file; decodes nothing yet.

    Raises:
      DataError: if it is none, or its end is seen to be missing.
    """
    size = config.model.vision.image_size
    example = Example(video, video, "", None, None, None)
    return open_video(example, size=size, chunk=config.eval.chunk, **reading(config))


def reading(config: ConfigDict) -> dict:
    """How videos are read, for ``adacm2_jax.video.frames.read_frames``."""
    return {
        "sampling": make_sampling(config.data.sampling),
        "resize": config.data.resize,
        "on_truncated": config.data.on_truncated,
        "on_warning": lambda line: print(f"warning: {line}", file=sys.stderr),
    }


def usage(answerer: Answerer, videos: Reading, name: str, row: int) -> dict:
    """What an answer rests on: the policy, frames seen, tokens kept and seen in a layer."""
    state = videos.states[name]
    frames = int(state.frames_seen[row])
    tokens = answerer.models[name].config.vision.tokens_per_frame
    return {
        "policy": name,
        "frames": frames,
        "kept_tokens": int(state.memory.length[..., row].max()),
        "total_tokens": frames * tokens,
    }


def prediction(example: Example, answers: Sequence[Answer]) -> dict:
    """A line of ``predictions.jsonl``, without what the policy adds."""
    line: dict = {
        "id": example.id,
        "video": example.video if isinstance(example.video, str) else None,
        "question": example.question,
        "prediction": answers[0].text,
        "score": answers[0].score,
    }
    if len(answers) > 1:
        line["n_best"] = [dataclasses.asdict(answer) for answer in answers]
    if example.answer is not None:
        line |= {"answer": example.answer, "correct": exact_match(answers[0].text, example.answer)}
    return line


def summarise(predictions: Sequence[dict], seconds: dict[str, float]) -> dict[str, dict]:
    """Accuracy (of the questions whose answer is known; None if it is of none) with its 95 %
    interval, tokens and seconds, by policy."""
    summary = {}
    for name in seconds:
        rows = [row for row in predictions if row["policy"] == name]
        marked = [row["correct"] for row in rows if "correct" in row]
        summary[name] = {
            "accuracy": sum(marked) / len(marked) if marked else None,
            "interval": list(wilson_interval(sum(marked), len(marked))),
            "questions": len(rows),
            "kept_tokens": max((row["kept_tokens"] for row in rows), default=0),
            "total_tokens": max((row["total_tokens"] for row in rows), default=0),
            "seconds": seconds[name],
        }
    return summary


def table(results: dict) -> str:
    """Results for a terminal."""
    lines = [
        f"{'policy':10} {'accuracy':>9} {'95 % interval':>17} {'questions':>10} {'tokens kept':>16}"
    ]
    for name, row in results["policies"].items():
        accuracy, interval = "-", "-"
        if row["accuracy"] is not None:
            accuracy = f"{row['accuracy']:.1%}"
            interval = "{:.1%} to {:.1%}".format(*row["interval"])
        kept = f"{row['kept_tokens']} of {row['total_tokens']}"
        lines.append(f"{name:10} {accuracy:>9} {interval:>17} {row['questions']:10} {kept:>16}")
    if results["failed"]:
        lines.append(f"{len(results['failed'])} video(s) could not be read:")
        lines += [f"  {row['id']}: {row['error']}" for row in results["failed"]]
    return "\n".join(lines)


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> None:
    """JSON lines, written beside and renamed."""
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


def main() -> int:
    args = flags.FLAGS
    workdir, config, video = app.directory("workdir", args.workdir), args.config, args.video
    # A run or a converted checkpoint; else a directory to be, whose model comes from init_from.
    known = not config.init_from or (pathlib.Path(workdir) / "config.json").exists()
    weights = workdir if known else config.init_from
    if is_base(weights):
        check_base(weights, check(config))
    else:
        check_same(read_config(weights), json.loads(config.to_json()), weights, FREE)
    output = pathlib.Path(app.directory("output", args.output or f"{workdir}/eval"))
    if bool(video) != bool(args.question):
        raise UserError("--video and --question go together: what is asked, and of which video")
    processor = Processor.load(weights, check(config))
    if not video:
        source = main_first(lambda: open_source(config.data, config.eval.split))
        check_questions(config, processor, source)
        results = evaluate(config, load_params(config, weights), processor, output)
        if is_main():
            print(table(results))
        return 1 if results["failed"] else 0
    processor.questions([config.data.prompt.format(question=text) for text in args.question])
    open_one(config, video)
    answerer = make_answerer(config, load_params(config, weights), processor)
    predictions = answer_video(config, answerer, video, args.question)
    if not is_main():
        return 0
    output.mkdir(parents=True, exist_ok=True)
    write_lines(output / "predictions.jsonl", predictions)
    for line in predictions:
        policy = f"[{line['policy']}] " if len(config.eval.policies) > 1 else ""
        print(f"{policy}{line['question']}  {line['prediction']}")
    return 0


def with_config(argv: Sequence[str]) -> list[str]:
    """Names the run's own experiment where the command does not name one."""
    if any(word.split("=")[0] in ("--config", "-config") for word in argv):
        return list(argv)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = app.directory("workdir", value if equals else following)
            read_config(workdir)  # says more clearly than ml_collections if there is none
            recipe = pathlib.Path(__file__).parent / "configs" / "run.py"
            # First, for ml_collections reads overrides by the configuration before them.
            return [argv[0], f"--config={recipe}:{workdir}", *argv[1:]]
    return list(argv)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "The run whose model answers.", required=True)
    flags.DEFINE_string("video", None, "A video file, instead of the experiment's split.")
    flags.DEFINE_multi_string("question", [], "About --video; may be given several times.")
    flags.DEFINE_string("output", None, "Where results are written; default: workdir/eval.")


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, (DataError,), with_config)
