"""How much does a core of the host read: clips of features, and frames of videos?

    python benchmarks/loader.py [--beside PATH] [--rounds 5] [--clips 8] [--json out.json]

The loader alone, up to the batch that the device is given; no model is run. The clock is the
processor's time of all threads, so a row is what one core does, and what else the machine does has
little influence. Files are in the page cache: storage is not measured.

With ``--beside`` each row is taken in turn with the same row of another checkout (its own code, the
same Python). Frames of videos are compared with a bare loop of PyAV and PIL over the same file.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import _report

HERE = pathlib.Path(__file__).resolve().parent
FRAMES, BATCH = 100, 4
HEIGHTS = (240, 480, 720)
#: Bytes of a clip.
CLIP = {
    "features, bfloat16": FRAMES * 257 * 1408 * 2,
    "features, int8": FRAMES * 257 * (1408 + 4),
}


class Side:
    """A process that measures the code of one checkout."""

    def __init__(self, checkout: pathlib.Path, script: str = "_loader.py"):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script)],
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, **what) -> dict:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(what), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {what} ended the process, see above")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(ours, theirs, rounds: int) -> dict:
    """Rates a core-second of both sides, measured in turn; the ratio is taken round by round.

    Args:
      ours, theirs: measure once; ``theirs`` may be None.
      rounds: after one that counts for nothing.
    """
    sides = [side for side in (ours, theirs) if side]
    for side in sides:
        side()
    rates: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        for number in range(len(sides)) if turn % 2 else reversed(range(len(sides))):
            found = sides[number]()
            rates[number].append(found["count"] / found["core"])
    row = dict(ours=statistics.median(rates[0]))
    if theirs:
        ratios = [a / b for a, b in zip(*rates, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        row |= dict(theirs=statistics.median(rates[1]), ratio=ratio, low=low, high=high)
    return row


def show(name: str, unit: str, row: dict, other: str) -> None:
    """A row as text."""
    text = f"{name:26} {row['ours']:8.2f} {unit} a core-second"
    if "ratio" in row:
        text += f"  {other} {row['theirs']:8.2f}  ours : {other} {_report.ratio(row)}"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beside", type=pathlib.Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5, help="of each row; default 5")
    parser.add_argument("--clips", type=int, default=8, help="of a cache of features; default 8")
    parser.add_argument("--seconds", type=int, default=30, help="of a video; default 30")
    parser.add_argument("--only", default="", help="rows whose name has this")
    parser.add_argument("--json", help="file for the results, which adacm2 plan --loader reads")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need 2 or more")
    if args.clips < BATCH or args.seconds < 1:
        parser.error(
            f"--clips {args.clips} --seconds {args.seconds}: at least {BATCH}, a batch, and 1"
        )
    results = dict(machine=_report.machine(), rows=[])
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        sides = [Side(path) for path in [HERE.parent, args.beside] if path]
        for side in sides:
            stack.callback(side.close)

        def note(name: str, unit: str, row: dict, other: str) -> None:
            show(name, unit, row, other)
            size = {"bytes": CLIP[name]} if name in CLIP else {}
            results["rows"].append(dict(name=name, unit=unit, other=other) | size | row)

        def both(name: str, unit: str, **what) -> None:
            if args.only in name:
                measures = [lambda side=side: side(**what) for side in sides]
                row = compare(*(measures + [None])[:2], args.rounds)
                note(name, unit, row, "beside")

        for dtype in ("bfloat16", "int8"):
            both(
                f"features, {dtype}",
                "clips",
                what="features",
                directory=f"{made}/{dtype}",
                dtype=dtype,
                count=args.clips,
                frames=FRAMES,
                batch=BATCH,
            )
        for height in HEIGHTS:
            name = f"pixels, {height}p"
            if args.only not in name:
                continue
            path = f"{made}/{height}.mp4"
            sides[0](what="make_video", path=path, height=height, seconds=args.seconds)
            given = dict(path=path, seconds=args.seconds, videos=max(1, 1440 // height))
            if args.beside:
                both(name, "frames", what="pixels", **given)
            row = compare(
                lambda given=given: sides[0](what="pixels", **given),
                lambda given=given: sides[0](what="bare", **given),
                args.rounds,
            )
            note(name, "frames", row, "bare")
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
