"""Files of weights: what gives nothing is refused, what is not the file itself is recognised."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from adacm2_jax.errors import UserError
from adacm2_jax.port.importer import import_checkpoint
from adacm2_jax.port.store import open_ours
from tests.port import checkpoints

CONFIG = checkpoints.config()
TIED = checkpoints.config(llm=dataclasses.replace(CONFIG.llm, tie_embeddings=True))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1842767\n"
INDEX = "model.safetensors.index.json"


def refusal(sources, target) -> str:
    """One line, and nothing is left."""
    with pytest.raises(UserError) as error:
        import_checkpoint(sources, target / "ours")
    assert not (target / "ours").exists() and not list(target.glob(".*"))
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {"a', "is damaged (Unterminated string"),
        ("", "is damaged (Expecting value"),
        ("[]", "is damaged: it holds no table"),
        ("{}", "is damaged: it has no weight_map; download it again"),
        ('{"weight_map": {}}', "is damaged: it has no weight_map; download it again"),
        ('{"weight_map": ["model-1.safetensors"]}', "is damaged: it has no weight_map"),
        ('{"weight_map": {"a": 3}}', "is damaged: 3 names no file; download it again"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
        (POINTER, "is a pointer of git-lfs, not the file itself; run `git lfs pull` in "),
    ],
)
def test_a_broken_index_of_shards_is_refused(hugging_face, tmp_path, content, message):
    shutil.copytree(hugging_face, tmp_path / "there")
    (tmp_path / "there" / INDEX).write_text(content)
    assert f"{tmp_path / 'there' / INDEX} {message}" in refusal([tmp_path / "there"], tmp_path)


@pytest.mark.parametrize("name", ["model-2.safetensors", "config.json", "tokenizer.model"])
def test_a_pointer_of_git_lfs_is_recognised(hugging_face, tmp_path, name):
    shutil.copytree(hugging_face, tmp_path / "there")
    (tmp_path / "there" / name).write_text(POINTER)
    found = refusal([tmp_path / "there"], tmp_path)
    assert found.startswith(f"{tmp_path / 'there' / name} is a pointer of git-lfs")
    assert f"run `git lfs pull` in {tmp_path / 'there'}" in found


@pytest.mark.parametrize(
    "values", [{"vision_config": 3}, {"text_config": {"num_hidden_layers": "2"}}]
)
def test_a_configuration_that_transformers_cannot_read_is_one_line(hugging_face, tmp_path, values):
    shutil.copytree(hugging_face, tmp_path / "there")
    file = tmp_path / "there" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    assert str(file) in refusal([tmp_path / "there"], tmp_path)


def test_a_part_that_gives_no_parameter_is_refused(hugging_face, tmp_path):
    """Its tensors are all on the list of known buffers."""
    buffer = {"llm_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    safetensors.numpy.save_file(buffer, tmp_path / "part.safetensors")
    found = refusal([hugging_face, tmp_path / "part.safetensors"], tmp_path)
    assert found.startswith(f"{tmp_path / 'part.safetensors'} gives no parameter of this model")
    assert "inv_freq" in found
    safetensors.numpy.save_file({}, tmp_path / "part.safetensors")
    found = refusal([hugging_face, tmp_path / "part.safetensors"], tmp_path)
    assert found.startswith(f"{tmp_path / 'part.safetensors'} holds no tensor")


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod."])
def test_what_training_programs_put_before_every_name_is_taken_off(hugging_face, tmp_path, prefix):
    size = (CONFIG.llm.width, CONFIG.qformer.width)
    values = np.random.default_rng(1).standard_normal(size, np.float32)
    part = tmp_path / "tuned.safetensors"
    safetensors.numpy.save_file({f"{prefix}llm_proj.weight": values}, part)
    import_checkpoint([hugging_face, part], tmp_path / "ours")
    _, params = open_ours(tmp_path / "ours")
    np.testing.assert_array_equal(params.read("language_projection/kernel"), values.T)


def test_a_tied_head_may_repeat_the_embeddings_but_not_differ(tmp_path):
    tensors = checkpoints.hugging_face_tensors(TIED)
    embeddings = tensors["language_model.model.embed_tokens.weight"]
    head = {"language_model.lm_head.weight": embeddings.copy()}
    source = checkpoints.write_safetensors(tmp_path / "same", TIED, tensors | head)
    import_checkpoint([source], tmp_path / "ours")
    assert "llm/lm_head/kernel" not in open_ours(tmp_path / "ours")[1].shapes
    head["language_model.lm_head.weight"][3, 5] += 1
    source = checkpoints.write_safetensors(tmp_path / "other", TIED, tensors | head)
    shutil.rmtree(tmp_path / "ours")
    found = refusal([source], tmp_path)
    assert "language_model.lm_head.weight differs from the table of embeddings" in found
    assert "tie_word_embeddings: true; set it to false" in found
    # The remedy works: the head is kept.
    file = source / "config.json"
    file.write_text(
        file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false')
    )
    import_checkpoint([source], tmp_path / "ours")
    _, params = open_ours(tmp_path / "ours")
    expected = head["language_model.lm_head.weight"].T
    np.testing.assert_array_equal(params.read("llm/lm_head/kernel"), expected)
