"""A :class:`~adacm2_jax.demo.live.View` as HTML."""

from adacm2_jax.demo.live import View
from adacm2_jax.inference.panels import (
    STYLE,
    Shown,
    bytes_lines,
    cards,
    escaped,
    size_text,
    timeline,
)
from adacm2_jax.inference.picture import SHOWN
from adacm2_jax.inference.reply import Reply


def answers(view: View | None) -> str:
    """The last answer beside that of the newest tokens."""
    if view is None or view.reply is None or view.beside is None:
        return _piece('<p class="note">Nothing has been asked yet.</p>')
    reply = view.reply
    memory = "the open memory" if reply.policy == "open" else f"policy {reply.policy}"
    values = [
        (reply.answer or "(empty)", f"{memory}{_of(reply)}"),
        (view.beside.answer or "(empty)", f"as many tokens, the newest{_of(view.beside)}"),
    ]
    asked = f'<p class="note">{escaped(reply.question)} (after {reply.frames:,} frames)</p>'
    return _piece(f"{asked}{cards(values, first=True)}")


def memory(view: View | None) -> str:
    """What is remembered: counts, frames over time, bytes."""
    if view is None:
        return _piece('<p class="note">No frame has been read yet.</p>')
    numbers = [
        (f"{view.seen:,}", f"tokens seen, of {view.frames:,} frames"),
        (f"{view.kept:,}", "kept by all memories"),
        (f"{view.bound:,}", "the most they can keep"),
        (_milliseconds(view.frame_ms), "a frame, with the memory it is compared with"),
        (_milliseconds(view.first_token_ms), "to the first token"),
    ]
    drawn = ""
    if view.frames:
        drawn = (
            f"<h3>What is remembered, and from when</h3>"
            f"{timeline(view.shown, row_of(view.shown), 'live')}"
            "<h3>Bytes, by frames read</h3>"
            f"{bytes_lines([(view.frames, view.size)], view.keep_all, 'this stream')}"
            f'<p class="note">The stream holds {size_text(view.size)}: its memories and the newest '
            "frame, which is held whole.</p>"
        )
    return _piece(f"{cards(numbers)}{drawn}")


def row_of(shown: Shown) -> list[int]:
    """The frames above the timeline: the newest, and of those that are held the fullest."""
    counts = shown.counts()
    fullest = sorted(counts, key=lambda t: (-sum(counts[t]), t))
    row = list(dict.fromkeys([shown.newest, *fullest]))
    return sorted([t for t in row if t in shown.pictures][:SHOWN])


def _of(reply: Reply) -> str:
    return f", {reply.kept_tokens:,} tokens; score {reply.score:.3f}"


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _piece(inner: str) -> str:
    return f'<style>{STYLE}</style><div class="memory">{inner}</div>'
