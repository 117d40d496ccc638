"""The porter's command: what it prints, and that it says nothing else."""

import os
import pathlib
import signal
import subprocess
import sys
import sysconfig

import pytest
import safetensors.numpy

from adacm2_jax.port.__main__ import main
from tests.port import checkpoints
from tests.small import ROOT

CONFIG = checkpoints.config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["adacm2 port import --src", "--format hf|lavis", "docs/porting.md"]),
        (["import"], ["--src", "--dst", "--verify", "--bert", "--allow-llm", "--dtype"]),
        (["export"], ["--src", "--dst", "--verify", "--format", "--drop-temporal"]),
    ],
)
def test_help_names_every_flag(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--help"], "adacm2 port")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(word in shown for word in words)


def test_the_command_leaves_its_caller_s_signals_alone(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["import", "--src", str(tmp_path / "none"), "--dst", str(tmp_path / "ours")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --src {tmp_path / 'none'}: no such file")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def without_torch(tmp_path):
    """An interpreter that finds every installed package but torch."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith("torch"):
            (packages / entry.name).symlink_to(entry)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{packages}"}
    environment.pop("JAX_PLATFORMS", None)

    def run(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert run("-c", "import torch").returncode == 1
    return run


def test_a_conversion_without_torch_prints_what_each_part_gave(
    without_torch, hugging_face, tensors, tmp_path
):
    """And nothing of transformers that misses torch, nor of TPUs that are not there."""
    names = {
        "language_projection.weight": "llm_proj.weight",
        "vision_model.post_layernorm.bias": "ln_vision.bias",
    }
    tuned = {theirs: tensors[name] + 1 for name, theirs in names.items()}
    part = tmp_path / "tuned.safetensors"
    safetensors.numpy.save_file(tuned, part)
    arguments = ["--src", hugging_face, part, "--dst", tmp_path / "ours", "--verify"]
    done = without_torch("-m", "adacm2_jax.port", "import", *arguments)
    assert done.returncode == 0 and done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    # The checkpoint's packed biases hold a third that is zero and no parameter.
    over = sum(values.size for values in tuned.values())
    zeros = CONFIG.vision.depth * CONFIG.vision.width
    total = sum(values.size for values in tensors.values()) - zeros
    assert [str(hugging_face), str(len(tensors) - 2), str(total - over)] in lines
    assert [str(part), "2", str(over)] in lines
    assert lines[-1] == ["verified"]
