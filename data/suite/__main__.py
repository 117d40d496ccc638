"""Builds test sets of the suite as video files with JSON lines, and contact sheets of them.

python -m data.suite --output DIR --task needle,order --style grounds --frames 64 --videos 250
"""

import argparse
import itertools
import os
import pathlib
import sys
from collections.abc import Sequence

from adacm2_jax.errors import UserError, printable
from adacm2_jax.files import check_writable
from adacm2_jax.interrupt import STATUS
from data.needle.render import FRAME_SIZE
from data.suite.builder import build
from data.suite.plan import TASKS
from data.suite.sheet import write_sheet
from data.suite.styles import STYLES
from data.suite.video import SPLITS, Kind

#: Videos on a sheet, at most.
_STRIPS = 4


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
            print(build(root, kinds, args.split, args.videos, args.size), flush=True)
        if args.sheet:
            check_writable(root, f"--output {args.output}")
            root.mkdir(parents=True, exist_ok=True)
            for kind in kinds:
                path = root / f"{kind.name(args.split)}.png"
                write_sheet(path, kind, args.split, min(args.videos or _STRIPS, _STRIPS))
                print(path, flush=True)
    except UserError as error:
        print(f"python -m data.suite: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the names has left, as `head` does: all that they name is there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        why = printable(error.strerror or str(error))
        print(f"python -m data.suite: --output {printable(args.output)}: {why}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on where it was", file=sys.stderr)
        return STATUS
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
    args = parser.parse_args(argv)
    for flag in ("output", "task", "style"):
        if not getattr(args, flag):
            parser.error(f"--{flag} is empty; name one, or leave it out where it may be")
    for flag, least in dict(frames=1, videos=0, questions=1, needle_frames=0, share=0).items():
        if not getattr(args, flag) >= least:  # neither is `nan`
            name = flag.replace("_", "-")
            parser.error(f"--{name} {getattr(args, flag):g} must be {least} or more")
    if not args.videos and not args.sheet:
        parser.error("--videos 0 makes sheets alone; add --sheet")
    return args


if __name__ == "__main__":
    sys.exit(main())
