"""Does memory stay constant however long the video is? Exits with 1 if it does not.

    python benchmarks/check_memory.py

Generates a two-minute and a two-hour video (320 × 240, 5 frames a second, H.264), asks the tiny
model one question about each, sampled at one frame a second, through ``eval.py`` in a process of
its own, and compares the peaks of resident memory. They must lie within 10 % of each other; a
question asked beforehand has compiled the programs, which takes more memory than answering. Then
compares what XLA's compiler reports for the streaming step of videos of 16 and of 4,096 frames.
The weights are those of a run of two steps: what the model answers does not matter here.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from fractions import Fraction

import av
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.config import tiny  # noqa: E402
from adacm2_jax.models.adacm2 import AdaCM2, Question, init_params, init_state  # noqa: E402

LENGTHS = {"two minutes": 120, "two hours": 7200}
FPS = 5
QUESTION = "which digit was on the red ground?"


def main() -> int:
    results: dict = {"answering": {}, "step": {}}
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(scratch / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        train_two_steps(scratch)
        videos = {name: make_video(scratch / f"{s}.mp4", s) for name, s in LENGTHS.items()}
        answer(scratch, next(iter(videos.values())))
        for name, video in videos.items():
            results["answering"][name] = answer(scratch, video)
    for frames in (16, 4096):
        results["step"][f"{frames} frames"] = compiled_step(frames)
    print(json.dumps(results, indent=2))
    short, long = (row["peak_mb"] for row in results["answering"].values())
    first, second = results["step"].values()
    constant = abs(long / short - 1) <= 0.1 and first == second
    print(f"peak resident memory, two hours / two minutes: {long / short:.3f}")
    print(f"the compiled step's memory is {'identical' if first == second else 'DIFFERENT'}")
    return 0 if constant else 1


def train_two_steps(scratch: pathlib.Path) -> None:
    overrides = {
        "data.data_dir": scratch / "data",
        "data.cache_dir": scratch / "cache",
        "data.needle.train_size": 64,
        "data.needle.test_size": 1,
        "train.steps": 2,
        "init_from": "",  # what it answers does not count
    }
    run("train.py", "--config", "configs/needle.py:first", "--workdir", scratch / "run", overrides)


def make_video(path: pathlib.Path, seconds: int) -> pathlib.Path:
    """A pattern that moves, with a new random tint every frame."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(320), np.arange(240))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "50"}
        for number in range(seconds * FPS):
            waves = ((x + 3 * number) ^ (y + number)) & 127
            picture = (waves[..., None] + rng.integers(0, 128, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def answer(scratch: pathlib.Path, video: pathlib.Path) -> dict:
    overrides = {"data.sampling.mode": "fps", "data.sampling.fps": 1.0}
    start = time.perf_counter()
    peak = run(
        "eval.py", "--workdir", scratch / "run", "--video", video, "--question", QUESTION,
        "--output", scratch / "answer", "--config.eval.policies=('adacm2',)", overrides,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    line = json.loads((scratch / "answer" / "predictions.jsonl").read_text())
    used = {name: line[name] for name in ("frames", "kept_tokens", "total_tokens")}
    return used | {"seconds": round(seconds, 1), "peak_mb": peak}


def run(*words) -> float:
    """Runs a script of the project; returns its peak resident memory in megabytes."""
    *words, overrides = words
    command = [sys.executable, *map(str, words)]
    command += [f"--config.{name}={value}" for name, value in overrides.items()]
    # A shell between would be counted too; wait4 gives this child's own peak.
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed")
    return round(usage.ru_maxrss / 1024, 1)


def compiled_step(frames: int) -> dict:
    """The compiler's figures for the streaming step of a video of ``frames`` frames, in bytes."""
    config = tiny()
    model = AdaCM2(config)
    params = nn.unbox(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))
    ids = jnp.zeros((1, config.max_text_len), jnp.int32)
    mask = jnp.ones(ids.shape, bool)
    state = init_state(config, jnp.array([frames]))
    features = jnp.zeros((1, 16, config.vision.tokens_per_frame, config.vision.width))

    def step(params, features, state):
        valid = jnp.ones((1, 16), bool)
        question = Question(qformer_ids=ids, qformer_mask=mask, llm_ids=ids, llm_mask=mask)
        return model.apply({"params": params}, features, valid, question, state, method="read")

    compiled = jax.jit(step, donate_argnums=2).lower(params, features, state).compile()
    report = compiled.memory_analysis()
    sizes = ("argument", "output", "alias", "temp")
    return {name: getattr(report, f"{name}_size_in_bytes") for name in sizes}


if __name__ == "__main__":
    sys.exit(main())
