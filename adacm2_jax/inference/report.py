"""The report about one video: a page in one file, and the frames that it shows.

The page needs nothing from elsewhere and runs no script: its content security policy forbids both.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from adacm2_jax.inference.panels import (
    STYLE,
    Picture,
    Shown,
    bytes_lines,
    cards,
    encode_picture,
    escaped,
    size_text,
    timeline,
)
from adacm2_jax.inference.picture import Counts, choose_frames
from adacm2_jax.inference.reply import Reply
from adacm2_jax.inference.study import Study

#: Frames that the page shows of one question, at most; the timeline has all of them.
MOST_PICTURES = 60
#: Longer side of a frame that is kept for the pictures, pixels.
_SIDE = 480

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body{{margin:0;background:#fff}}
main{{max-width:1200px;margin:0 auto;padding:28px 24px 60px}}
section{{border-top:1px solid #e5e7eb;margin-top:26px;padding-top:20px}}
{style}</style>
</head>
<body><main class="memory">
<h1>{title}</h1>
<p class="note">{about}</p>
{sections}
{cost}
</main></body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Report:
    """What is shown of a video.

    Attributes:
      study: its answers, what they rest on and cost.
      model: where the model is, as it was given.
      frames: uint8[height, width, 3] of the frames that are shown, by their numbers.
    """

    study: Study
    model: str
    frames: Mapping[int, np.ndarray]


def make_report(study: Study, model: str | os.PathLike) -> Report:
    """Reads the frames that are to be shown from the video once more.

    Args:
      study: of the video.
      model: directory of the model.

    Raises:
      DataError: if the video cannot be read any more.
    """
    from adacm2_jax.video.frames import pictures_at

    wanted = sorted({t for number in range(len(study.replies)) for t in _pictured(study, number)})
    video = study.replies[0].video
    pictures = pictures_at(video, [float(study.times[t]) for t in wanted])
    frames = {t: _smaller(picture) for t, picture in zip(wanted, pictures, strict=True)}
    return Report(study, os.fspath(model), frames)


def counts_of(study: Study, number: int) -> Counts:
    """Tokens of a layer seen, kept, and kept at most, by the memory of question ``number``."""
    reply = study.replies[number]
    return Counts(reply.total_tokens, reply.kept_tokens, study.bound)


def row_of(study: Study, number: int) -> list[int]:
    """The frames above the timeline: those that hold most, the newest, and dropped ones."""
    return choose_frames(_held(study, number))


def page(report: Report) -> str:
    """The report as HTML."""
    study = report.study
    first = study.replies[0]
    pictures = {t: encode_picture(frame) for t, frame in report.frames.items()}
    name = pathlib.PurePath(first.video).name
    seconds = float(study.times[-1] - study.times[0])
    about = (
        f"{escaped(first.video)} · {first.frames:,} frames read over {seconds:.4g} s · model "
        f"{escaped(report.model)} · policy {escaped(first.policy)}"
    )
    sections = [_section(study, number, pictures) for number in range(len(study.replies))]
    return _PAGE.format(
        title=escaped(f"What is remembered of {name}"),
        style=STYLE,
        about=about,
        cost=_cost(study),
        sections="\n".join(sections),
    )


def _section(study: Study, number: int, pictures: Mapping[int, Picture]) -> str:
    """One question: its answer beside that of ``recent``, and what it rests on."""
    reply, counts = study.replies[number], counts_of(study, number)
    answers = [_answer(reply)]
    for name, replies in study.beside.items():
        other = replies[number]
        answers.append(_answer(other, f"policy {name}, {other.kept_tokens:,} tokens"))
    note = "" if study.beside else f'<p class="note">{_WHY_ALONE[reply.policy]}</p>'
    shown = Shown(
        kept=study.kept[number],
        seen=reply.frames,
        time_of=lambda t: float(study.times[t]),
        grid=study.grid,
        pictures={t: pictures[t] for t in _pictured(study, number)},
    )
    bound = "no bound" if counts.bound is None else f"{counts.bound:,}"
    tokens = [
        (f"{counts.seen:,}", "tokens seen"),
        (f"{counts.kept:,}", "tokens kept, in the fullest layer"),
        (bound, "the most that a layer can keep"),
    ]
    return (
        f"<section><h2>{escaped(reply.question)}</h2>{cards(answers, first=True)}{note}"
        f"{cards(tokens)}<h3>What is remembered, and from when</h3>"
        f"{timeline(shown, row_of(study, number) if study.kept[number] else (), f'q{number}')}"
        '<p class="note">Outlined patches are kept; CLS is the token that stands for a whole '
        "frame. Bars say how many tokens a layer holds of each frame.</p></section>"
    )


#: Why there is no other answer beside the one of a policy.
_WHY_ALONE = {
    "recent": "The policy is recent itself: it keeps the newest tokens, and there is nothing to "
    "compare it with.",
    "full": "Policy full keeps every token, so the newest as many are the same ones.",
}


def _answer(reply: Reply, label: str = "") -> tuple[str, str]:
    label = label or f"policy {reply.policy}, {reply.kept_tokens:,} tokens"
    return reply.answer or "(empty)", f"{label}; score {reply.score:.3f}"


def _cost(study: Study) -> str:
    """Bytes over frames, and the times that were measured."""
    several = len(study.replies) > 1
    both = "and both memories" if study.beside else "and the memory"
    times = [
        (f"{study.frame_ms:.3g} ms", f"a frame: decoding, vision network {both}"),
        (
            f"{study.first_token_ms:.3g} ms",
            f"to the first token{f' of all {len(study.replies)} answers' if several else ''}",
        ),
        (size_text(study.bytes[-1][1]), "the memory of a question"),
        (size_text(study.keep_all.at(study.bytes[-1][0])), "if every token were kept"),
    ]
    return (
        f"<section><h2>What it costs</h2>{cards(times)}<h3>Bytes of the memory, by frames read</h3>"
        f"{bytes_lines(study.bytes, study.keep_all)}"
        '<p class="note">Of one question, keys and values of all layers; measured after every '
        "chunk of frames. Times were measured in this run, once all programs were compiled.</p>"
        "</section>"
    )


def _held(study: Study, number: int) -> np.ndarray:
    """int[T]: tokens that each frame holds, all layers together."""
    held = np.zeros(len(study.times), int)
    for pairs in study.kept[number]:
        np.add.at(held, pairs[:, 0], 1)
    return held


def _pictured(study: Study, number: int) -> list[int]:
    """The frames that the page shows of a question."""
    if not study.kept[number]:
        return []
    held = _held(study, number)
    holding = {t for t in choose_frames(held, MOST_PICTURES, 0) if held[t]}
    return sorted(holding | set(choose_frames(held)))


def _smaller(picture: np.ndarray) -> np.ndarray:
    step = -(-max(picture.shape[:2]) // _SIDE)
    if step < 2:
        return picture
    from PIL import Image

    size = picture.shape[1] // step, picture.shape[0] // step
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
