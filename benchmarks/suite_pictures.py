"""What the memory held when an answer was right, and when one was wrong: a picture for each task.

    python benchmarks/suite_pictures.py [--workdir runs/suite] [--output docs/suite]

Takes the first model of ``make suite`` and its own test videos, reads them under ``adacm2`` at the
suite's number of tokens, and draws the first question that was answered right and the first that
was answered wrong, one above the other. Above each stand the frames that the question is about.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.files import beside_path  # noqa: E402
from adacm2_jax.inference.answerer import Answerer  # noqa: E402
from adacm2_jax.inference.evaluate import read_beside  # noqa: E402
from adacm2_jax.inference.picture import Counts, draw_memory  # noqa: E402
from adacm2_jax.inference.processor import Processor  # noqa: E402
from adacm2_jax.memory.policies import plan_for  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.grid import Memory, memories_of, overridden  # noqa: E402
from adacm2_jax.runs.load import experiment_of, load_params  # noqa: E402
from adacm2_jax.scoring.metrics import exact_match  # noqa: E402
from adacm2_jax.video.frames import read_clip  # noqa: E402
from adacm2_jax.video.sampling import Sampling  # noqa: E402
from benchmarks.suite import TOKENS  # noqa: E402
from data.sources import open_source  # noqa: E402

TASKS = ("needle", "order", "change", "two_questions", "late", "generic")
FRAMES, VIDEOS, CHUNK = 64, 60, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/suite")
    parser.add_argument("--seed", type=int, default=0, help="which model")
    parser.add_argument("--output", default="docs/suite")
    args = parser.parse_args()
    run, output = pathlib.Path(args.workdir) / str(args.seed) / "main", pathlib.Path(args.output)
    experiment = experiment_of(run)
    output.mkdir(parents=True, exist_ok=True)
    (memory,) = memories_of([Memory.parse("adacm2")], experiment, FRAMES, [TOKENS]).values()
    answerer = Answerer(
        experiment.model,
        load_params(experiment, run),
        Processor.load(run, experiment.model),
        {"adacm2": memory},
        experiment.generation,
    )
    for task in TASKS:
        fields = {"data.suite.tasks": (task,), "data.suite.test_size": VIDEOS}
        fields["data.data_dir"] = str(pathlib.Path(args.workdir) / "data")
        source = open_source(overridden(experiment, fields, FRAMES).data, "test")
        draw_both(answerer, source, output / f"{task}.png", task)


def draw_both(answerer: Answerer, source, path: pathlib.Path, task: str) -> None:
    """The first right and the first wrong answer of a task."""
    records = pathlib.Path(source.path).parent / "records.jsonl"
    about = {row["id"]: row["frames"] for row in map(json.loads, records.read_text().splitlines())}
    found: dict[bool, Image.Image] = {}
    for example in source:
        shown = "frames " + ", ".join(map(str, about[example.id]))
        right, picture = answered(answerer, example, shown, found)
        if picture is not None:
            found[right] = picture
        if len(found) == 2:
            break
    parts = [found[right] for right in (True, False) if right in found]
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    beside = beside_path(path)
    whole.quantize(128).save(beside, format="png", optimize=True)
    beside.replace(path)
    none = "" if False in found else f" (none of {len(source)} was answered wrong)"
    print(f"{path}: {task}{none}", flush=True)


def answered(answerer: Answerer, example, shown: str, found) -> tuple[bool, Image.Image | None]:
    """Whether one question is answered right; and its picture, unless there is one of that kind."""
    config = answerer.models["adacm2"].config
    vision = config.vision
    frames = read_clip(
        example.video, Sampling("uniform", num_frames=FRAMES), size=vision.image_size
    )
    before = None if read_beside(example) == example.question else [read_beside(example)]
    reading = answerer.start(
        [example.question], np.array([FRAMES]), np.zeros(1, np.uint32), before=before
    )
    for first in range(0, FRAMES, CHUNK):
        answerer.read(reading, frames[None, first : first + CHUNK], np.ones((1, CHUNK), bool))
    given = answerer.answer(reading, "adacm2")[0][0].text
    right = exact_match(given, example.answer)
    if right in found:
        return right, None
    kept = answerer.kept_patches(reading, "adacm2", 0)
    counts = Counts(
        seen=FRAMES * vision.tokens_per_frame,
        kept=max(len(pairs) for pairs in kept),
        bound=plan_for(config).capacity,
    )
    side = vision.image_size // vision.patch_size
    with tempfile.TemporaryDirectory() as place:
        path = pathlib.Path(place) / "memory.png"
        draw_memory(
            path,
            frames,
            kept,
            np.arange(FRAMES, dtype=float),
            f"{example.question} ({shown})",
            given,
            counts,
            (side, side),
            example.answer,
        )
        return right, Image.open(path).convert("RGB")


if __name__ == "__main__":
    app.guarded(main)
