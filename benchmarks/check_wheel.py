"""Does the wheel answer, installed with its extra ``video`` alone, from an empty directory?

    python benchmarks/check_wheel.py VENV [RUN CLIP]

VENV is an empty virtual environment. RUN is a run of train.py (by default a tiny one that is
trained here), CLIP a video file (by default one that is made here). Prints what was measured and
exits with 1 if something does not hold:

* ``import adacm2_jax`` imports no other package, in less than 0.3 s beyond Python's own start;
* ``adacm2 ask`` answers; so does ``adacm2_jax.load(…).ask(…)``;
* the second call of ``adacm2 ask`` (compiled programs are kept) takes so many seconds, of which so
  many are imports;
* without the extra, the command says how to install it.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
QUESTION = "which digit was on the red ground?"


def main() -> int:
    venv = pathlib.Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as made:
        directory = pathlib.Path(made)
        run, clip = map(pathlib.Path, sys.argv[2:]) if len(sys.argv) > 2 else make_run(directory)
        failures = check(venv, run.absolute(), clip.absolute(), directory)
    print(f"does not hold: {'; '.join(failures)}" if failures else "the wheel answers")
    return 1 if failures else 0


def check(venv: pathlib.Path, run: pathlib.Path, clip: pathlib.Path, made: pathlib.Path) -> list:
    python, empty = venv / "bin" / "python", made / "empty"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "PYTHON"))}
    environment["XDG_CACHE_HOME"] = str(made / "cache")

    def call(*command: object) -> tuple[subprocess.CompletedProcess, float]:
        begun = time.perf_counter()
        done = subprocess.run(
            list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True
        )
        return done, time.perf_counter() - begun

    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wheel(made)
    (path,) = made.glob("*.whl")
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
    failures = []
    constraint = ["--constraint", ROOT / "requirements.txt"]
    subprocess.run([*map(str, pip), *map(str, constraint), str(path)], check=True)

    done, seconds = call(python, "-c", "pass")
    alone = min(call(python, "-c", "pass")[1], seconds)
    seconds = min(call(python, "-c", "import adacm2_jax")[1] for _ in range(3)) - alone
    print(f"import adacm2_jax: {seconds:.3f} s")
    if seconds >= 0.3:
        failures.append("the import takes too long")

    ask = [venv / "bin" / "adacm2", "ask", clip, "--model", run, "--question", QUESTION]
    done, _ = call(*ask)
    print(f"without the extra: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode != 2 or "pip install 'adacm2-jax[video]'" not in done.stderr:
        failures.append("the command does not say how to install the extra")

    subprocess.run([*map(str, pip), *map(str, constraint), f"{path}[video]"], check=True)
    for number in (1, 2):
        done, seconds = call(*ask)
        print(f"adacm2 ask, call {number}: {seconds:.1f} s\n{done.stdout}", end="")
        if done.returncode or not done.stdout.startswith(QUESTION):
            failures.append(f"adacm2 ask: {done.stderr.strip()}")
    imports = "import adacm2_jax.commands.ask, av, PIL, tokenizers, orbax.checkpoint"
    print(f"of it imports: {call(python, '-c', imports)[1]:.1f} s")
    program = f"import adacm2_jax; print(adacm2_jax.load({str(run)!r}).ask({str(clip)!r}, 'what?'))"
    done, _ = call(python, "-c", program)
    print(done.stdout, end="")
    if done.returncode or "Reply(" not in done.stdout:
        failures.append(f"adacm2_jax.load: {done.stderr.strip()}")
    return failures


def wheel(directory: pathlib.Path) -> None:
    """Builds it from what git tracks, so that nothing of the clone can slip in or be missed."""
    source = directory / "source"
    source.mkdir()
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, str(directory), str(source)], check=True)


def make_run(directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """The tests' smallest run, and a clip of twenty seconds."""
    command = [sys.executable, "train.py", "--config=tests/small.py", "--config.train.steps=2"]
    command += [f"--workdir={directory / 'run'}", f"--config.data.data_dir={directory / 'data'}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    program = (
        "import sys; from tests.video.make_videos import encode, numbered_frames\n"
        "encode(sys.argv[1], numbered_frames(200), fps=10)"
    )
    clip = directory / "clip.mp4"
    subprocess.run([sys.executable, "-c", program, str(clip)], cwd=ROOT, check=True)
    return directory / "run", clip


if __name__ == "__main__":
    sys.exit(main())
