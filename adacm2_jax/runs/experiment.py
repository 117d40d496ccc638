"""An experiment, typed and checked once: what every script, command and the planner work from.

A file of ``configs/`` gives an ``ml_collections.ConfigDict``, so that single fields can be
overridden on the command line; :func:`read` turns it into an :class:`Experiment`. The defaults are
those of the classes here. ``config.json`` of a run is :func:`to_dict` of its experiment.
"""

import dataclasses
import os
from typing import Any

import jax

from adacm2_jax import config as model_config
from adacm2_jax.config import SCORED, AdaCM2Config, MemoryConfig, check_numbers
from adacm2_jax.errors import UserError
from adacm2_jax.inference.generate import GenerationConfig
from adacm2_jax.models.adacm2 import check_memory
from adacm2_jax.models.params import check_expressions, check_groups
from adacm2_jax.runs.data_config import WORKERS, DataConfig
from adacm2_jax.training.step import StepConfig
from adacm2_jax.video.sampling import Sampling

#: Of a model what may differ from the one that was trained.
_FREE = ("memory.", "dtype", "qformer_dtype", "remat", "fused_", "llm.quantize")
#: Dotted prefixes of the fields that may differ from the stored ones, by what is done with them.
MAY_CHANGE = {
    # They do not alter what the steps compute; train.steps says where the run ends.
    "resume": (
        *("eval.", "generation.", "checkpoint.", "train.log_every", "train.chunk", "train.steps"),
        *("data.cache", "data.data_dir", "data.features_local", "data.workers", "mesh"),
    ),
    "evaluate": (
        *(f"model.{name}" for name in _FREE),
        *("checkpoint.", "data.", "eval.", "generation.", "optim.", "train."),
        *("init_from", "mesh", "seed", "tokenizers"),
    ),
    # What an experiment chooses for itself of a converted checkpoint's model.
    "start": (
        *(f"model.{name}" for name in _FREE),
        *("model.qformer.dropout", "model.temporal_positions"),
        *("model.max_text_len", "model.max_answer_len"),
    ),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: of the run.
      batch_size: clips of a step, on all devices together.
      num_frames: T of a clip.
      log_every: steps between two lines of metrics.
      gradient, chunk, accumulate: see ``training.step.StepConfig``.
    """

    steps: int = 1000
    batch_size: int = 8
    num_frames: int = 8
    log_every: int = 20
    gradient: str = "two_phase"
    chunk: int = 16
    accumulate: int = 1

    def __post_init__(self):
        check_numbers("train", self)
        self.step  # noqa: B018 (its fields are checked)

    @property
    def step(self) -> StepConfig:
        """How a step is computed."""
        return StepConfig(self.gradient, self.chunk, self.accumulate)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Of ``training.optim.make_optimizer``.

    Attributes:
      learning_rate: at its height, after the warm-up.
      warmup_steps: of a linear rise from zero.
      weight_decay, b1, b2: of AdamW.
      clip_norm: most that the global norm of a gradient may be.
      groups: pairs of an expression over parameter paths and a factor on the learning rate, None
        for frozen; the first match counts.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    groups: tuple = (("(vision|llm)/.*", None), (".*", 1.0))

    def __post_init__(self):
        check_numbers(
            "optim",
            self,
            warmup_steps=0,
            learning_rate=0,
            weight_decay=0,
            clip_norm=0,
            b1=0,
            b2=0,
        )
        for field in ("b1", "b2"):
            if getattr(self, field) >= 1:
                raise UserError(f"optim.{field} = {getattr(self, field)} must be in [0, 1)")
        check_groups(self.groups)

    @property
    def rule(self) -> dict[str, Any]:
        """Arguments of ``make_optimizer``."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What stays on disk.

    Attributes:
      every: steps between two checkpoints.
      keep: how many of the newest stay.
      keep_every: steps that divide by it are saved, too, and stay for ever; 0: none.
    """

    every: int = 500
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        check_numbers("checkpoint", self, keep_every=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How a split is answered.

    Attributes:
      every: steps between evaluations in training; 0: only at the end.
      limit: questions of the split; 0: all.
      batch_size: videos that are read together.
      chunk: frames that pass through the networks together.
      workers: decoding threads.
      policies: memory policies; all read the same frames.
      full_frames: longest video for policy ``full``; 0: the number of ``data.sampling``.
      split: ``train``, ``test``, or another that the data have.
      step: of a run's checkpoints, which answers; 0: the newest.
      select: the split on which a run's checkpoint is chosen that answers; empty: none is chosen.
        ``eval.py`` alone does; see commands/select.py.
    """

    every: int = 0
    limit: int = 0
    batch_size: int = 8
    chunk: int = 16
    workers: int = 2
    policies: tuple = ("adacm2",)
    full_frames: int = 0
    split: str = "test"
    step: int = 0
    select: str = ""

    def __post_init__(self):
        check_numbers("eval", self, WORKERS, every=0, limit=0, full_frames=0, step=0)
        if not self.policies:
            raise UserError("eval.policies is empty; name at least one, such as ('adacm2',)")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that a run is made from.

    Attributes:
      model: the model.
      seed: of fresh parameters, the order of the data, dropout and sampling.
      init_from: where parameters (and tokenizers) come from unless this run has saved its own: a
        directory of ``train.py``, or a converted checkpoint (``adacm2 port``).
      init_missing: expressions over the paths of parameters that ``init_from`` may lack.
      tokenizers: a directory with both tokenizers; empty learns them from the training texts.
      mesh: devices along (data, model); -1 takes all that are left.
      data, train, optim, checkpoint, eval, generation: see their classes.
    """

    model: AdaCM2Config
    seed: int = 0
    init_from: str = ""
    init_missing: tuple = ()
    tokenizers: str = ""
    mesh: tuple = (-1, 1)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    generation: GenerationConfig = dataclasses.field(default=GenerationConfig(max_new_tokens=8))

    def __post_init__(self):
        check_numbers("", self, {"seed": 2**32 - 1}, seed=0)
        if len(self.mesh) != 2 or any(type(size) is not int for size in self.mesh):
            raise UserError(f"mesh = {self.mesh!r:.60} must be two whole numbers, such as (-1, 1)")
        check_expressions("init_missing", self.init_missing)
        check_memory(self.model)
        self.memories(frames=1)  # what does not depend on the video

    def memories(self, frames: int = 0) -> dict[str, MemoryConfig]:
        """The memory of every policy in ``eval.policies``, with the ratios of ``model.memory``.

        Args:
          frames: of the one video that is read, where it is known; else the experiment says how
            long the longest is.

        Raises:
          UserError: for a policy without a bound, or ``full`` where nobody says what it must hold.
        """
        sampling = self.data.sampling
        sampled = sampling.num_frames if sampling.mode == "uniform" else sampling.max_frames
        frames = frames or self.eval.full_frames or sampled or 0
        if "full" in self.eval.policies and not frames:
            raise UserError(
                "eval.policies has 'full', which must hold all frames, but data.sampling.mode = "
                f"{sampling.mode!r} has no most; set eval.full_frames or data.sampling.max_frames"
            )
        memories = {}
        for policy in self.eval.policies:
            options: dict[str, Any] = {"policy": policy}
            if policy == "full":
                options["max_frames"] = frames
            if policy not in SCORED:  # the others are what it is compared with
                options |= dict(novelty=0.0, decay=0.0, shared_choice=False)
            memory = dataclasses.replace(self.model.memory, **options)
            check_memory(dataclasses.replace(self.model, memory=memory))
            memories[policy] = memory
        return memories

    @property
    def clip_sampling(self) -> Sampling:
        """Which frames a training clip has: all that the sampling takes fit into it.

        Raises:
          UserError: if ``train.num_frames`` would cut off some of them.
        """
        sampling, frames = self.data.sampling, self.train.num_frames
        if sampling.mode == "uniform" and sampling.num_frames > frames:
            raise UserError(
                f"train.num_frames = {frames} would cut off some of the {sampling.num_frames} "
                "frames of data.sampling.num_frames; make them equal"
            )
        if sampling.mode == "fps":
            most = min(sampling.max_frames or frames, frames)
            sampling = dataclasses.replace(sampling, max_frames=most)
        return sampling

    def check_training(self) -> None:
        """Refuses what can be evaluated, but not trained.

        Raises:
          UserError: naming the field.
        """
        for field in ("dtype", "qformer_dtype"):
            if getattr(self.model, field) == "float16":
                raise UserError(
                    f"model.{field} is 'float16', which is for evaluation: gradients underflow in "
                    "it; train in bfloat16"
                )
        data = self.data
        if data.features_local and not data.features:
            raise UserError(
                f"data.features_local = {data.features_local} is for features; set data.features, "
                "or leave it out"
            )
        if data.features_local and os.path.realpath(data.features_local) == os.path.realpath(
            data.features
        ):
            raise UserError(
                f"data.features_local = {data.features_local} is data.features itself; name a "
                "directory of this machine, or leave it out"
            )
        self.clip_sampling  # noqa: B018 (it is checked)
        self.memories()


def read(config: Any) -> Experiment:
    """An experiment from a ``ConfigDict``, or from what ``config.json`` holds.

    Fields that are not there (in a run that an older version wrote) have their defaults.

    Raises:
      UserError: for an unknown field, a wrong type, or a value out of range.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    data = values.get("data")
    data = data if isinstance(data, dict) else {}  # what is none is refused below
    sampling = data.get("sampling")
    if isinstance(sampling, dict) and sampling.get("max_frames") == 0:
        none = sampling | {"max_frames": None}  # 0 stands for it: overrides need a number
        values = values | {"data": data | {"sampling": none}}
    return model_config.from_dict(values, Experiment)


def to_dict(experiment: Experiment, plain: bool = True) -> dict:
    """An experiment as plain values, the inverse of :func:`read`.

    Args:
      experiment: to be written.
      plain: values that JSON gives back alike: lists for tuples. Else tuples stay, which overrides
        on the command line need.
    """
    values = dataclasses.asdict(experiment) | {"model": model_config.to_dict(experiment.model)}
    values["data"]["sampling"]["max_frames"] = experiment.data.sampling.max_frames or 0
    for name in ("eos_ids", "pad_id"):  # the tokenizer says what they are
        del values["generation"][name]
    return _lists(values) if plain else values


def check_same(stored: dict, current: dict, where: Any, may_change: tuple[str, ...]) -> None:
    """Refuses to go on with a run under another configuration.

    Args:
      stored: configuration of the run.
      current: that of this command.
      where: the run is.
      may_change: dotted prefixes of fields that may differ, such as of :data:`MAY_CHANGE`.

    Raises:
      UserError: with a readable difference.
    """
    if lines := difference(stored, current, may_change):
        raise UserError(
            f"{where} holds a run of another configuration (- stored, + this command); use "
            "another --workdir, or the stored values:\n" + "\n".join(lines)
        )


def check_alike(stored: dict, current: dict) -> None:
    """Refuses to join processes that were started with different configurations.

    Args:
      stored: the configuration of process 0.
      current: that of this one.

    Raises:
      UserError: with a readable difference.
    """
    if lines := difference(stored, current):
        raise UserError(
            f"process {jax.process_index()} was started with another configuration than process 0 "
            "(- process 0, + this one); start all by the same command:\n" + "\n".join(lines)
        )


def difference(old: dict, new: dict, may_change: tuple[str, ...] = ()) -> list[str]:
    """The fields that differ, but those whose names start with one of ``may_change``, in lines."""
    old, new = _flatten(old), _flatten(new)
    lines = []
    for name in sorted(set(old) | set(new)):
        same = (name in old) == (name in new) and old.get(name) == new.get(name)
        if not same and not name.startswith(may_change):
            lines += [f" - {name} = {old[name]!r}"] if name in old else []
            lines += [f" + {name} = {new[name]!r}"] if name in new else []
    return lines


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return list(map(_lists, value)) if isinstance(value, tuple | list) else value


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, item in tree.items()
        for name, value in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }
