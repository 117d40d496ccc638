"""For how much of the time does a device wait for features, at the rate of a v5e host?

    python benchmarks/fed_host.py [--beside PATH] [--clips 81.4] [--rounds 3] [--json out.json]

The whole loop of training: stored features of full size (100 frames of 257 tokens of 1,408) are
read, made into batches, put on JAX's device and given to a step; the step is a sleep, as long as a
host of v5e chips takes for as many clips by ``adacm2 plan configs/lvu.py --topology v5e:4x4``
(81.4 clips a second and host). Such a host has 112 cores, this machine perhaps two: the second
row takes the share of the rate that falls on two of them. Files are in the page cache. Peak
resident memory of the process is told, too.
"""

import argparse
import contextlib
import pathlib
import statistics
import tempfile

import _report
from loader import BATCH, FRAMES, Side

#: Clips a second and host, cores of such a host.
RATE, CORES = 81.4, 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beside", type=pathlib.Path, help="another checkout")
    parser.add_argument("--clips", type=float, default=RATE, help="a second that a host eats")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of one measurement")
    parser.add_argument("--stored", type=int, default=16, help="clips in the cache")
    parser.add_argument("--json")
    args = parser.parse_args()
    results = dict(machine=_report.machine(), rows=[])
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()))
    cores = results["machine"].get("cores", 2)
    rates = {"a whole host": args.clips, f"{cores} of {CORES} cores": args.clips * cores / CORES}
    places = {"ours": pathlib.Path(__file__).parents[1], "beside": args.beside}
    for dtype in ("bfloat16", "int8"):
        # Processes of its own, for the most that they held is told.
        with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
            sides = {name: Side(path, "_fed.py") for name, path in places.items() if path}
            for side in sides.values():
                stack.callback(side.close)
            for name, rate in rates.items():
                found: dict[str, list[dict]] = {side: [] for side in sides}
                seconds = BATCH / rate
                for _ in range(args.rounds):
                    for side, measure in sides.items():
                        found[side].append(
                            measure(
                                directory=made,
                                dtype=dtype,
                                count=args.stored,
                                frames=FRAMES,
                                batch=BATCH,
                                seconds=seconds,
                                steps=max(4, round(args.seconds / seconds)),
                            )
                        )
                row = dict(dtype=dtype, rate=rate, name=name)
                text = f"{dtype:9} {name:18} {rate:6.1f} clips/s: waits"
                for side, values in found.items():
                    row[side] = statistics.median(value["waited"] for value in values)
                    row[f"{side}_memory"] = max(value["memory"] for value in values)
                    text += f"  {side} {row[side]:.1%} ({row[f'{side}_memory'] / 1e9:.2f} GB)"
                results["rows"].append(row)
                print(text, flush=True)
    _report.write_json(args.json, results)


if __name__ == "__main__":
    main()
