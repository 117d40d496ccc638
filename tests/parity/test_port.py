"""Checkpoints in and out: the same bits, or a clear refusal and nothing written."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from adacm2_jax.errors import UserError
from adacm2_jax.port.exporter import export_checkpoint
from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.store import open_ours
from tests.parity import checkpoints, names
from tests.small import process_environment

CONFIG = checkpoints.config()
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model():
    return checkpoints.random_model(CONFIG)


@pytest.fixture(scope="module")
def hugging_face(model, tmp_path_factory):
    return checkpoints.write_hugging_face(tmp_path_factory.mktemp("hf") / "blip", model)


@pytest.fixture(scope="module")
def lavis(model, tmp_path_factory):
    return checkpoints.write_lavis(tmp_path_factory.mktemp("lavis"), model)


@pytest.fixture(scope="module")
def weights(hugging_face, tmp_path_factory):
    """The Hugging Face directory, converted."""
    target = tmp_path_factory.mktemp("ours") / "weights"
    import_checkpoint([hugging_face], target)
    return target


def flat_params(directory) -> dict[str, np.ndarray]:
    _, params = open_ours(directory)
    return {path: params.read(path) for path in params.shapes}


def tensors(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def assert_same_bits(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def test_every_value_is_where_an_independent_table_has_it(weights, model):
    expected = names.instructblip(model.state_dict(), CONFIG)
    found = flat_params(weights)
    assert "temporal_embed" not in found
    for path, values in found.items():
        node = expected
        for key in path.split("/"):
            node = node[key]
        np.testing.assert_array_equal(values, node, err_msg=path)
    assert len(found) == len(_leaves(expected)) - 1


def _leaves(tree) -> list:
    return [tree] if not isinstance(tree, dict) else [x for t in tree.values() for x in _leaves(t)]


def test_the_configuration_is_read_off_the_directory(weights):
    found, _ = open_ours(weights)
    lengths = dict(max_text_len=CONFIG.max_text_len, max_answer_len=CONFIG.max_answer_len)
    assert dataclasses.replace(found, **lengths) == CONFIG


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_to_ours_and_back_is_bit_identical(dtype, tmp_path):
    model = checkpoints.random_model(CONFIG, dtype=getattr(torch, dtype))
    there = checkpoints.write_hugging_face(tmp_path / "there", model)
    import_checkpoint([there], tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "hf")
    assert len(list(there.glob("*.safetensors"))) > 1
    assert_same_bits(tensors(tmp_path / "back"), tensors(there))

    assert checkpoints.read_json(tmp_path / "back" / "config.json")["image_token_index"] == (
        model.config.image_token_index
    )
    loaded, report = transformers.InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(dict(loaded.to(model.dtype).state_dict()), dict(model.state_dict()))


def test_pickled_shards_give_the_same(model, weights, tmp_path):
    there = tmp_path / "there"
    checkpoints.write_hugging_face(there, model)
    for file in there.glob("*.safetensors*"):
        file.unlink()
    state = dict(model.state_dict())
    half = len(state) // 2
    for number, part in enumerate((list(state)[:half], list(state)[half:]), 1):
        torch.save(
            {name: state[name].clone() for name in part},
            there / f"pytorch_model-0000{number}-of-00002.bin",
        )
    found = import_checkpoint([there], tmp_path / "ours")
    assert found["fingerprint"] == checkpoints.read_json(weights / "base.json")["fingerprint"]


def test_lavis_parts_give_the_same_values(lavis, weights, tmp_path):
    found = import_checkpoint(lavis, tmp_path / "ours", bert=lavis[0].parent / "bert")
    assert found["fingerprint"] == checkpoints.read_json(weights / "base.json")["fingerprint"]
    config, _ = open_ours(tmp_path / "ours")
    # LAVIS's ln_vision has PyTorch's epsilon; heads of 64, where Hugging Face's file names them.
    assert config.ln_vision_eps == 1e-5
    assert config.vision.depth == CONFIG.vision.depth


def test_lavis_to_ours_and_back_is_bit_identical(lavis, tmp_path):
    plain = checkpoints.write_lavis(
        tmp_path / "there", checkpoints.random_model(CONFIG, dtype=torch.float16), extras=False
    )
    import_checkpoint(plain, tmp_path / "ours", bert=tmp_path / "there" / "bert")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", "lavis")
    for name in ("eva_vit_g.pth", "instruct_blip_vicuna7b_trimmed.pth"):
        there, back = (
            torch.load(tmp_path / d / name, weights_only=True) for d in ("there", "back")
        )
        assert_same_bits(back.get("model", back), there.get("model", there))
    assert_same_bits(tensors(tmp_path / "back" / "vicuna"), tensors(tmp_path / "there" / "vicuna"))
    llm = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back" / "vicuna")
    assert llm.config.num_attention_heads == CONFIG.llm.num_heads


def test_ma_lmm_lies_over_instructblip(hugging_face, model, tmp_path):
    other = checkpoints.random_model(CONFIG, seed=6)
    tuned = checkpoints.write_ma_lmm(tmp_path / "checkpoint_best.pth", other, rows=120, seed=7)
    base = import_checkpoint([hugging_face, tmp_path / "checkpoint_best.pth"], tmp_path / "ours")
    assert base["missing"] == []
    found = flat_params(tmp_path / "ours")
    np.testing.assert_array_equal(found["temporal_embed"], tuned["image_pe.weight"].numpy())
    projection = tuned["llm_proj.weight"].numpy().T
    np.testing.assert_array_equal(found["language_projection/kernel"], projection)
    head = model.state_dict()["language_model.lm_head.weight"].numpy().T
    np.testing.assert_array_equal(found["llm/lm_head/kernel"], head)
    assert open_ours(tmp_path / "ours")[0].ln_vision_eps == 1e-5

    export_checkpoint(tmp_path / "ours", tmp_path / "back", "lavis")
    back = torch.load(tmp_path / "back" / "checkpoint_best.pth", weights_only=True)["model"]
    assert_same_bits(back, tuned)
    with pytest.raises(UserError, match=r"has a temporal table, .* pass --drop-temporal"):
        export_checkpoint(tmp_path / "ours", tmp_path / "hf", "hf")
    export_checkpoint(tmp_path / "ours", tmp_path / "hf", "hf", drop_temporal=True)
    assert not any("image_pe" in name for name in tensors(tmp_path / "hf"))


# --- Refusals -----------------------------------------------------------------------------------


def changed(hugging_face: pathlib.Path, directory: pathlib.Path, change) -> pathlib.Path:
    """A copy in one file, with its tensors changed."""
    state = {name: tensor.clone() for name, tensor in tensors(hugging_face).items()}
    change(state)
    directory.mkdir()
    for file in hugging_face.iterdir():
        if "safetensors" not in file.name:
            (directory / file.name).symlink_to(file)
    safetensors.torch.save_file(state, directory / "model.safetensors", {"format": "pt"})
    return directory


def put(name, tensor):
    return lambda state: state.update({name: tensor})


NORM = "vision_model.encoder.layers.1.layer_norm1.weight"
CHANGES = {
    "one key missing": (lambda state: state.pop(NORM), rf" - {NORM} \(96,\)"),
    "one whole parameter missing": (
        lambda state: state.pop("query_tokens"),
        r" - query_tokens \(1, 4, 96\)",
    ),
    "one key too many": (
        put("vision_model.head.bias", torch.ones(3)),
        r" \+ vision_model.head.bias",
    ),
    "of the wrong shape": (put(NORM, torch.ones(97)), rf" ! {NORM} \(97,\), expected \(96,\)"),
    "one layer too many": (
        put("vision_model.encoder.layers.3.layer_norm1.weight", torch.ones(96)),
        r" \+ vision_model.encoder.layers.3.layer_norm1.weight",
    ),
    "a bias on the keys": (
        put("vision_model.encoder.layers.0.self_attn.qkv.bias", torch.ones(288)),
        "self_attn.qkv.bias is not zero on the keys",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_weights_of_another_model_are_refused(case, hugging_face, tmp_path):
    change, message = CHANGES[case]
    source = changed(hugging_face, tmp_path / "there", change)
    with pytest.raises(UserError, match=message):
        import_checkpoint([source], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_configuration_with_fewer_layers_is_refused(hugging_face, tmp_path):
    source = changed(hugging_face, tmp_path / "there", lambda state: None)
    settings = checkpoints.read_json(source / "config.json")
    settings["text_config"]["num_hidden_layers"] = 1
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r" \+ language_model.model.layers.1"):
        import_checkpoint([source], tmp_path / "ours")


def test_a_truncated_file_is_refused(hugging_face, tmp_path):
    source = changed(hugging_face, tmp_path / "there", lambda state: None)
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(UserError, match=r"model.safetensors is damaged or truncated"):
        import_checkpoint([source], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_a_missing_shard_is_refused(hugging_face, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    files = sorted(hugging_face.iterdir())
    gone = next(file for file in files if file.suffix == ".safetensors")
    for file in files:
        if file != gone:
            (there / file.name).symlink_to(file)
    with pytest.raises(UserError, match=f"names {gone.name}, which is not there"):
        import_checkpoint([there], tmp_path / "ours")


def test_an_existing_destination_needs_force(hugging_face, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("1")
    with pytest.raises(UserError, match=r"--dst .*ours exists; pass --force"):
        import_checkpoint([hugging_face], tmp_path / "ours")
    assert (tmp_path / "ours" / "precious").exists()
    import_checkpoint([hugging_face], tmp_path / "ours", force=True)
    assert not (tmp_path / "ours" / "precious").exists()


def test_what_is_not_a_checkpoint_is_named(hugging_face, lavis, tmp_path):
    with pytest.raises(UserError, match="nothing: no such file or directory"):
        import_checkpoint([tmp_path / "nothing"], tmp_path / "ours")
    with pytest.raises(UserError, match=r"needs the config\.json of its model"):
        import_checkpoint([tmp_path], tmp_path / "ours")
    with pytest.raises(UserError, match="no language model among these"):
        import_checkpoint(lavis[:2], tmp_path / "ours")
    with pytest.raises(UserError, match=r"pass --bert with the directory"):
        import_checkpoint(lavis, tmp_path / "ours")
    with pytest.raises(UserError, match="1 InstructBLIP and 1 language-model"):
        import_checkpoint([hugging_face, lavis[2]], tmp_path / "ours")


def command(*arguments, program=("-m", "adacm2_jax.port")) -> subprocess.Popen:
    environment = process_environment()
    environment.pop("JAX_PLATFORMS", None)  # a TPU that is not there is not to be looked for
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can be mounted by root alone")
def test_a_full_disk_leaves_nothing(hugging_face, tmp_path):
    """The disk has room when the conversion starts, and none when it goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        "import sys; from adacm2_jax.port import importer, __main__ as port\n"
        "importer.check_room = lambda *_: None\n"
        f"arguments = ['--src', {str(hugging_face)!r}, '--dst', {str(disk / 'ours')!r}]\n"
        "sys.exit(port.main(['import', *arguments]))"
    )
    mount = f"mount -t tmpfs -o size=2m none {disk}"
    setup = f'{mount} && {sys.executable} -c "$SCRIPT"; s=$?; ls -A {disk}; exit $s'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", setup],
        env=os.environ | {"SCRIPT": script},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left on the disk; nothing was written" in done.stderr
    assert done.stdout.strip() == ""


