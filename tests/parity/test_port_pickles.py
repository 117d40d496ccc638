"""PyTorch's pickles: unwrapped as training programs wrap them, read in any format, or refused."""

import argparse
import os
import pathlib
import pickle

import numpy as np
import pytest
import torch

from adacm2_jax.errors import UserError
from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.source import Source
from adacm2_jax.port.store import open_ours
from tests.parity import checkpoints

CONFIG = checkpoints.config()
#: How training programs keep a state_dict.
WRAPPED = {
    "bare": lambda state: state,
    "LAVIS": lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
    "Lightning": lambda state: {"state_dict": state, "hyper_parameters": {"lr": 1e-4}},
    "the tutorials": lambda state: {"epoch": 3, "model_state_dict": state, "loss": torch.ones(())},
    "DeepSpeed": lambda state: {"module": state, "optimizer": None},
    "within": lambda state: {"model": {"state_dict": state, "step": torch.ones(())}, "epoch": 3},
    "DDP": lambda state: {"model": {f"module.{name}": t for name, t in state.items()}},
    "an empty one in front": lambda state: {"model": {}, "state_dict": state},
}
NOTHING = {
    "epoch": {"epoch": 3},
    "model": {"model": {}},
    "model, step": {"model": {"state_dict": {"lr": 0.1}}, "step": 7},
    "weights of mine": {"weights of mine": {"llm_proj.bias": torch.ones(96)}},
    "none": {},
}


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    model = checkpoints.random_model(CONFIG)
    return checkpoints.write_hugging_face(tmp_path_factory.mktemp("hf") / "blip", model)


def values(file: pathlib.Path) -> dict[str, np.ndarray]:
    source = Source([file])
    return {name: source.read(name) for name in source.shapes}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_state_dict_is_found_where_training_programs_keep_it(case, tmp_path):
    state = {"llm_proj.weight": torch.randn(3, 2), "query_tokens": torch.randn(1, 2)}
    torch.save(WRAPPED[case](state), tmp_path / "tuned.pth")
    found = values(tmp_path / "tuned.pth")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.numpy())


def test_a_wrapped_part_lies_over_its_base(hugging_face, tmp_path):
    """It used to leave the base as it was, and be called verified."""
    tuned = {"llm_proj.weight": torch.randn(CONFIG.llm.width, CONFIG.qformer.width)}
    torch.save({"epoch": 1, "state_dict": tuned}, tmp_path / "tuned.pth")
    import_checkpoint([hugging_face, tmp_path / "tuned.pth"], tmp_path / "ours")
    found = open_ours(tmp_path / "ours")[1].read("language_projection/kernel")
    np.testing.assert_array_equal(found, tuned["llm_proj.weight"].numpy().T)


@pytest.mark.parametrize("keys", NOTHING)
def test_a_part_without_a_tensor_is_refused_with_its_keys(keys, hugging_face, tmp_path):
    torch.save(NOTHING[keys], tmp_path / "part.pth")
    message = rf"part\.pth holds no tensor .* its top-level keys are: {keys}; save the state_dict"
    with pytest.raises(UserError, match=message):
        import_checkpoint([hugging_face, tmp_path / "part.pth"], tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["part.pth"]


def test_a_file_of_pytorch_before_1_6_is_read(tmp_path, monkeypatch):
    """It cannot be memory-mapped, and is opened once, however much is read."""
    monkeypatch.setattr("adacm2_jax.port.source.WINDOW", 8)
    tensors = {"a": torch.randn(40, 3).bfloat16(), "b": torch.randn(5)}
    torch.save({"model": tensors}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    source = Source([tmp_path / "old.pth"])
    np.testing.assert_array_equal(source.read("b"), tensors["b"].numpy())
    (tmp_path / "old.pth").unlink()
    rows = source.read("a", slice(7, 9)).astype(np.float32)
    np.testing.assert_array_equal(rows, tensors["a"][7:9].float().numpy())


class _Code:
    def __init__(self, marker: pathlib.Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_more_than_tensors_is_refused(zipped, hugging_face, tmp_path):
    """Nothing of it runs, and torch's own advice to run it is not passed on."""
    marker = tmp_path / "marker"
    for held, name in ((_Code(marker), r"posix\.system"), (argparse.Namespace(), r"argparse\.N")):
        content = {"model": {"query_tokens": torch.ones(1)}, "config": held}
        torch.save(content, tmp_path / "part.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=rf"part\.pth is refused: .* tensors \({name}") as error:
            import_checkpoint([hugging_face, tmp_path / "part.pth"], tmp_path / "ours")
        text = str(error.value)
        assert "\x1b" not in text and "\n" not in text and "weights_only" not in text
    (tmp_path / "part.pth").write_bytes(pickle.dumps({"model": _Code(marker)}))
    with pytest.raises(
        UserError, match=r"part\.pth is damaged or truncated \(no pickle of PyTorch"
    ):
        import_checkpoint([hugging_face, tmp_path / "part.pth"], tmp_path / "ours")
    assert not marker.exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("case", ["page", "nothing", "cut", "cut old", "pointer", "program"])
def test_what_is_no_checkpoint_is_one_line(case, tmp_path):
    file, whole = tmp_path / "part.pth", {"a": torch.ones(1000)}
    torch.save(whole, file, _use_new_zipfile_serialization=case != "cut old")
    if case == "program":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    file.write_bytes(
        {
            "page": b"<!DOCTYPE html><title>404</title>",
            "nothing": b"",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "program": file.read_bytes(),
        }.get(case, file.read_bytes()[:3000])
    )
    with pytest.raises(UserError) as error:
        Source([file])
    text = str(error.value)
    expected = {
        "pointer": "is a pointer of git-lfs",
        "program": "is refused: it holds more than tensors (a TorchScript program)",
    }
    assert text.startswith(f"{file} {expected.get(case, 'is damaged or truncated (')}")
    assert "\n" not in text and "weights_only" not in text
