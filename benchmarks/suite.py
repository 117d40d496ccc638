"""The suite of generated tasks: trains the tiny model on it, and compares memories.

    make suite                       (SUITE_ARGS=--fast: one model and few questions)
    python benchmarks/suite.py --workdir runs/suite [--studies memories,plane] [--seeds 0,1,2]
    python benchmarks/suite.py --workdir runs/suite --vision_only

For each seed it trains a model (SEED/vision, first, main; ``configs/suite.py``) on videos of its
own. Each study then has models answer held-out videos under several memories, by ``adacm2 ablate``,
and writes its tables to WORKDIR/SPLIT/STUDY (SPLIT-fast with ``--fast``). What is done is left as
it is; what was stopped goes on. Hyper-parameters were chosen on ``val`` with seeds from 10 on
(``suite_search.py``, and this with ``--split val --seeds 10``); reported are ``test`` and the seeds
below.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.config import as_fraction, tiny  # noqa: E402
from adacm2_jax.errors import UserError  # noqa: E402
from adacm2_jax.files import check_writable  # noqa: E402
from adacm2_jax.memory.policies import settled, share_for  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.workdir import check_path  # noqa: E402
from benchmarks._suite import Change, compare, make_vision, train, train_on  # noqa: E402

#: Tokens that a layer holds: of two frames. A 32nd of all at 64 frames, a 128th at 256.
TOKENS = 34
_P = tiny().vision.tokens_per_frame
TASKS = ("needle", "order", "change")
STYLES = ("film", "static", "medical", "sport")
#: Videos of a task and seed, each with up to four questions: 1,008 questions of three seeds.
VIDEOS, FEW_VIDEOS, FAST_VIDEOS = 84, 42, 13
LONG_FRAMES, LONG_VIDEOS = 10_000, 8

ADACM2 = "adacm2"
RIVALS = ("random", "recent", "recent_frames", "uniform", "merge")


@dataclasses.dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
      memories: see ``adacm2 ablate``.
      frames: T of the videos.
      tasks: of the suite.
      tokens: that a layer comes to hold.
      videos: of a task and model.
      styles: of the videos.
      stages: of each seed, which answer: directories beside ``main``.
      every_seed: whether all models answer, or the first alone.
    """

    memories: tuple[str, ...]
    frames: tuple[int, ...] = (256,)
    tasks: tuple[str, ...] = TASKS
    tokens: int = TOKENS
    videos: int = VIDEOS
    styles: tuple[str, ...] = ("grounds",)
    stages: tuple[str, ...] = ("main",)
    every_seed: bool = True


def _shares(*tokens: int) -> str:
    """β of each layer, where each is to hold so many tokens."""
    shares = [share_for(count, _P, as_fraction("0.05")) for count in tokens]
    return f"layers{tokens[0]}_{tokens[1]}=adacm2:conserve_ratio={','.join(shares)}"


def _along(*ratios: str) -> tuple[str, ...]:
    return tuple(f"rho{ratio}=adacm2:recent_ratio={ratio}" for ratio in ratios)


def _settled(recent: str, conserve: str) -> int:
    return settled(_P, as_fraction(recent), as_fraction(conserve))


_EQ6 = _settled("0.9", "0.1")
_ONE = dict(every_seed=False, videos=FEW_VIDEOS)

STUDIES = {
    # Selection against its rivals, at equal tokens; the last frames also at other sizes.
    "memories": Study(
        (ADACM2, *RIVALS, "last4=recent_frames:recent_frames=4")
        + ("last16=recent_frames:recent_frames=16",),
        frames=(64, 256),
    ),
    # When nobody asks before the end, or nothing in particular.
    "prompts": Study(
        (ADACM2, "hybrid=adacm2:novelty=0.5", "novelty=adacm2:novelty=1.0", *RIVALS, "full"),
        tasks=("needle", "generic", "late"),
        frames=(64,),
    ),
    # Each component on its own.
    "components": Study(
        (ADACM2, "text=adacm2:score_rows=text", "query+text=adacm2:score_rows=query+text")
        + ("decay0.7=adacm2:decay=0.7", "shared=adacm2:shared_choice=True")
        + ("hybrid=adacm2:novelty=0.5", _shares(17, 51), _shares(51, 17)),
        **_ONE,
    ),
    # The plane of (ρ, β) along lines of equal memory: eq8's, ours, eq6's.
    "plane_eq8": Study(
        ("eq8=adacm2:recent_ratio=0.1:conserve_ratio=0.1",), tokens=_settled("0.1", "0.1"), **_ONE
    ),
    "plane": Study(_along("0", "0.05", "0.2", "0.4", "0.6"), **_ONE),
    "plane_eq6": Study(
        ("eq6=adacm2:recent_ratio=0.9:conserve_ratio=0.1", *_along("0", "0.3", "0.6")),
        tokens=_EQ6,
        **_ONE,
    ),
    # How long a video may be.
    "length": Study(
        (ADACM2, "uniform", "recent_frames", "full"),
        frames=(16, 64, 256, 1024),
        tasks=("needle",),
        **_ONE,
    ),
    "long": Study((ADACM2,), frames=(64, LONG_FRAMES), tasks=("needle",), videos=LONG_VIDEOS),
    # Other kinds of video, with a model of theirs.
    "styles": Study(
        (ADACM2, *RIVALS, "full"),
        frames=(64,),
        styles=STYLES,
        stages=("styles/main",),
        **_ONE,
    ),
    # The same model trained on: short clips; long ones through its memory; with detached memories.
    "training": Study(
        (ADACM2, "full"),
        frames=(64, 256),
        stages=("main", "short", "exact64", "detached64", "exact256"),
        **_ONE,
    ),
}
FAST = ("memories",)


