"""Does an evaluation survive being killed? ``make check-eval-kills``

Trains the tests' model for a few steps and answers a split of it without interruption, under two
policies and with sampling, so that random numbers count, too. Then answers it again into another
directory, where SIGKILL ends the process at a random moment, ten times; each time the same command
goes on. At the end the predictions must equal the undisturbed ones bit for bit, and the results,
but for the seconds. Prints a line a turn; exits with 1 if anything is not so.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTIONS = 240
PROGRESS = "predictions.progress.jsonl"


def run(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def must_end(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=1800)
    if process.returncode:
        sys.exit(f"FAILS  ended with status {process.returncode}:\n{said}")


def done(output: pathlib.Path) -> int:
    """Questions that are answered for good."""
    path = output / PROGRESS
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.split("\n")[1:-1]]
    return records[-1]["done"] if records else 0


def kill_at_random(
    command: list[object], output: pathlib.Path, chance: random.Random
) -> int | None:
    """Starts it and kills it; returns how many questions were answered, None if all were: then the
    results had their names before the process was killed."""
    before = done(output)
    process = run(*command)
    while process.poll() is None and done(output) <= before:
        time.sleep(0.01)
    # Then anywhere within the next few batches: between two, within one, within a line.
    time.sleep(chance.uniform(0, 0.6))
    if process.poll() is not None:
        must_end(process)
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return None if (output / "metrics.json").exists() else done(output)


def results(output: pathlib.Path) -> dict:
    return json.loads((output / "metrics.json").read_text()) | {"seconds": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        small = ["--config=tests/small.py", f"--config.data.data_dir={root / 'data'}"]
        must_end(run("train.py", *small, f"--workdir={root / 'run'}"))
        command: list[object] = [
            "eval.py",
            f"--workdir={root / 'run'}",
            f"--config.data.needle.test_size={QUESTIONS}",
            "--config.eval.policies=('adacm2', 'random')",
            "--config.eval.batch_size=2",
            "--config.generation.temperature=1.0",
        ]
        whole, killed = root / "whole", root / "killed"
        must_end(run(*command, f"--output={whole}"))
        kills = 0
        for turn in range(1, 10 * args.kills):
            count = kill_at_random([*command, f"--output={killed}"], killed, chance)
            if count is None:
                print(f"turn {turn}: ended before it was killed; from the beginning", flush=True)
                for path in killed.iterdir():
                    path.unlink()
                continue
            kills += 1
            print(f"turn {turn}: killed, {count} of {QUESTIONS} questions answered", flush=True)
            if kills == args.kills:
                break
        must_end(run(*command, f"--output={killed}"))
        names = sorted(path.name for path in killed.iterdir() if not path.name.startswith("."))
        checks = {
            f"{kills} kills": kills == args.kills,
            "predictions are the same bit for bit": (killed / "predictions.jsonl").read_bytes()
            == (whole / "predictions.jsonl").read_bytes(),
            "results are the same": results(killed) == results(whole),
            f"nothing is left beside them: {names}": names == ["metrics.json", "predictions.jsonl"],
        }
    for what, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}  {what}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
