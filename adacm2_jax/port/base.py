"""A converted checkpoint on disk: a directory that ``init_from`` takes::

    params/                              parameters, an Orbax tree with flat names
    config.json                          {"model": …}
    {qformer,llm}_tokenizer/             Hugging Face tokenizers
    base.json                            where it comes from, and its fingerprint

It is written under another name and renamed when it is complete.
"""

from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from adacm2_jax.config import AdaCM2Config, to_dict
from adacm2_jax.files import write_json
from adacm2_jax.inference.processor import LLM_DIR, QFORMER_DIR, Processor
from adacm2_jax.models.params import param_shapes
from adacm2_jax.port.destination import written_beside
from adacm2_jax.port.store import LazyArray, write_params
from adacm2_jax.runs.workdir import PARAMS_DIR


def write_base(
    target: epath.Path,
    config: AdaCM2Config,
    params: dict[str, LazyArray],
    processor: Processor,
    *,
    sources: Sequence[str],
    image_token: int | None = None,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> dict:
    """Writes a converted checkpoint, in place of what is there.

    Args:
      target: the directory to be made.
      config: the model.
      params: its parameters by path; those that are missing may start fresh (``init_missing``).
      processor: its tokenizers.
      sources: what it comes from.
      image_token: of Hugging Face's tokenizer, if it has one.
      on_bytes: told of every piece that is on disk.

    Returns:
      What ``base.json`` holds.

    Raises:
      UserError: for a disk that is full; then nothing is written.
    """
    with written_beside(target) as partial:
        digest = write_params(partial / PARAMS_DIR, params, on_bytes)
        processor.save_qformer(partial / QFORMER_DIR)
        processor.save_llm(partial / LLM_DIR)
        write_json(partial / "config.json", {"model": to_dict(config)})
        base = {
            "fingerprint": digest,
            "sources": list(sources),
            "parameters": sum(value.size for value in params.values()),
            "bytes": sum(value.nbytes for value in params.values()),
            "image_token": image_token,
            "missing": sorted(set(param_shapes(config)) - set(params)),
        }
        write_json(partial / "base.json", base)  # last: its presence says that all is there
    return base
