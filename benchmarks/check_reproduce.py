"""Runs every command of docs/reproduce.md, in its order, on a miniature with a tiny model.

    make check-reproduce

The commands are read from the page. They run in a directory that holds what the page says one has:
an InstructBLIP checkpoint in Hugging Face's form (random weights, a few layers), LVU's and
Video-MME's annotations in their published forms, videos of eight seconds. Where a command names a
configuration, the sizes of the miniature are added, and nothing else.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adacm2_jax.config import AdaCM2Config
from benchmarks._miniatures import make_annotation, make_videos
from benchmarks._server import ROOT
from tests.parity import checkpoints

PAGE = ROOT / "docs" / "reproduce.md"
SMALL = checkpoints.config()
#: A question with its choices is long in a vocabulary of 330 pieces.
MODEL = dataclasses.replace(
    SMALL,
    qformer=dataclasses.replace(SMALL.qformer, max_positions=192),
    llm=dataclasses.replace(SMALL.llm, max_positions=384),
    max_text_len=160,
)
SIZES = {
    "train.steps": 2,
    "train.batch_size": 2,
    "train.num_frames": 4,
    "optim.warmup_steps": 1,
    "data.sampling.num_frames": 4,
    "data.workers": 0,
    "eval.batch_size": 2,
}


def commands(page: str) -> list[str]:
    """What stands in the fenced blocks; a line that ends with a backslash goes on."""
    blocks = re.findall(r"^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def make_place(root: Path) -> None:
    """The directory that the page starts from."""
    for name in ("train.py", "eval.py", "configs", "data", "adacm2_jax"):
        (root / name).symlink_to(ROOT / name)
    installed = root / "bin" / "adacm2"  # as pip makes it
    installed.parent.mkdir()
    installed.write_text(f'#!/bin/sh\nexec {sys.executable} -m adacm2_jax.commands "$@"\n')
    installed.chmod(0o755)
    checkpoints.write_hugging_face(root / "instructblip-vicuna-7b", checkpoints.random_model(MODEL))
    for directory, name in (("lvu", "lvu"), ("video_mme", "multiple_choice")):
        make_annotation(name, root / directory / "annotation")
        make_videos(root / directory / "videos")


def sizes(model: AdaCM2Config) -> list[str]:
    """Flags that make a configuration of the full size one of the miniature."""
    flags = []
    for name, part in dataclasses.asdict(model).items():
        if name == "memory":  # what is tried
            continue
        values = part if isinstance(part, dict) else {"": part}
        flags += [
            f"--config.model.{name}{'.' * bool(key)}{key}={value}" for key, value in values.items()
        ]
    return flags + [f"--config.{name}={value}" for name, value in SIZES.items()]


def main() -> int:
    lines = commands(PAGE.read_text())
    environment = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ
    environment["PYTHONPATH"] = str(ROOT)
    failed = 0
    with tempfile.TemporaryDirectory() as made:
        make_place(Path(made))
        programs = [f"{made}/bin", str(Path(sys.executable).parent)]
        environment["PATH"] = os.pathsep.join([*programs, environment["PATH"]])
        for line in lines:
            more = sizes(MODEL) if "--config configs/" in line else []
            if "--topology" in line:
                more.append("--config.train.batch_size=16")  # divides over its chips
            done = subprocess.run(
                [*shlex.split(line), *more],
                cwd=made,
                env=environment,
                text=True,
                capture_output=True,
            )
            print(f"{'FAILS' if done.returncode else 'holds'}  {line}", flush=True)
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
            failed += bool(done.returncode)
    print(f"{len(lines) - failed} of {len(lines)} commands of {PAGE.relative_to(ROOT)} hold")
    return 1 if failed or not lines else 0


if __name__ == "__main__":
    sys.exit(main())
