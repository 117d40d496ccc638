"""Texts and frames against what Hugging Face's own processor and torch make of them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
import transformers
from sklearn.datasets import load_sample_image

from adacm2_jax.config import AdaCM2Config, LlamaConfig
from adacm2_jax.inference.processor import Processor
from adacm2_jax.inference.tokenizers import read_tokenizers
from adacm2_jax.video.resize import bicubic, clean, ma_lmm
from tests.parity import oracle
from tests.vocabularies import PIECES, WORDS

#: Levels. PyTorch rounds where a pixel lies to float32, twice where its compiler does not fuse:
#: 6e-5 of a pixel at the 640th; the interpolated curve climbs 2 · 255 levels in a pixel at most.
TOLERANCE = 0.03


def torch_bicubic(picture: np.ndarray, size: int) -> torch.Tensor:
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        pixels, size=(size, size), mode="bicubic", align_corners=False
    )
    return scaled[0].permute(1, 2, 0)


@pytest.fixture(scope="module", params=["photograph", "noise", "small", "odd"])
def picture(request) -> np.ndarray:
    if request.param == "photograph":
        return load_sample_image("flower.jpg")
    shape = {"noise": (256, 455, 3), "small": (37, 23, 3), "odd": (225, 223, 3)}[request.param]
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_bicubic_is_torch_s(picture):
    assert np.abs(bicubic(picture, 224) - torch_bicubic(picture, 224).numpy()).max() <= TOLERANCE


def test_ma_lmm_s_frames_are_torch_s_cast_to_bytes(picture):
    values = torch_bicubic(picture, 224)
    # The cast of a negative float is left to the compiler; integers wrap on every machine.
    theirs = values.to(torch.int64).to(torch.uint8).numpy()
    ours = ma_lmm(picture, 224)
    # Where a value lies on a whole number, rounding decides about a level.
    fraction = np.abs(values.numpy() - np.rint(values.numpy()))
    decided = fraction > TOLERANCE
    np.testing.assert_array_equal(ours[decided], theirs[decided])
    assert decided.mean() > 0.9


@pytest.mark.parametrize("rows", [32001, 32064])
def test_text_and_frames_are_those_of_hugging_face_s_processor(rows, tmp_path):
    """The documented example, through InstructBLIP's whole processor, with tokenizers of ours."""
    tokenizers = read_tokenizers(sentencepiece_dir(tmp_path), WORDS, rows, 30523)
    ours = Processor(*tokenizers, AdaCM2Config(llm=LlamaConfig(vocab_size=rows)))
    ours.save_llm(tmp_path / "hf")
    ours.save_qformer(tmp_path / "hf" / "qformer_tokenizer")
    write(tmp_path / "hf" / "preprocessor_config.json", image_processor_type="BlipImageProcessor")
    write(tmp_path / "hf" / "processor_config.json", num_query_tokens=32)
    theirs = transformers.InstructBlipProcessor.from_pretrained(tmp_path / "hf")
    picture, text = load_sample_image("china.jpg"), "What is unusual about this image?"
    found = theirs(images=picture, text=text, size={"height": 224, "width": 224})

    question = ours.questions([text])
    ids = question.llm_ids[question.llm_mask].tolist()
    assert ids[0] == 2
    assert np.asarray(found["input_ids"]).ravel().tolist() == [32001] * 32 + ids
    ids = question.qformer_ids[question.qformer_mask].tolist()
    assert np.asarray(found["qformer_input_ids"]).ravel().tolist() == ids
    pixels = torch.as_tensor(np.asarray(found["pixel_values"]))
    # float32 of numbers up to 2.7, scaled and normalised in one step there and in two here.
    torch.testing.assert_close(oracle.pixels(clean(picture, 224))[None], pixels, rtol=0, atol=1e-6)


def sentencepiece_dir(directory: pathlib.Path) -> pathlib.Path:
    shutil.copyfile(PIECES, directory / "tokenizer.model")
    return directory


def write(path: pathlib.Path, **values: object) -> None:
    path.write_text(json.dumps(values))
