"""What can be found of a video by a question that comes after it? ``make late-questions``.

    python benchmarks/late_questions.py [--model runs/quickstart/main] [--questions 600] [--seed 0]

The needle task (one frame of a video has the ground of a colour, and which digit was on it is
asked) with the question after the last frame, for videos of 16, 64 and 256 frames. Many videos are
rows of one session state and pass through the sessions' own compiled steps. Whatever keeps tokens
without a question keeps the same number of them: the open memory of sessions, ``recent``,
``random`` and ``uniform``. Beside them stand the same questions known before the first frame, with
a memory of that size chosen by their attention (``adacm2``).

The videos are H.264 files of held-out digits, read as ``Session.push`` reads a file. They begin
behind those of the quickstart, on which the open memory was designed. Each is encoded by the ViT
once. What was answered is kept in ``.cache/late_questions`` after every batch, and a run that was
stopped goes on there. Writes ``late_questions.json``, ``late_questions.md`` and
``late_questions.png`` to docs/. Ends with 1 if the open memory does not answer 80 % of the
questions at 64 frames with a sixteenth of the tokens, ahead of the others by more than both
intervals.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.config import AdaCM2Config, MemoryConfig, to_dict  # noqa: E402
from adacm2_jax.files import write_json, write_text  # noqa: E402
from adacm2_jax.inference import session_steps, steps  # noqa: E402
from adacm2_jax.inference.encoder import fingerprint  # noqa: E402
from adacm2_jax.inference.processor import Processor  # noqa: E402
from adacm2_jax.inference.session import open_memory  # noqa: E402
from adacm2_jax.inference.session_steps import SessionModels, SessionState  # noqa: E402
from adacm2_jax.memory.policies import share_for  # noqa: E402
from adacm2_jax.models.adacm2 import AdaCM2, Question  # noqa: E402
from adacm2_jax.progress import Progress  # noqa: E402
from adacm2_jax.runs.experiment import Experiment  # noqa: E402
from adacm2_jax.runs.load import experiment_of, load_params  # noqa: E402
from adacm2_jax.video.sampling import ONE_A_SECOND  # noqa: E402
from adacm2_jax.video.stream import VideoFile, lock_step, open_video  # noqa: E402
from benchmarks._late_report import (  # noqa: E402
    GOAL,
    KNOWN,
    LATE,
    Cell,
    draw,
    goal_holds,
    page,
    summarise,
    table,
)
from data.needle.builder import make_record  # noqa: E402

#: Frames of a video → tokens that a layer keeps, in frames: at most a sixteenth of all.
SIZES = {16: (1,), 64: (2, 4), 256: (2, 16)}
#: Of the newest tokens, for a question that is known: as in the quickstart.
RECENT = Fraction(1, 20)
#: Videos of one number and length are the same everywhere; the quickstart's are the first 300.
FIRST, EACH_SEED = 1000, 100_000
ROWS = 50


def cells_of(frames: int, tokens_per_frame: int, sizes: Sequence[int]) -> list[Cell]:
    return [Cell(policy, n * tokens_per_frame) for n in sizes for policy in (*LATE, KNOWN)]


@functools.cache
def memory_of(cell: Cell, tokens_per_frame: int) -> MemoryConfig:
    if cell.policy == "open":
        return open_memory(cell.tokens)
    known = cell.policy == KNOWN
    recent = RECENT if known else Fraction(0)
    return MemoryConfig(
        policy="adacm2" if known else cell.policy,
        recent_ratio=str(float(recent)),
        conserve_ratio=share_for(cell.tokens, tokens_per_frame, recent),
    )


class Model:
    """A trained model, with what it reads and answers questions with."""

    def __init__(self, directory: str):
        self.experiment: Experiment = experiment_of(directory)
        self.config: AdaCM2Config = self.experiment.model
        self.params = load_params(self.experiment, directory)
        self.processor = Processor.load(pathlib.Path(directory), self.config)
        self.tokens_per_frame = self.config.vision.tokens_per_frame

    def question(self, texts: Sequence[str]) -> Question:
        prompts = [self.experiment.data.ask(text) if text else "" for text in texts]
        return self.processor.questions(prompts, self.config.max_text_len)

    def remembering(self, memory: MemoryConfig) -> AdaCM2:
        return AdaCM2(dataclasses.replace(self.config, memory=memory))

    def session_models(self, cell: Cell) -> SessionModels:
        """Of sessions with the memory of a late cell as the open one; the known questions of all
        have that of the known cell."""
        known = memory_of(Cell(KNOWN, cell.tokens), self.tokens_per_frame)
        late = memory_of(cell, self.tokens_per_frame)
        return SessionModels(self.remembering(known), self.remembering(late))

    def answer(self, queries: jax.Array, asked: Question) -> list[str]:
        options = dataclasses.replace(
            self.experiment.generation,
            eos_ids=(self.processor.eos_id,),
            pad_id=self.processor.pad_id,
        )
        rows = np.zeros(len(queries), np.int32)
        model, rng = steps.any_policy(self.config), jax.random.key(0)
        found = steps.answer(model, self.params, queries, asked, options, rng, rows)
        return [self.processor.decode(ids) for ids in np.asarray(found.ids)[:, 0]]


def answer_batch(
    model: Model, cells: Sequence[Cell], frames: int, numbers: Sequence[int], folder: pathlib.Path
) -> list[dict]:
    """Reads videos into all memories and asks about each: a line a video.

    A line says which video it was, where its needle is, what the answer is, and for each cell what
    was ``given`` and the tokens ``kept``.
    """
    records = [make_record("test", frames, number) for number in numbers]
    asked = model.question([record["question"] for record in records])
    nobody = model.question([""] * len(records))
    # The questions are known to the sessions that have the open memory, to no other.
    late = {cell: cell.policy == "open" for cell in cells if cell.policy != KNOWN}
    states = {cell: begin(model, cell, numbers, int(known)) for cell, known in late.items()}
    for pixels, valid in read_files(model, [record["video"] for record in records], folder):
        features = steps.encode(steps.any_policy(model.config), model.params, pixels)
        for cell, known in late.items():
            models, question = model.session_models(cell), asked if known else None
            states[cell] = session_steps.push(
                models, model.params, states[cell], features, valid, question, nobody
            )
        jax.block_until_ready(states)
    lines = [
        {
            "frames": frames,
            "number": number,
            "needle": int(record["start"]),
            "question": record["question"],
            "answer": record["answer"],
            "given": {},
            "kept": {},
        }
        for number, record in zip(numbers, records, strict=True)
    ]
    for cell in cells:
        known = cell.policy == KNOWN
        session = Cell("open", cell.tokens) if known else cell
        state, models = states[session], model.session_models(session)
        if not (np.asarray(state.seen) == frames).all():
            raise AssertionError(f"{frames} frames were to be read, not {state.seen}")
        ask = session_steps.ask_known if known else session_steps.ask_late
        answers = model.answer(ask(models, model.params, state, asked), asked)
        memory = (state.known if known else state.open).memory
        for line, given, kept in zip(lines, answers, memory.tokens_kept, strict=True):
            line["given"][cell.key], line["kept"][cell.key] = given, int(kept)
    return lines


def begin(model: Model, cell: Cell, numbers: Sequence[int], known: int) -> SessionState:
    """The videos' states before the first frame, each with a seed of its own."""
    state = session_steps.begin(model.session_models(cell), len(numbers), known)
    return state.replace(open=state.open.replace(seed=jnp.array(numbers, jnp.uint32)))


