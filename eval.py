"""Answers questions about videos: a whole split, or one video.

    python eval.py --workdir runs/quickstart
    python eval.py --workdir runs/quickstart --video clip.mp4 --question "which digit …?"

Writes ``predictions.jsonl`` and ``metrics.json``. The experiment is that of the run; fields are
overridden as in training, for example ``--config.model.memory.recent_ratio=0.2``.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from adacm2_jax import app
from adacm2_jax.answer import Answer, Answerer, Session
from adacm2_jax.checkpoint import check_same, read_config, restore_params, write_json
from adacm2_jax.config import AdaCM2Config, MemoryConfig, from_dict
from adacm2_jax.errors import UserError
from adacm2_jax.generate import GenerationConfig
from adacm2_jax.metrics import exact_match, wilson_interval
from adacm2_jax.models.adacm2 import init_params, plan_for
from adacm2_jax.processor import Processor
from adacm2_jax.sharding import make_mesh, param_shardings
from data.errors import DataError
from data.jsonl import Example
from data.sources import open_source
from data.stream import lock_step, open_video, video_batches
from data.video import Sampling

#: Fields of an experiment that evaluation may change.
FREE = (
    "model.memory.",
    "model.dtype",
    "data.",
    "eval.",
    "generation.",
    "mesh",
    "train.",
    "init_from",
)


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
    frames = config.eval.full_frames or config.data.sampling.num_frames
    memories = {}
    for policy in config.eval.policies:
        options = {"policy": policy} | ({"max_frames": frames} if policy == "full" else {})
        memory = dataclasses.replace(model_config.memory, **options)
        plan_for(dataclasses.replace(model_config, memory=memory))  # refuses r = 1 here
        memories[policy] = memory
    return memories


def make_answerer(config: ConfigDict, params: dict, processor: Processor) -> Answerer:
    """The model of an experiment, ready to answer."""
    model_config = from_dict(config.model.to_dict())
    generation = GenerationConfig(**config.generation)
    memories = make_memories(config, model_config)
    return Answerer(model_config, params, processor, memories, generation, config.seed)


def load_params(config: ConfigDict, workdir: str) -> dict:
    """A run's parameters alone, on whatever devices this process has."""
    model_config = from_dict(config.model.to_dict())
    boxed = jax.eval_shape(lambda key: init_params(model_config, key), jax.random.key(0))
    shardings = param_shardings(boxed, make_mesh(tuple(config.mesh)))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )
    return restore_params(workdir, abstract)


def evaluate(config: ConfigDict, params: dict, processor: Processor, output: pathlib.Path) -> dict:
    """Answers a split under every policy and writes ``predictions.jsonl`` and ``metrics.json``.

    Videos that cannot be read are listed under ``failed``; all others are answered.

    Returns:
      What ``metrics.json`` holds.
    """
    source = open_source(config.data, config.eval.split)
    limit = config.eval.limit or len(source)
    answerer = make_answerer(config, params, processor)
    predictions, failed, seconds = answer_split(config, answerer, itertools.islice(source, limit))
    results = {"policies": summarise(predictions, seconds), "failed": failed}
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
    bar = tqdm(desc="evaluate", unit="video", disable=None)
    for batch in batches:
        spare = rows - len(batch.rows)  # a short last batch is filled up with empty rows
        prompts = [config.data.prompt.format(question=row.example.question) for row in batch.rows]
        totals = np.array([row.total for row in batch.rows] + [1] * spare)
        seeds = np.array([row.number for row in batch.rows] + [0] * spare)
        session = answerer.start(prompts + [""] * spare, totals, seeds)
        for frames, valid in batch.chunks:
            answerer.observe(session, frames, valid)
        failed += [{"id": r.example.id, "error": r.error} for r in batch.rows if r.error]
        for name in session.states:
            answers = answerer.answer(session, name)
            for i, row in enumerate(batch.rows):
                if row.error is None:
                    line = prediction(row.example, answers[i])
                    predictions.append(line | usage(answerer, session, name, i))
            seconds[name] += session.seconds[name]
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
    example = Example(video, video, "", None, None, None)
    row = open_video(example, size=size, chunk=chunk, **reading(config))
    session = answerer.start(prompts, np.full(count, row.total), np.zeros(count, np.uint32))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        chunks = lock_step([row], pool, 1, chunk, size)
        total = -(-row.total // chunk)
        for frames, valid in tqdm(chunks, desc="watch", unit="chunk", total=total, disable=None):
            answerer.observe(session, frames, valid)
    if row.error:
        raise DataError(row.error)
    predictions = []
    for name in session.states:
        answers = answerer.answer(session, name)
        for i, question in enumerate(questions):
            line = prediction(dataclasses.replace(example, question=question), answers[i])
            predictions.append(line | usage(answerer, session, name, i))
    return predictions


def reading(config: ConfigDict) -> dict:
    """How videos are read, for ``data.video.read_frames``."""
    return {
        "sampling": make_sampling(config.data.sampling),
        "on_truncated": config.data.on_truncated,
        "on_warning": lambda line: print(f"warning: {line}", file=sys.stderr),
    }


def usage(answerer: Answerer, session: Session, name: str, row: int) -> dict:
    """What an answer rests on: the policy, frames seen, tokens kept and seen in a layer."""
    state = session.states[name]
    frames = int(state.frames_seen[row])
    tokens = answerer.models[name].config.vision.tokens_per_frame
    return {
        "policy": name,
        "frames": frames,
        "kept_tokens": int(state.memory.length[:, row].max()),
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
    """Accuracy with its 95 % interval, tokens and seconds, by policy."""
    summary = {}
    for name in seconds:
        rows = [row for row in predictions if row["policy"] == name]
        correct, total = sum(row.get("correct", False) for row in rows), len(rows)
        low, high = wilson_interval(correct, total)
        summary[name] = {
            "accuracy": correct / max(total, 1),
            "interval": [low, high],
            "questions": total,
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
        interval = "{:.1%} to {:.1%}".format(*row["interval"])
        kept = f"{row['kept_tokens']} of {row['total_tokens']}"
        lines.append(
            f"{name:10} {row['accuracy']:9.1%} {interval:>17} {row['questions']:10} {kept:>16}"
        )
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
    workdir, config, video = args.workdir, args.config, args.video
    check_same(read_config(workdir), json.loads(config.to_json()), workdir, FREE)
    output = pathlib.Path(args.output or pathlib.Path(workdir) / "eval")
    if bool(video) != bool(args.question):
        raise UserError("--video and --question go together: what is asked, and of which video")
    if video and not pathlib.Path(video).is_file():
        raise UserError(f"--video {video}: no such file")
    model_config = from_dict(config.model.to_dict())
    make_memories(config, model_config)
    processor = Processor.load(workdir, model_config)
    params = load_params(config, workdir)
    if not video:
        results = evaluate(config, params, processor, output)
        print(table(results))
        return 1 if results["failed"] else 0
    answerer = make_answerer(config, params, processor)
    predictions = answer_video(config, answerer, video, args.question)
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
            recipe = pathlib.Path(__file__).parent / "configs" / "run.py"
            return [*argv, f"--config={recipe}:{value if equals else following}"]
    return list(argv)


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "The run whose model answers.", required=True)
    flags.DEFINE_string("video", None, "A video file, instead of the experiment's split.")
    flags.DEFINE_multi_string("question", [], "About --video; may be given several times.")
    flags.DEFINE_string("output", None, "Where results are written; default: workdir/eval.")


if __name__ == "__main__":
    define_flags()
    app.run(main, with_config(sys.argv), (DataError,))
