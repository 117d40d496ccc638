"""The smallest experiment that has everything: a model that compiles in seconds, a hundred videos.

Test modules run it in their own process with ``run_script``; commands take it as
``--config=tests/small.py``.
"""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
import pytest
from absl import flags

from adacm2_jax.commands import __main__ as adacm2
from adacm2_jax.config import (
    AdaCM2Config,
    LlamaConfig,
    MemoryConfig,
    QFormerConfig,
    VisionConfig,
    from_dict,
)
from adacm2_jax.models.params import abstract_params, join_params, split_params
from adacm2_jax.runs.checkpoint import restore_params
from adacm2_jax.runs.experiment import Experiment, read
from adacm2_jax.sharding import make_mesh
from configs.base import base_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTION = "which digit was on the red ground?"
STEPS = 9
#: Flags of all scripts, which define them anew each time.
SCRIPT_FLAGS = (
    "config workdir profile video question output debug "
    "split dtype shards rows runner beam "
    "distributed coordinator num_processes process_id join_timeout"
).split()


def small_model(**overrides) -> AdaCM2Config:
    """Five tokens a frame, one layer of each kind."""
    sizes = dict(
        vision=VisionConfig(image_size=28, width=16, depth=1, num_heads=2, mlp_width=32),
        qformer=QFormerConfig(
            vocab_size=160,
            width=16,
            depth=2,
            num_heads=2,
            mlp_width=32,
            num_queries=2,
            max_positions=32,
            dropout=0.1,
        ),
        llm=LlamaConfig(
            vocab_size=320,
            width=16,
            depth=1,
            num_heads=2,
            num_kv_heads=1,
            mlp_width=32,
            max_positions=64,
        ),
        memory=MemoryConfig(recent_ratio="0.3", conserve_ratio="0.5"),
        max_text_len=24,
        max_answer_len=4,
        remat=False,
    )
    return AdaCM2Config(**(sizes | overrides))


def get_config(_: str = "") -> ml_collections.ConfigDict:
    """Trains for nine steps on 48 videos of four frames."""
    config = base_config(small_model())
    config.data.source = "needle"
    config.data.needle.train_size, config.data.needle.test_size = 48, 12
    config.data.sampling.num_frames = config.train.num_frames = 4
    config.data.jitter = True
    config.train.steps, config.train.batch_size, config.train.log_every = STEPS, 8, 1
    config.optim.learning_rate, config.optim.warmup_steps = 3e-3, 2
    config.optim.groups = (("vision/.*", None), (".*", 1.0))
    config.checkpoint.every = 3
    config.eval.batch_size, config.eval.chunk = 5, 3
    config.generation.max_new_tokens = 3
    return config


def small_experiment(**overrides) -> Experiment:
    """The same, typed; ``train__steps=2`` sets ``train.steps``."""
    config = get_config()
    for name, value in overrides.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return read(config)


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiles five times faster, for code that runs a few steps."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def run_script(script: str, *arguments: object) -> int:
    """Runs ``train.py`` or ``eval.py``, or a command of ``adacm2`` by its name, in this process;
    returns its exit status."""
    argv, interrupted = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [script, *map(str, arguments)]
    try:
        with quick_compilation():
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                adacm2.main(["adacm2", *sys.argv])
    except SystemExit as done:
        return done.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, interrupted)
        for name in list(flags.FLAGS):
            if name.split(".")[0] in SCRIPT_FLAGS:
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    raise AssertionError(f"{script} did not exit")


def process_environment() -> dict[str, str]:
    """For commands in processes of their own: they compute exactly what ``run_script`` does."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def run_process(*arguments: object) -> subprocess.CompletedProcess:
    """Runs ``python …`` in the repository to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=process_environment(),
        text=True,
        capture_output=True,
        timeout=300,
    )


def error_line(captured: pytest.CaptureFixture | str) -> str:
    """The one line that a failed command must end with; fails on a traceback."""
    text = captured if isinstance(captured, str) else captured.readouterr().err
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


def arguments(workdir, data_dir, **values) -> list[str]:
    """Of ``train.py`` on this experiment; ``train__steps=2`` sets ``train.steps``."""
    given = [f"--config.{name.replace('__', '.')}={value}" for name, value in values.items()]
    return [
        "--config=tests/small.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        *given,
    ]


def rows_of(workdir) -> list[dict]:
    """What a run has logged."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def learned_of(workdir) -> dict:
    """All parameters of a run's newest step by path, as if all learned."""
    config = get_config()
    abstract = abstract_params(
        from_dict(config.model.to_dict()), config.optim.groups, make_mesh((-1, 1))
    )
    params = join_params(restore_params(workdir, abstract), {})
    return {
        name: np.asarray(leaf) for name, leaf in split_params(params, ((".*", 1.0),))[0].items()
    }
