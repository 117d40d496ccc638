"""Single videos: ``adacm2 ask``, ``caption`` and ``choose``."""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from adacm2_jax.errors import printable
from adacm2_jax.files import check_writable, keep_earlier, write_text
from adacm2_jax.inference.model import CAPTION, VideoModel
from adacm2_jax.inference.reply import Choice, Reply
from adacm2_jax.runs.load import load
from adacm2_jax.runs.lock import locked_output
from adacm2_jax.video.sampling import ONE_A_SECOND, Sampling


def ask(args: argparse.Namespace) -> int:
    """``adacm2 ask CLIP --model RUN --question …``."""
    return _answer(args, args.question)


def caption(args: argparse.Namespace) -> int:
    """``adacm2 caption CLIP --model RUN``."""
    return _answer(args, [args.prompt or CAPTION])


def choose(args: argparse.Namespace) -> int:
    """``adacm2 choose CLIP --model RUN --label a --label b``."""
    question = args.question or CAPTION
    reading = reading_of(args)
    choices = open_model(args).choose(args.video, args.label, question, **reading)
    for choice in choices:
        print(json.dumps(dataclasses.asdict(choice)) if args.json else _choice_line(choice))
    return 0


def print_replies(replies: Sequence[Reply]) -> None:
    """Answers with their evidence, for a terminal."""
    several = len({reply.policy for reply in replies}) > 1
    for reply in replies:
        policy = f"[{reply.policy}] " if several else ""
        print(f"{policy}{printable(reply.question)}  {reply.answer}")
        print(f"  {evidence(reply)}")


def evidence(reply: Reply) -> str:
    """What an answer rests on, in a line."""
    text = (
        f"score {reply.score:.3f}; {reply.frames} frames read, {reply.kept_tokens} of "
        f"{reply.total_tokens} tokens kept"
    )
    if reply.moments:
        text += f"; remembered most: {', '.join(clocks([each.time for each in reply.moments]))}"
    return text


def write_replies(replies: Sequence[Reply], output: str | os.PathLike) -> None:
    """Writes ``predictions.jsonl``; one that is there gets a number."""
    path = pathlib.Path(output) / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    keep_earlier(path)
    write_text(path, "".join(json.dumps(reply_line(reply)) + "\n" for reply in replies))


def reply_line(reply: Reply) -> dict[str, Any]:
    """A reply as a line of ``predictions.jsonl``, with the fields that a split's lines have."""
    line = dataclasses.asdict(reply)
    # There ``answer`` is the right one, which nobody knows here.
    line = {"id": reply.video, "prediction": line.pop("answer"), **line}
    if len(reply.n_best) < 2:
        del line["n_best"]
    return line


def clocks(times: Sequence[float]) -> list[str]:
    """Times in seconds as texts, each once, with the fewest decimals that tell them apart."""
    for decimals in range(1, 7):
        texts = dict.fromkeys(clock(time, decimals) for time in times)
        if len(texts) == len(set(times)):
            break
    return list(texts)


def clock(seconds: float, decimals: int = 1) -> str:
    """Such as ``0:07`` or ``1:02:03``; so many decimals, less the zeros at the end."""
    whole, rest = divmod(round(seconds * 10**decimals), 10**decimals)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
    return f"{text}.{rest:0{decimals}d}".rstrip("0") if rest else text


def _answer(args: argparse.Namespace, questions: Sequence[str]) -> int:
    """Asks, once all that can be wrong has been looked at."""
    reading = reading_of(args)
    if args.output:
        check_writable(args.output, f"--output {args.output}")
    model = open_model(args)
    with contextlib.ExitStack() as held:
        if args.output:
            model.check(args.video, questions=questions, **reading)
            held.enter_context(locked_output(args.output))
        _show(model.ask(args.video, questions, **reading), args)
    return 0


def open_model(args: argparse.Namespace, compare: bool = False) -> VideoModel:
    """The model that is asked; for ``compare`` see ``load``."""
    return load(
        args.model,
        policy=args.policy or "",
        dtype=args.dtype or "",
        quantize=args.quantize or "",
        on_truncated=args.on_truncated or "",
        compare=compare,
    )


def reading_of(args: argparse.Namespace) -> dict[str, Any]:
    """Which frames are read, as ``VideoModel.ask`` takes it."""
    sampling = dataclasses.replace(ONE_A_SECOND, fps=args.fps)
    if args.num_frames is not None:
        sampling = Sampling("uniform", num_frames=args.num_frames)
    return {"sampling": sampling, "start": args.start, "end": args.end}


def _show(replies: Sequence[Reply], args: argparse.Namespace) -> None:
    if args.output:
        write_replies(replies, args.output)
    if args.json:
        for reply in replies:
            print(json.dumps(reply_line(reply)))
    else:
        print_replies(replies)


def _choice_line(choice: Choice) -> str:
    return (
        f"{choice.probability:7.1%}  {choice.label}  (log-likelihood {choice.log_likelihood:.3f})"
    )
