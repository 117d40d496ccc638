"""Builds test sets of the suite as video files with JSON lines, and contact sheets of them.

python -m data.suite --output DIR --task needle,order --style grounds --frames 64 --videos 250
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Sequence

from adacm2_jax.errors import UserError
from data.needle.render import FRAME_SIZE
from data.suite.builder import build
from data.suite.plan import TASKS
from data.suite.sheet import write_sheet
from data.suite.styles import STYLES
from data.suite.video import SPLITS, Kind


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = _parse(argv)
    try:
        kinds = [
            Kind(
                task,
                style,
                args.frames,
                questions=args.questions,
                needle_frames=args.needle_frames,
                ages=tuple(args.ages or ()),
                share=args.share,
                seed=args.seed,
            )
            for style, task in itertools.product(args.style, args.task)
        ]
        root = pathlib.Path(args.output)
        if args.videos:
            path = build(root, kinds, args.split, args.videos, args.size)
            print(path)
        if args.sheet:
            root.mkdir(parents=True, exist_ok=True)
            for kind in kinds:
                path = root / f"{args.split}-{kind.task}-{kind.style}-t{kind.num_frames}.png"
                write_sheet(path, kind, args.split)
                print(path)
    except UserError as error:
        print(f"python -m data.suite: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m data.suite", description=__doc__.split("\n")[0])

    def names(text: str) -> list[str]:
        return list(dict.fromkeys(name for name in text.split(",") if name))

    add = parser.add_argument
    add("--output", required=True, help="directory of this set alone")
    add("--task", type=names, default=["needle"], help=f"of {', '.join(TASKS)}")
    add("--style", type=names, default=["grounds"], help=f"of {', '.join(STYLES)}")
    add("--frames", type=int, default=64, help="of a video, which has one a second")
    add("--videos", type=int, default=250, help="of each task in each style; 0: the sheets alone")
    add("--questions", type=int, default=4, help="about a video, at most")
    add("--split", choices=SPLITS, default="test")
    add("--needle-frames", type=int, default=0, help="of a shot that is asked about")
    add("--ages", type=int, nargs=2, metavar=("LEAST", "MOST"), help="frames after it")
    add("--share", type=float, default=0.0, help="of a frame's side that a digit takes")
    add("--size", type=int, default=FRAME_SIZE, help="side of the videos, pixels; even")
    add("--seed", type=int, default=0, help="another one gives other videos")
    add("--sheet", action="store_true", help="write a contact sheet of each task and style")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