def test_a_disk_without_room_is_refused_before_the_work(hugging_face, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needed and 0\.0 GB are free; nothing was written"):
        import_checkpoint([hugging_face], tmp_path / "ours")
    assert not list(tmp_path.iterdir())


SLOW_DISK = """
import sys, time
from adacm2_jax.port import __main__ as port, store
pieces = store.LazyArray.pieces
def slowly(self):
    for piece in pieces(self):
        time.sleep(0.1)
        yield piece
store.LazyArray.pieces = slowly
sys.exit(port.main(sys.argv[1:]))
"""


BEGUN, WRITING = ".ours.partial-*", ".ours.partial-*/params*/**/0.*"


@pytest.mark.parametrize(
    ("number", "seen"),
    [(signal.SIGTERM, BEGUN), (signal.SIGTERM, WRITING), (signal.SIGKILL, WRITING)],
)
def test_an_interrupted_conversion_leaves_no_checkpoint(number, seen, hugging_face, tmp_path):
    arguments = ("import", "--src", hugging_face, "--dst", tmp_path / "ours")
    process = command(*arguments, program=("-c", SLOW_DISK))
    while process.poll() is None and not list(tmp_path.glob(seen)):
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[number]
    assert not (tmp_path / "ours").exists()
    if number == signal.SIGTERM:
        assert not list(tmp_path.iterdir())
    import_checkpoint([hugging_face], tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --- The command --------------------------------------------------------------------------------


def test_import_and_verify(hugging_face, tmp_path):
    process = command("import", "--src", hugging_face, "--dst", tmp_path / "ours", "--verify")
    output, errors = process.communicate()
    assert process.returncode == 0 and errors == ""
    assert "fingerprint" in output and output.strip().endswith("verified")
    for line in ("vision block", "Q-Former layer cross-attention", "LLM logits"):
        assert line in output
    process = command(
        "export",
        "--src",
        tmp_path / "ours",
        "--dst",
        tmp_path / "back",
        "--format",
        "lavis",
        "--verify",
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.strip().endswith("verified")


def test_verify_finds_one_wrong_value(hugging_face, weights, tmp_path):
    from adacm2_jax.port.__main__ import verify

    def change(state):
        state["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5

    source = changed(hugging_face, tmp_path / "there", change)
    assert verify([str(hugging_face)], str(weights)) == 0
    assert verify([str(source)], str(weights)) == 1


def test_a_wrong_command_is_one_line(tmp_path):
    process = command("import", "--src", tmp_path / "none", "--dst", tmp_path / "ours")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("error: --src")
    assert "Traceback" not in errors
