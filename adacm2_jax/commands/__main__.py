"""The command ``adacm2``; also ``python -m adacm2_jax.commands``."""

import argparse
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from adacm2_jax import __version__, interrupt
from adacm2_jax.config import POLICIES
from adacm2_jax.errors import UserError, check_text

EPILOG = """examples:
  adacm2 ask clip.mp4 --model runs/quickstart/main --question "which digit was on the red ground?"
  adacm2 report clip.mp4 --model runs/quickstart/main --question "…" --output seen
  adacm2 caption clip.mp4 --model weights
  adacm2 choose clip.mp4 --model weights --question "what happens?" --label cooking --label driving
  adacm2 questions lvu_scene --annotations lvu --videos lvu/videos --output lvu_scene.jsonl
  adacm2 score runs/mine/eval/predictions.jsonl --task lvu_scene
  adacm2 serve --model runs/quickstart/main --port 8000
  adacm2 port import --src instructblip-vicuna-7b --dst weights
  adacm2 plan --config configs/lvu.py --topology v5e:4x4
  adacm2 ablate --model runs/suite/main --memory adacm2 --memory random --frames 16,64 --output grid

train, eval, prepare, plan and ablate work on experiments, which are in configs/ of a clone. Exit
status: 0, 1 if some videos could not be read, 2 for what its reader can mend; --debug shows where
that was found."""

DEMO = """Serve a page: a video or a webcam, asked about while it is read, and what is remembered of
it. It listens on this machine alone unless --host says otherwise; whoever reaches it may use it."""

