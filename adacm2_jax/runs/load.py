"""What a model starts from: a run of ``train.py``, or a converted checkpoint."""

import os
from collections.abc import Collection, Sequence

from flax import traverse_util

from adacm2_jax.config import AdaCM2Config, to_dict
from adacm2_jax.models.params import fresh_params, join_params
from adacm2_jax.runs.checkpoint import (
    check_same,
    find_base,
    find_params,
    is_base,
    read_base,
    read_config,
    restore_params,
    write_link,
)

#: Fields of a converted checkpoint's model that an experiment chooses for itself.
FREE = (
    "memory.",
    *("dtype", "qformer_dtype", "remat", "qformer.dropout", "temporal_positions"),
    *("max_text_len", "max_answer_len"),
)


def start_params(
    source: str | os.PathLike,
    config: AdaCM2Config,
    abstract: dict,
    missing: Sequence[str],
    seed: int,
) -> dict:
    """The parameter tree of ``source``; what it lacks is fresh.

    Args:
      source: a directory of ``train.py``, or a converted checkpoint.
      config: the model.
      abstract: its parameters as ``jax.ShapeDtypeStruct`` leaves with shardings.
      missing: regular expressions over the paths that may be fresh.
      seed: of what is fresh.

    Raises:
      UserError: as :func:`check_start` does, or if the checkpoint is damaged.
    """
    check_start(source, config, abstract, missing)
    found = restore_params(source, abstract, missing=missing)
    if base := read_base(source):
        print(f"base: {source}, fingerprint {base['fingerprint']}", flush=True)
    absent = sorted(set(traverse_util.flatten_dict(abstract, sep="/")) - set(found))
    if absent:
        print(f"not in {source}, starts fresh: {', '.join(absent)}", flush=True)
        found |= fresh_params(config, abstract, seed, absent)
    return join_params(found, {})


def resume_frozen(
    workdir: str | os.PathLike, abstract: dict, paths: Collection[str], init_from: str = ""
) -> dict:
    """The frozen parameters of a run that goes on, by path; notes where its base is now.

    Args:
      workdir: of the run.
      abstract: as for :func:`start_params`; all of it must be there.
      paths: of the frozen parameters.
      init_from: where its base may be, see ``checkpoint.find_base``.

    Raises:
      UserError: if the checkpoint is damaged, or its base is not there.
    """
    frozen = restore_params(workdir, abstract, base=init_from, paths=paths)
    if base := find_base(workdir, init_from):
        write_link(workdir, base)
    return frozen


def check_start(
    source: str | os.PathLike, config: AdaCM2Config, abstract: dict, missing: Sequence[str]
) -> None:
    """Whether a model can start from ``source``, without reading a value of it.

    Raises:
      UserError: if it is another model, or lacks parameters that ``missing`` does not name.
    """
    check_base(source, config)
    find_params(source, abstract, missing=missing)


def check_base(source: str | os.PathLike, config: AdaCM2Config) -> None:
    """Compares a model with that of a converted checkpoint, whose shapes alone say too little:
    numbers of heads, epsilons and rotary frequencies count too.

    Raises:
      UserError: with a readable difference.
    """
    if is_base(source):
        stored = {"model": read_config(source)["model"]}
        free = tuple(f"model.{field}" for field in FREE)
        check_same(stored, {"model": to_dict(config)}, source, free)


def vision_params(
    source: str | os.PathLike,
    config: AdaCM2Config,
    abstract: dict,
    missing: Sequence[str],
    seed: int,
) -> dict:
    """The ViT's parameters alone, as training starts with them.

    Args:
      source: ``init_from`` of the experiment; empty for fresh ones.
      config: the model.
      abstract: its parameters as ``jax.ShapeDtypeStruct`` leaves with shardings.
      missing: regular expressions over the paths that ``source`` may lack.
      seed: of fresh ones.

    Returns:
      A tree with ``vision``.

    Raises:
      UserError: if ``source`` does not hold the model.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    wanted = [path for path in flat if path.startswith("vision/")]
    found: dict = {}
    if source:
        check_start(source, config, abstract, missing)
        found = restore_params(source, abstract, missing=missing, paths=wanted)
    absent = [path for path in wanted if path not in found]
    if absent:
        found |= fresh_params(config, abstract, seed, absent)
    return join_params(found, {})
