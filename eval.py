"""Answers questions about videos: a whole split, or one video.

    python eval.py --workdir runs/quickstart/main
    python eval.py --workdir runs/quickstart/main --video clip.mp4 --question "which digit …?"

Writes ``predictions.jsonl`` and ``metrics.json``; earlier ones get a number. The experiment is that
of the run; fields are overridden as in training, for example
``--config.model.memory.recent_ratio=0.2``. A single video is read at one frame a second, unless
``--config.data.sampling`` says otherwise. ``adacm2 ask`` does the same without a clone.
"""

if __name__ == "__main__":  # Ctrl-C ends the imports, too, which take seconds
    from adacm2_jax import interrupt

    interrupt.end_at_once()

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from adacm2_jax.commands import select
from adacm2_jax.commands.ask import print_replies, write_replies
from adacm2_jax.commands.evaluate import check_questions, evaluate, task_of
from adacm2_jax.distributed import is_main, main_first
from adacm2_jax.errors import UserError, check_text
from adacm2_jax.files import check_writable
from adacm2_jax.inference.evaluate import table
from adacm2_jax.inference.processor import Processor
from adacm2_jax.runs import app, experiment
from adacm2_jax.runs.experiment import MAY_CHANGE, check_same
from adacm2_jax.runs.load import (
    check_base,
    load_params,
    make_answerer,
    stored_experiment,
    video_model,
)
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.runs.workdir import is_base, read_config
from adacm2_jax.video.sampling import ONE_A_SECOND
from data.sources import open_source
from data.training_set import warn_of_missing


def define_flags() -> None:
    config_flags.DEFINE_config_file(
        "config", lock_config=True, help_string="The experiment; by default the run's own."
    )
    flags.DEFINE_string("workdir", None, "The run whose model answers.")
    flags.DEFINE_string("video", None, "A video file, instead of the experiment's split.")
    flags.DEFINE_multi_string("question", [], "About --video; may be given several times.")
    flags.DEFINE_string("output", None, "Where results are written; default: WORKDIR/eval.")


def main() -> int:
    args = flags.FLAGS
    if args.workdir is None:
        raise UserError("--workdir is missing: name a run, such as --workdir runs/quickstart/main")
    if "" in map(str.strip, [*args.question, "-" if args.video is None else args.video]):
        raise UserError("--question or --video is empty; give a text, or leave both out")
    if bool(args.video is not None) != bool(args.question):
        raise UserError("--video and --question go together: what is asked, and of which video")
    workdir, config = app.directory("workdir", args.workdir), experiment.read(args.config)
    # A run or a converted checkpoint; else a directory to be, whose model comes from init_from.
    known = not config.init_from or (pathlib.Path(workdir) / "config.json").exists()
    weights = workdir if known else config.init_from
    if is_base(weights):
        check_base(weights, config.model)
    else:
        stored = experiment.to_dict(stored_experiment(weights))
        check_same(stored, experiment.to_dict(config), weights, MAY_CHANGE["evaluate"])
    output = args.output if args.output is not None else f"{workdir}/eval"
    output = app.directory("output", output)
    select.check(config, weights, args.video is not None)
    processor = Processor.load(weights, config.model)
    if args.video is not None:
        return ask(config, weights, processor, output)

    config.memories()
    source = main_first(lambda: open_source(config.data, config.eval.split))
    task = task_of(config)
    check_questions(config, processor, source, task)
    warn_of_missing(source, "videos")
    if is_main():
        check_writable(output, f"--output={output}")
    with locked_output(output):
        config, notes = with_step(config, weights, processor, output)
        answerer = make_answerer(config, load_params(config, weights), processor)
        results = evaluate(config, answerer, source, output, task, notes)
    if is_main():
        print(table(results))
    return 1 if results["failed"] else 0


def with_step(config, weights: str, processor: Processor, output: str) -> tuple:
    """The experiment with the step of ``eval.select``, if that is set, and what to note of it."""
    settings = config.eval
    if not settings.select:
        return config, {"step": settings.step} if settings.step else {}

    def answerer(config):
        return make_answerer(config, load_params(config, weights), processor)

    source = main_first(lambda: open_source(config.data, settings.select))
    step = select.choose_step(config, weights, answerer, source, output, task_of(config))
    settings = dataclasses.replace(settings, step=step)
    return dataclasses.replace(config, eval=settings), {"step": step, "chosen_on": settings.select}


def ask(config, weights: str, processor: Processor, output: str) -> int:
    """Questions about the one video of ``--video``."""
    args = flags.FLAGS
    processor.questions([config.data.ask(check_text(text, "--question")) for text in args.question])
    own = any(word.lstrip("-").startswith("config.data.sampling") for word in sys.argv)
    sampling = config.data.sampling if own else ONE_A_SECOND
    model = video_model(config, lambda: load_params(config, weights), processor)
    model.check(args.video, sampling=sampling)
    if is_main():
        check_writable(output, f"--output={output}")
    with locked_output(output):
        replies = model.ask(args.video, args.question, sampling=sampling)
        if is_main():
            write_replies(replies, output)
            print_replies(replies)
    return 0


def with_config(argv: Sequence[str]) -> list[str]:
    """Names the run's own experiment where the command does not name one."""
    if any(word.split("=")[0] in ("--config", "-config") for word in argv):
        return list(argv)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--workdir", "-workdir"):
            workdir = app.directory("workdir", value if equals else following)
            read_config(workdir)  # says more clearly than ml_collections if there is none
            recipe = pathlib.Path(__file__).parent / "configs" / "run.py"
            # First, for ml_collections reads overrides by the configuration before them.
            return [argv[0], f"--config={recipe}:{workdir}", *argv[1:]]
    return list(argv)


if __name__ == "__main__":
    define_flags()
    app.run(main, sys.argv, __doc__, with_config)
