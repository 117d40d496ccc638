"""Training curves on several meshes, in one process of a job.

    python -m tests.distributed.curves JSON

which tells where results go, who the processes are, and a list of jobs (arguments of
:func:`train`). All start from the same parameters and read the same clips in the same order.
"""

import dataclasses
import json
import pathlib
import sys

import grain
import jax
import numpy as np

from adacm2_jax import distributed
from adacm2_jax.config import AdaCM2Config
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.models.params import abstract_params, fresh_params, join_params, split_params
from adacm2_jax.runs.checkpoint import Checkpoints, restore_params
from adacm2_jax.sharding import data_share, make_mesh, shard_batch
from adacm2_jax.training.optim import make_optimizer
from adacm2_jax.training.step import Batch, StepConfig, init_train_state, make_train_step
from data.pipeline import training_batches
from tests.small import small_model

STEPS, ROWS, FRAMES, EXAMPLES = 50, 8, 3, 27
GROUPS = (("vision/.*", None), (".*", 1.0))


def model_config() -> AdaCM2Config:
    """The small model, without dropout and with as many heads as (2, 4) divides."""
    small = small_model()
    return dataclasses.replace(
        small,
        qformer=dataclasses.replace(small.qformer, dropout=0.0),
        llm=dataclasses.replace(small.llm, num_heads=4, num_kv_heads=4),
    )


def example(number: int, _: np.random.Generator) -> dict:
    """A clip with its texts in ids, made from its number."""
    config, rng = model_config(), np.random.default_rng(number)
    size, length = config.vision.image_size, config.max_text_len + config.max_answer_len
    place = np.arange(length)
    # Answers of one to three tokens: the mean over a batch is not that of its devices' means.
    end = rng.integers(10, 13)
    return {
        "frames": rng.integers(0, 255, (FRAMES, size, size, 3), dtype=np.uint8),
        "valid": np.arange(FRAMES) < rng.integers(1, FRAMES + 1),
        "index": np.uint32(number),
        "qformer": rng.integers(5, 150, config.max_text_len, dtype=np.int32),
        "qformer_valid": np.arange(config.max_text_len) < rng.integers(2, 20),
        "llm": rng.integers(5, 300, length, dtype=np.int32),
        "llm_valid": place < end,
        "targets": (place >= 9) & (place < end),
        "question": "",
        "answer": "",
    }


def make_batch(rows: dict) -> Batch:
    question = Question(*(rows[k] for k in ("qformer", "qformer_valid", "llm", "llm_valid")))
    return Batch(rows["frames"], rows["valid"], rows["index"], question, rows["targets"])


def train(
    start: str,
    shape: tuple[int, int],
    save: str = "",
    load: str = "",
    ulp: bool = False,
    interleaved: bool = False,
) -> list[float]:
    """The losses of all steps.

    Args:
      start: a run that holds the parameters before the first step.
      shape: of the mesh; (1, 1) is one device, however many there are.
      save: a directory where the state after half of the steps is saved.
      load: one of those, to go on from.
      ulp: changes every parameter that learns by one unit in the last place, up or down.
      interleaved: lays the first data shard on the first process, the second on the second, and so
        on, as on a torus, where the shards of a process are no neighbours.
    """
    mesh = make_mesh(tuple(shape), jax.devices()[:1] if tuple(shape) == (1, 1) else None)
    if interleaved:
        halves = np.stack(np.split(mesh.devices, 2), axis=1).reshape(mesh.devices.shape)
        mesh = jax.sharding.Mesh(halves, mesh.axis_names, axis_types=mesh.axis_types)
    distributed.connect(mesh)
    abstract = abstract_params(model_config(), GROUPS, mesh)
    learned, frozen = split_params(join_params(restore_params(start, abstract), {}), GROUPS)
    if ulp:
        signs = np.random.default_rng(0).choice([-1, 1], len(learned))
        changed = zip(learned.items(), signs, strict=True)
        learned = {path: leaf * np.float32(1 + s * 2.0**-23) for (path, leaf), s in changed}
    state, rule = make_state(learned, frozen, mesh)
    rank, world = data_share(mesh)
    clips = grain.MapDataset.source(range(EXAMPLES)).seed(0).random_map(example)
    batches = training_batches(clips, batch_size=ROWS, seed=1, rank=rank, world=world)
    if load:
        checkpoints = Checkpoints(load)
        state, place = checkpoints.restore(state)
        batches.seek(place["examples"])
        checkpoints.close()
    step, losses = make_train_step(model_config(), rule, 0, state, StepConfig(chunk=2)), []
    for number in range(int(state.step) + 1, STEPS + 1):
        with jax.set_mesh(mesh):
            state, metrics = step(state, shard_batch(make_batch(next(batches)), mesh))
        losses.append(float(metrics["loss"]))
        if save and number == STEPS // 2:
            save_run(save, state, batches.examples)
    batches.close()
    return losses


def make_state(learned: dict, frozen: dict, mesh: jax.sharding.Mesh):
    """The state before the first step, and its optimiser."""
    options = dict(groups=GROUPS, learning_rate=1e-3, warmup_steps=5, weight_decay=0.05)
    rule, _ = make_optimizer(learned, steps=STEPS, b1=0.9, b2=0.999, clip_norm=1.0, **options)
    return init_train_state(learned, frozen, rule, mesh), rule


def save_run(directory: str, state, examples: int) -> None:
    checkpoints = Checkpoints(directory)
    checkpoints.save_frozen(state.frozen)
    checkpoints.save(state, {"examples": examples})
    checkpoints.close()


def make_start(directory: str) -> None:
    """A run that holds fresh parameters, made on one device."""
    mesh = make_mesh((1, 1), jax.devices()[:1])
    abstract = abstract_params(model_config(), GROUPS, mesh)
    params = join_params(fresh_params(model_config(), abstract, 0), {})
    save_run(directory, make_state(*split_params(params, GROUPS), mesh)[0], 0)


def main() -> None:
    task = json.loads(sys.argv[1])
    if task["processes"] > 1:
        names = ("coordinator", "processes", "process")
        distributed.initialize(False, *(task[name] for name in names), timeout=120)
    if task.get("make_start"):
        make_start(task["start"])
    curves = [train(task["start"], **job) for job in task["jobs"]]
    if distributed.is_main():
        pathlib.Path(task["out"]).write_text(json.dumps(curves))
    distributed.wait_for_all()


if __name__ == "__main__":
    main()
