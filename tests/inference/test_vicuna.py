"""Which Vicuna a directory holds: InstructBLIP was trained with v1.1 alone."""

import json
import pathlib

import pytest

from adacm2_jax.errors import UserError
from adacm2_jax.inference.tokenizers import check_vicuna

V11 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
}
V15 = V11 | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05}


def write(path: pathlib.Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def model_dir(directory: pathlib.Path, values: dict, length: int | None = None) -> pathlib.Path:
    write(directory / "config.json", values)
    if length is not None:
        write(directory / "tokenizer_config.json", {"model_max_length": length})
    return directory


@pytest.mark.parametrize("length", [None, 2048, 1000000000000000019884624838656])
def test_vicuna_v1_1_passes(tmp_path, length):
    assert check_vicuna(model_dir(tmp_path, V11, length)) == "v1.1"


def test_an_instructblip_names_its_language_model_inside(tmp_path):
    """Hugging Face writes only what differs from LLaMA-1's defaults."""
    inside = {"model_type": "instructblip", "text_config": {"model_type": "llama"}}
    assert check_vicuna(model_dir(tmp_path / "1", inside)) == "v1.1"
    inside["text_config"] = V15
    with pytest.raises(UserError, match=r"is Vicuna-7B v1\.5"):
        check_vicuna(model_dir(tmp_path / "2", inside))


def test_vicuna_v1_5_is_refused_unless_allowed(tmp_path):
    directory = model_dir(tmp_path, V15, 4096)
    with pytest.raises(UserError) as error:
        check_vicuna(directory)
    text = str(error.value)
    assert text.startswith(f"{directory} is Vicuna-7B v1.5 (max_position_embeddings 4096, ")
    assert "trained with v1.1" in text and "nonsense" in text and "--allow-llm v1.5" in text
    assert "\n" not in text
    assert check_vicuna(directory, "v1.5") == "v1.5"
    with pytest.raises(UserError, match=r"--allow-llm v1\.5"):
        check_vicuna(directory, "unknown")


@pytest.mark.parametrize(
    ("values", "length"),
    [
        (V11, 4096),
        (V11 | {"rms_norm_eps": 1e-5}, None),
        (V11 | {"max_position_embeddings": 32768}, None),
    ],
)
def test_what_is_neither_is_refused_at_vicuna_s_size(tmp_path, values, length):
    directory = model_dir(tmp_path, values, length)
    with pytest.raises(UserError, match=r"neither Vicuna v1\.1 nor v1\.5 .*--allow-llm unknown"):
        check_vicuna(directory)
    assert check_vicuna(directory, "unknown") == "unknown"


def test_models_of_other_sizes_pass(tmp_path):
    tiny = V15 | {"hidden_size": 64, "num_hidden_layers": 2}
    assert check_vicuna(model_dir(tmp_path / "tiny", tiny)) == ""
    large = V15 | {"hidden_size": 5120, "num_hidden_layers": 40}
    with pytest.raises(UserError, match=r"Vicuna-13B v1\.5"):
        check_vicuna(model_dir(tmp_path / "large", large))


def test_a_missing_configuration_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing; copy it"):
        check_vicuna(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        check_vicuna(tmp_path)
