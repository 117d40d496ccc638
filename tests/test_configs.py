"""Every file in configs/ can be loaded, fits its model, and runs where it is small."""

import importlib
import json
import math

import jax
import jax.numpy as jnp
import pytest

from adacm2_jax.config import DTYPES
from adacm2_jax.models.adacm2 import Question
from adacm2_jax.models.params import abstract_params, split_params
from adacm2_jax.runs.experiment import Experiment, read, to_dict
from adacm2_jax.sharding import make_mesh
from adacm2_jax.training.step import Batch, StepConfig, check_step, loss_fn
from configs.base import base_config
from data.training_set import clip_loader
from tests.small import ROOT, run_script, small_model

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
EXPERIMENTS = [name for name in NAMES if name not in ("base", "run")]


def test_every_experiment_says_how_it_is_run_and_what_to_expect():
    assert {"needle", "videos", "instructblip_vicuna_7b"} <= set(EXPERIMENTS)
    for name in EXPERIMENTS:
        text = importlib.import_module(f"configs.{name}").__doc__
        assert "COMMAND: python " in text, name
        script = "eval" if name == "multiple_choice" else "train"  # it has no training split
        assert f" python {script}.py --config configs/{name}.py" in text, name
        assert "Expected:" in text, name


@pytest.mark.parametrize("recipe", [*EXPERIMENTS, "needle:first", "lvu:weights,lvu_year,a,b"])
def test_an_experiment_loads_and_fits_its_model(recipe):
    name, *argument = recipe.split(":")
    config = importlib.import_module(f"configs.{name}").get_config(*argument).lock()
    experiment = read(config)
    experiment.check_training()
    clip_loader(experiment)
    groups = experiment.optim.groups
    abstract = abstract_params(experiment.model, groups, make_mesh((-1, 1)))
    learned, _ = split_params(abstract, groups)
    check_step(experiment.train.step, learned, experiment.train.num_frames)
    stored = json.loads(json.dumps(to_dict(experiment)))  # what config.json holds
    assert stored == to_dict(experiment) == json.loads(config.to_json())
    assert read(stored) == experiment


def test_a_short_task_of_lvu_warms_up_for_one_epoch_of_twenty():
    config = importlib.import_module("configs.lvu").get_config().lock()
    assert config.optim.warmup_steps == config.train.steps // 20 == 100
    config.train.steps = 93  # 298 windows, as relationship has
    assert json.loads(config.to_json())["optim"]["warmup_steps"] == 4


def test_every_default_is_within_its_own_bounds():
    assert read(base_config(small_model()).lock()) == Experiment(small_model())


def test_the_full_size_experiment_by_shapes():
    """The whole train loss is traced: 7.9 billion parameters of which 189 million learn."""
    from configs.instructblip_vicuna_7b import get_config

    config = get_config()
    model = read(config).model
    abstract = abstract_params(model, config.optim.groups, make_mesh((-1, 1)))
    learned, frozen = split_params(abstract, config.optim.groups)
    sizes = [sum(math.prod(leaf.shape) for leaf in part.values()) for part in (learned, frozen)]
    assert 185e6 < sizes[0] < 195e6 and 7.6e9 < sizes[1] < 7.8e9
    assert {leaf.dtype for leaf in learned.values()} == {jnp.dtype("float32")}
    kinds = {dtype: [n for n in frozen if frozen[n].dtype.name == dtype] for dtype in DTYPES}
    assert len(kinds["bfloat16"]) + len(kinds["float32"]) == len(frozen)
    assert all(name.endswith(("kernel", "token_embed")) for name in kinds["bfloat16"])
    assert sum(math.prod(frozen[name].shape) for name in kinds["float32"]) < sizes[1] / 1000

    rows, frames, size = 2, config.train.num_frames, model.vision.image_size
    length = model.max_text_len + model.max_answer_len

    def like(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    batch = Batch(
        like("uint8", frames, size, size, 3),
        like("bool", frames),
        like("uint32"),
        Question(
            like("int32", model.max_text_len),
            like("bool", model.max_text_len),
            like("int32", length),
            like("bool", length),
        ),
        like("bool", length),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    gradients, aux = jax.eval_shape(
        jax.grad(lambda *given: loss_fn(*given[:3], model, given[3], StepConfig()), has_aux=True),
        learned,
        frozen,
        batch,
        key,
    )
    assert aux.dtype == jnp.float32
    for name, leaf in learned.items():
        assert (gradients[name].shape, gradients[name].dtype) == (leaf.shape, jnp.float32), name


def test_the_needle_experiment_takes_a_step(compiled_once, data_dir, tmp_path):
    status = run_script(
        "train.py",
        "--config=configs/needle.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.init_from=",
        f"--config.data.data_dir={data_dir}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.data.needle.train_size=48",
        "--config.data.needle.test_size=12",
        "--config.train.steps=1",
        "--config.train.batch_size=2",
        "--config.eval.batch_size=2",
        "--config.eval.limit=2",
    )
    assert status == 0
    assert (tmp_path / "run" / "metrics.json").exists()