def read_files(
    model: Model, videos: Sequence[bytes], folder: pathlib.Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of the videos side by side, decoded from files at one frame a second."""
    data, size = model.experiment.data, model.config.vision.image_size
    chunk = model.experiment.eval.chunk
    rows = []
    for place, video in enumerate(videos):
        path = folder / f"{place}.mp4"
        path.write_bytes(video)
        file = VideoFile(str(path), None, None)
        options = dict(sampling=ONE_A_SECOND, resize=data.resize, on_truncated="error")
        rows.append(open_video(file, size=size, chunk=chunk, on_warning=print, **options))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield from lock_step(rows, pool, len(rows), chunk, size)
    if any(row.error for row in rows):
        raise AssertionError([row.error for row in rows if row.error])


# --- What is kept between runs -------------------------------------------------------------------


def read_lines(path: pathlib.Path) -> list[dict]:
    """What an earlier run has answered; a line that it could not end does not count."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def lines_of(
    model: Model, frames: int, cells: Sequence[Cell], questions: int, seed: int, cache: pathlib.Path
) -> list[dict]:
    """Of all questions about videos of one length; those that are missing are asked now."""
    memories = {cell.key: to_dict(memory_of(cell, model.tokens_per_frame)) for cell in cells}
    about = [fingerprint(model.params), to_dict(model.config), memories]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"t{frames}-seed{seed}-{digest}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = read_lines(path)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    first = FIRST + EACH_SEED * seed
    with (
        tempfile.TemporaryDirectory() as folder,
        path.open("a") as file,
        Progress(
            f"videos of {frames} frames",
            questions,
            initial=min(len(lines), questions),
            unit="videos",
        ) as progress,
    ):
        while len(lines) < questions:
            numbers = range(first + len(lines), first + min(len(lines) + ROWS, questions))
            batch = answer_batch(model, cells, frames, numbers, pathlib.Path(folder))
            file.write("".join(json.dumps(line) + "\n" for line in batch))
            file.flush()
            lines += batch
            progress.update(len(batch))
    return lines[:questions]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/quickstart/main", help="of `make quickstart`")
    parser.add_argument("--questions", type=int, default=600, help="a cell")
    parser.add_argument("--seed", type=int, default=0, help="other videos")
    parser.add_argument(
        "--lengths", type=int, nargs="+", choices=SIZES, default=list(SIZES), help="of the videos"
    )
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / ".cache" / "late_questions")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs")
    options = parser.parse_args(argv)
    model = Model(options.model)
    rows: list[dict[str, Any]] = []
    for frames in options.lengths:
        cells = cells_of(frames, model.tokens_per_frame, SIZES[frames])
        lines = lines_of(model, frames, cells, options.questions, options.seed, options.cache)
        rows += summarise(lines, cells, model.tokens_per_frame)
    first = FIRST + EACH_SEED * options.seed
    results = {
        "model": fingerprint(model.params),
        "seed": options.seed,
        "questions": options.questions,
        "videos": [first, first + options.questions - 1],
        "goal": goal_holds(rows),
        "cells": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "late_questions.json", results)
    write_text(options.output / "late_questions.md", page(results))
    draw(rows, options.output / "late_questions.png")
    print(table(rows))
    print(f"{GOAL:.0%} at 64 frames, ahead of the others: {results['goal']}")
    return 0 if results["goal"] else 1


if __name__ == "__main__":
    sys.exit(main())