#: Commands whose own flags are parsed elsewhere → what they are for.
ELSEWHERE = {
    "train": "train an experiment (train.py)",
    "eval": "answer a split (eval.py)",
    "prepare": "compute the features of a training set once",
    "port": "convert PyTorch checkpoints to JAX and back",
    "plan": "compile an experiment for accelerators that are not here",
}


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(
        "adacm2",
        description="Questions about long videos, with a visual memory of constant size.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"adacm2 {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def single(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text.capitalize()}.", allow_abbrev=False
        )
        _add_shared(made)
        made.set_defaults(error=made.error)  # which shows its own usage
        return made

    ask = single("ask", "answer questions about one video")
    ask.add_argument(
        "--question", action="append", required=True, help="may be given several times"
    )
    caption = single("caption", "describe one video")
    asked = "(default: what does the video describe?)"  # inference/model.py's CAPTION
    caption.add_argument("--prompt", help=f"what the networks are asked {asked}")
    report = single("report", "answer questions about one video, and show what the answers rest on")
    report.add_argument(
        "--question", action="append", required=True, help="may be given several times"
    )
    report.add_argument(
        "--output", metavar="DIR", required=True, help="report.html and memory.png go there"
    )
    choose = single("choose", "rank labels for one video by how likely each is as the answer")
    choose.add_argument(
        "--label",
        action="append",
        required=True,
        help="give at least two, each within the model's max_answer_len tokens",
    )
    choose.add_argument("--question", help=f"that the labels answer {asked}")
    from adacm2_jax.commands import questions, score, serve
    from adacm2_jax.commands.ablate_flags import add_flags as add_ablate

    scorer = commands.add_parser(
        "score",
        help="score predictions that are on disk, by a benchmark's metrics",
        description="Figures of a split's predictions with their 95 % intervals; needs no model. "
        "docs/tasks.md.",
        allow_abbrev=False,
    )
    score.add_flags(scorer)
    scorer.set_defaults(error=scorer.error)
    asker = commands.add_parser(
        "questions",
        help="write a benchmark's questions as JSON lines, joined with the videos at hand",
        description="Questions of a published annotation as JSON lines, for training, evaluation "
        "and lmms-eval. docs/tasks.md.",
        allow_abbrev=False,
    )
    questions.add_flags(asker)
    asker.set_defaults(error=asker.error)
    server = commands.add_parser(
        "serve",
        help="answer over HTTP: OpenAI's chat completions, and sessions",
        description="Answers questions about videos over HTTP: OpenAI's chat completions, and "
        "sessions, which are streams that may be asked at any moment. docs/serving.md.",
        allow_abbrev=False,
    )
    serve.add_flags(server)
    server.set_defaults(error=server.error)
    grid = commands.add_parser(
        "ablate",
        help="compare memories over lengths and tasks, from trained models",
        description="Memories side by side: every cell of a grid is an evaluation, all memories "
        "read each frame in one pass. Writes answers.csv, accuracy.csv, report.md and figures; a "
        "grid that was stopped goes on. docs/ablate.md.",
        allow_abbrev=False,
    )
    add_ablate(grid)
    grid.set_defaults(error=grid.error)
    for made in (ask, caption):
        made.add_argument("--output", metavar="DIR", help="also write predictions.jsonl there")
    demo = commands.add_parser(
        "demo", help="serve a page to try a model on", allow_abbrev=False, description=DEMO
    )
    _add_demo(demo)
    demo.set_defaults(error=demo.error)
    for name, text in ELSEWHERE.items():
        commands.add_parser(name, help=text, add_help=False)
    return top


def _add_demo(made: argparse.ArgumentParser) -> None:
    _add_model(made)
    made.add_argument(
        "--fps", type=float, default=1.0, help="frames read a second (default %(default)g)"
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    made.add_argument("--port", type=int, default=7860, help="likewise (default %(default)s)")
    made.add_argument(
        "--max-upload",
        default="200mb",
        metavar="SIZE",
        help="the largest video that is taken (default %(default)s)",
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_model(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--model",
        required=True,
        metavar="RUN",
        help="directory of a run of train.py, or of a converted checkpoint (adacm2 port)",
    )
    made.add_argument(
        "--policy",
        choices=POLICIES,
        help="of the memory (default: the run's); recent_frames, budget and merge need a run that "
        "sets their size",
    )
    made.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of matrix products (default: the run's)",
    )
    made.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        help="how the language model's matrices are kept (default: as they are)",
    )


def _add_shared(made: argparse.ArgumentParser) -> None:
    made.add_argument("video", metavar="CLIP", help="a video file")
    _add_model(made)
    made.add_argument(
        "--fps",
        type=float,
        default=1.0,
        help="frames read a second (default %(default)g); above the video's own they repeat",
    )
    made.add_argument(
        "--num-frames", type=int, help="read so many, evenly spread, instead of --fps"
    )
    made.add_argument("--start", type=float, help="seconds: where the part that counts begins")
    made.add_argument("--end", type=float, help="seconds: where it ends")
    made.add_argument(
        "--on-truncated",
        choices=("error", "use"),
        help="of a file that is cut short: refuse it, or use what could be read",
    )
    made.add_argument("--json", action="store_true", help="print JSON, one object a line")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and exits.

    Args:
      argv: the command line with the program's name; by default this process's.
    """
    interrupt.end_at_once()  # what follows imports for seconds
    words = list(sys.argv if argv is None else argv)
    if len(words) > 1 and words[1] in ELSEWHERE:
        _elsewhere(words[1], [f"adacm2 {words[1]}", *words[2:]])
        return
    args, rest = parser().parse_known_args(words[1:])
    if rest:
        args.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command in ("score", "questions"):
        from adacm2_jax.commands import questions, score

        sys.exit({"score": score, "questions": questions}[args.command].main(args))

    def run() -> int:
        for word in words:
            check_text(word, "an argument")
        _check_given(args)
        if args.command == "serve":
            from adacm2_jax.commands import serve

            return serve.serve(args)
        if args.command == "report":
            from adacm2_jax.commands.report import report

            return report(args)
        if args.command == "ablate":
            sys.path.insert(0, os.getcwd())  # generated data are of a clone
            from adacm2_jax.commands.ablate import ablate

            return ablate(args)
        if args.command == "demo":
            from adacm2_jax.commands.demo import demo

            return demo(args)
        from adacm2_jax.commands import ask

        return {"ask": ask.ask, "caption": ask.caption, "choose": ask.choose}[args.command](args)

    from adacm2_jax.runs.app import guarded

    guarded(run, args.debug)


def _check_given(args: argparse.Namespace) -> None:
    """Refuses an empty text: a variable of a shell that was never set, most often."""
    for name, value in vars(args).items():
        flag = "CLIP" if name == "video" else f"--{name.replace('_', '-')}"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise UserError(f"{flag} is empty; give a text, or leave it out where it may be")


def _elsewhere(name: str, words: list[str]) -> None:
    """A command with a parser of its own."""
    if name in ("train", "eval", "prepare", "plan"):  # experiments are files of a clone
        sys.path.insert(0, os.getcwd())
    if name in ("train", "eval"):
        _script(name, words)
    elif name == "prepare":
        from adacm2_jax.commands import prepare

        prepare.run(words)
    elif name == "plan":
        from adacm2_jax.plan import __main__ as plan

        plan.main(words)
    else:
        from adacm2_jax.port import __main__ as port

        sys.exit(port.main(words[1:], "adacm2 port"))


def _script(name: str, words: list[str]) -> None:
    path = pathlib.Path(f"{name}.py")
    if not (path.is_file() and pathlib.Path("adacm2_jax").is_dir()):
        print(
            f"error: adacm2 {name} is {path} of the repository: run it in a clone, at its root",
            file=sys.stderr,
        )
        sys.exit(2)
    sys.argv = words
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    main()