# --- Training on, for the study of it ------------------------------------------------------------


def _on(frames: int, gradient: str = "") -> Change:
    """300 steps of 512 frames more: of short clips with all tokens, or through the memory."""

    def change(config) -> None:
        config.optim.learning_rate = 3e-4
        config.data.suite.num_frames = config.data.sampling.num_frames = frames
        config.train.num_frames, config.train.batch_size = frames, 512 // frames
        config.train.steps = 300
        config.data.suite.train_size = 300 * config.train.batch_size
        config.model.memory.max_frames = frames
        if gradient:
            config.train.gradient = gradient
            config.model.memory.policy = "adacm2"
            config.model.memory.conserve_ratio = share_for(TOKENS, _P, as_fraction("0.05"))

    return change


TRAINED_ON = {
    "short": _on(16),
    "exact64": _on(64, "two_phase"),
    "detached64": _on(64, "detached"),
    "exact256": _on(256, "two_phase"),
}


def main() -> None:
    args = flags.FLAGS
    workdir, seeds, names = checked(args)
    split = args.split
    if args.fast:
        seeds, split = seeds[:1], f"{split}-fast"
    if args.vision_only:
        make_vision(workdir / str(seeds[0]), seeds[0])
        return
    begun = time.perf_counter()
    for name in names:
        study = STUDIES[name]
        for stage in study.stages:
            runs = [
                model(workdir / str(seed), seed, stage)
                for seed in (seeds if study.every_seed else seeds[:1])
            ]
            place = name if len(study.stages) == 1 else f"{name}/{stage}"
            answer(study, runs, workdir / "data", workdir / split / place)
        print(f"{name}: {(time.perf_counter() - begun) / 60:.1f} minutes so far", flush=True)


def checked(args: flags.FlagValues) -> tuple[pathlib.Path, list[int], Sequence[str]]:
    """What the flags say: the directory, the seeds and the studies.

    Raises:
      UserError: naming the flag that says nothing that can be done.
    """
    if not args.workdir:
        raise UserError("--workdir is empty; name a directory, or leave it out")
    check_path(args.workdir, f"--workdir={args.workdir}")
    check_writable(args.workdir, f"--workdir={args.workdir}")
    for seed in args.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds={','.join(args.seeds)}: {seed!r} is no number from 0 on")
    seeds = list(map(int, args.seeds))
    if args.fast and args["studies"].present:
        raise UserError(f"--studies: --fast runs {', '.join(FAST)} alone; leave one of them out")
    names = FAST if args.fast else args.studies
    if unknown := sorted(set(names) - set(STUDIES)):
        raise UserError(
            f"--studies: {', '.join(unknown)} is unknown; there are {', '.join(STUDIES)}"
        )
    for flag, values in (("seeds", seeds), ("studies", names)):
        if not values:
            raise UserError(f"--{flag} is empty; name one, or leave it out")
        if len(set(values)) < len(values):
            raise UserError(f"--{flag}={','.join(map(str, values))} names one twice; leave it out")
    return pathlib.Path(args.workdir), seeds, names


def model(root: pathlib.Path, seed: int, stage: str) -> pathlib.Path:
    """The run that answers, trained where it is not yet."""
    if stage == "styles/main":
        train(root / "styles", seed, STYLES)
        return root / stage
    train(root, seed)
    if stage in TRAINED_ON:
        train_on(root, seed, stage, TRAINED_ON[stage])
    return root / stage


def answer(
    study: Study, runs: Sequence[pathlib.Path], data: pathlib.Path, output: pathlib.Path
) -> None:
    """Answers held-out videos under all memories of a study."""
    args = flags.FLAGS
    videos, frames = study.videos, study.frames
    if args.fast:
        videos, frames = FAST_VIDEOS, frames[:1]
    compare(
        *(word for run in runs for word in ("--model", run)),
        *(word for memory in study.memories for word in ("--memory", memory)),
        *("--tokens", study.tokens, "--frames", ",".join(map(str, frames))),
        *("--vary", f"data.suite.tasks={','.join(study.tasks)}"),
        *("--vary", f"data.suite.styles={','.join(study.styles)}"),
        *("--set", f"data.suite.test_size={videos}", "--set", f"data.data_dir={data}"),
        *("--split", args.split, "--output", output),
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/suite", "Where everything is written.", **options)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "A model each.", **options)
    flags.DEFINE_list("studies", list(STUDIES), "In this order.", **options)
    flags.DEFINE_enum("split", "test", ["val", "test"], "Whose videos are asked about.", **options)
    flags.DEFINE_boolean("fast", False, "One model, one length, few videos.", **options)
    flags.DEFINE_boolean("vision_only", False, "Make the ViT of the first seed alone.", **options)


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
