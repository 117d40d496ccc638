"""How the numbers of ``configs/suite.py`` were chosen: variants, on other seeds and on ``val``.

    python benchmarks/suite_search.py [--workdir runs/suite-search] [--seeds 10] [--variants slow]

Trains each variant with seeds from 10 on, which no report uses, and prints what it answers right
on ``val``, whose digits are in no other split, keeping all tokens. Five minutes a variant and seed.
"""

import pathlib
import shutil
import sys

from absl import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adacm2_jax.errors import UserError  # noqa: E402
from adacm2_jax.runs import app  # noqa: E402
from adacm2_jax.runs.workdir import check_path  # noqa: E402
from benchmarks._suite import Change, compare, make_vision, train, unchanged  # noqa: E402

FIRST_SEED = 10


def _slow(config) -> None:
    config.optim.groups = (("vision/.*", None), (".*", 1.0))


def _count(config) -> None:
    config.data.suite.tasks = ("needle", "order", "order", "change", "count", "count")


#: Name → what it changes in both stages.
VARIANTS: dict[str, Change] = {
    "base": unchanged,
    "slow": _slow,  # the temporal embedding learns no faster than the rest
    "count": _count,
}


def main() -> None:
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir)
    check_path(workdir, f"--workdir={workdir}")
    for seed in args.seeds:
        if not seed.isdecimal():
            raise UserError(f"--seeds: {seed!r} is no number from 10 on")
    for seed in map(int, args.seeds):
        if seed < FIRST_SEED:
            raise UserError(f"--seeds={seed}: from 10 on; the smaller ones are reported")
        base = workdir / str(seed)
        make_vision(base, seed)
        for name in args.variants:
            root = base / name
            if not (root / "vision").exists():
                shutil.copytree(base / "vision", root / "vision")
            train(root, seed, change=VARIANTS[name])
            output = root / "val"
            compare(
                *("--model", root / "main", "--memory", "full", "--frames", "16,64"),
                *("--vary", "data.suite.tasks=needle,order,change,count", "--split", "val"),
                *("--set", "data.suite.test_size=50", "--set", f"data.data_dir={base / 'data'}"),
                *("--output", output),
            )
            print((output / "report.md").read_text(), flush=True)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    options = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/suite-search", "Where everything is written.", **options)
    flags.DEFINE_list("seeds", ["10"], "From 10 on.", **options)
    flags.DEFINE_multi_enum("variants", list(VARIANTS), list(VARIANTS), "Which.", **options)


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__)
