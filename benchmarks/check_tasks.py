"""Every benchmark of configs/ in miniature: built, read back, one training step, one evaluation.

    make check-tasks
    python benchmarks/check_tasks.py msrvtt_qa multiple_choice    # some; the second needs the first

The annotations have their published forms, the videos last eight seconds, the model is the smallest
that has everything. Each is tried straight from its annotation and from the data set that
``data.benchmark.build`` makes of it; both must give the same predictions. Captions need Java.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from adacm2_jax.commands.train import train_and_evaluate
from adacm2_jax.runs.experiment import read
from adacm2_jax.tasks.task import find
from benchmarks._miniatures import MINIATURES, make_annotation, make_videos
from data.benchmark.build import build
from tests.small import get_config


def experiment(name: str, directories: str):
    """A configuration of the full size with the smallest model and one step."""
    first = MINIATURES[name][0]
    config = importlib.import_module(f"configs.{name}").get_config(f"weights,{first}{directories}")
    small = get_config()
    config.model = small.model
    # Tokenizers are learned from the texts: a longer prompt needs more places.
    config.model.max_text_len, config.model.llm.max_positions = 128, 256
    config.model.qformer.max_positions = 128
    config.init_from, config.init_missing = "", ()
    config.train.steps, config.train.batch_size, config.optim.warmup_steps = 1, 2, 1
    config.data.sampling.num_frames = config.train.num_frames = 4
    config.data.workers, config.eval.batch_size = 0, 2
    return read(config)


def check(name: str, root: Path) -> bool:
    """Both ways of one configuration."""
    annotation = root / name
    make_annotation(name, annotation)
    task = MINIATURES[name][0].rstrip(",") or name
    splits = find(task).splits
    built = build(task, str(annotation), str(root / "videos"), str(root / "built"), workers=1)
    if "train" not in splits:
        return check_evaluation(name, root, annotation, built)
    found = []
    for way, directories in (("direct", f"{annotation},{root / 'videos'}"), ("built", str(built))):
        workdir = root / f"run_{name}_{way}"
        results = train_and_evaluate(experiment(name, directories), workdir)
        lines = (workdir / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for row in rows:
            del row["video"]  # a path, or nothing
        found.append((results["scores"], rows))
    same = found[0] == found[1] and bool(found[0][1])
    print(f"{'holds' if same else 'FAILS'}  {name}: {len(found[0][1])} questions", flush=True)
    return same


def check_evaluation(name: str, root: Path, annotation: Path, built: Path) -> bool:
    """A benchmark without a training split: asked of a run of another one."""
    from adacm2_jax.commands.evaluate import evaluate, task_of
    from adacm2_jax.inference.processor import Processor
    from adacm2_jax.runs.load import load_params, make_answerer
    from data.sources import open_source

    run = root / "run_msrvtt_qa_direct"
    found = []
    for way, directories in (("direct", f"{annotation},{root / 'videos'}"), ("built", str(built))):
        config = experiment(name, directories)
        processor = Processor.load(run, config.model)
        answerer = make_answerer(config, load_params(config, run), processor)
        source = open_source(config.data, "test")
        output = root / f"run_{name}_{way}"
        results = evaluate(config, answerer, source, output, task_of(config))
        found.append(results["scores"])
    same = found[0] == found[1]
    print(f"{'holds' if same else 'FAILS'}  {name}", flush=True)
    return same


def main() -> int:
    names = sys.argv[1:] or list(MINIATURES)
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        make_videos(root / "videos")
        failed = [name for name in names if not check(name, root)]
    print(f"does not hold: {', '.join(failed)}" if failed else "every benchmark can be used")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
