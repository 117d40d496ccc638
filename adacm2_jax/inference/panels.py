"""What is shown of a memory, as HTML: frames with their kept patches, a timeline, a line of bytes.

Each function gives a piece of a page that needs nothing from elsewhere: pictures are data URLs,
drawings inline SVG, and :data:`STYLE` the one style sheet of all pieces. Whatever comes from
outside is escaped. Needs Pillow for :func:`encode_picture` alone.
"""

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from adacm2_jax.errors import printable
from adacm2_jax.inference.study import Line

#: Longer side of a picture, pixels.
SIDE = 176
_WIDE, _GAP, _LEFT = 1000.0, 6.0, 58.0
_COLOURS = {"ink": "#1f2937", "muted": "#6b7280", "faint": "#cfd5dd", "kept": "#0d9488"}

STYLE = """
.memory{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#1f2937;background:#fff}
.memory *{box-sizing:border-box}
.memory h1{font-size:22px;margin:0 0 4px}
.memory h2{font-size:19px;margin:0 0 12px}
.memory h3{font-size:14px;margin:22px 0 6px;color:#1f2937}
.memory p{margin:4px 0}
.memory .note{color:#6b7280;font-size:13px}
.memory .cards{display:flex;flex-wrap:wrap;gap:12px;margin:8px 0}
.memory .card{border:1px solid #e5e7eb;border-radius:10px;padding:10px 14px;min-width:118px;
  background:#fff}
.memory .card b{display:block;font-size:22px;line-height:1.25;color:#1f2937;
  overflow-wrap:anywhere;white-space:pre-wrap}
.memory .card span{color:#6b7280;font-size:13px}
.memory .card.first{border-color:#0d9488;border-width:2px}
.memory .card.first b{color:#0d9488}
.memory svg{display:block;width:100%;height:auto;max-width:1160px;overflow:visible}
.memory svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}
.memory .frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:8px;
  max-width:1160px}
.memory .layers{margin:2px 0 6px;font-size:13px;color:#6b7280}
.memory .layers label{display:inline-block;border:1px solid #cfd5dd;border-radius:12px;
  padding:0 10px;margin:0 4px 4px 0;cursor:pointer;color:#1f2937}
.memory .pick{position:absolute;opacity:0;pointer-events:none}
.memory .y{display:none}
.memory details{margin:8px 0}
.memory summary{cursor:pointer;color:#0d9488;font-size:14px}
"""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A frame as it is shown.

    Attributes:
      url: a data URL.
      width, height: pixels.
    """

    url: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """What is drawn of one memory.

    Attributes:
      kept: for each layer int[n, 2], frame and place in it (0 is CLS, then the patches row by row).
      seen: T, frames read so far.
      time_of: the number of a frame → seconds.
      grid: patches of a frame, rows and columns.
      pictures: of frames by their numbers; at least of those that hold tokens.
      newest: a frame that is held whole beside the memory, by its number; -1 where there is none.
    """

    kept: Sequence[np.ndarray]
    seen: int
    time_of: Callable[[int], float]
    grid: tuple[int, int]
    pictures: Mapping[int, Picture]
    newest: int = -1

    def counts(self) -> dict[int, list[int]]:
        """The frames that hold tokens, in time order → how many tokens in each layer."""
        found: dict[int, list[int]] = {}
        for layer, pairs in enumerate(self.kept):
            for frame in np.asarray(pairs).reshape(-1, 2)[:, 0]:
                found.setdefault(int(frame), [0] * len(self.kept))[layer] += 1
        return dict(sorted(found.items()))


def escaped(text: str) -> str:
    """Text from outside, for a page: no markup, no control characters but line ends."""
    lines = str(text).split("\n")
    return "\n".join(html.escape(printable(line)) for line in lines)


def encode_picture(picture: np.ndarray, side: int = SIDE) -> Picture:
    """A frame, uint8[height, width, 3], as a small JPEG in a data URL."""
    from PIL import Image

    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(picture)
    # A few pixels are enlarged as they are; a photograph is made smaller smoothly.
    way = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
    small = small.resize(size, way)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=82)
    return Picture("data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode(), *size)


def cards(values: Sequence[tuple[str, str]], first: bool = False) -> str:
    """Numbers and short texts with what they are, side by side; ``first`` marks the first one."""
    made = [
        f'<div class="card{" first" if first and not i else ""}"><b>{escaped(value)}</b>'
        f"<span>{escaped(label)}</span></div>"
        for i, (value, label) in enumerate(values)
    ]
    return f'<div class="cards">{"".join(made)}</div>'


def timeline(shown: Shown, chosen: Sequence[int], name: str) -> str:
    """Frames with their kept patches over the time of the video, and a row for each layer.

    Args:
      shown: what is drawn.
      chosen: frames of the row above the timeline, in time order.
      name: of this timeline on its page, of letters and figures.
    """
    counts, layers = shown.counts(), len(shown.kept)
    if not layers:
        return (
            '<p class="note">Policy merge keeps means of many frames. None of them belongs to a '
            "frame, so there is no timeline.</p>"
        )
    row, tall, centres = _row(shown, chosen, name)
    lines, bottom = _layer_rows(shown, counts, tall + 46)
    leads = "".join(
        f'<path d="M{x:.1f} {tall + 16:.1f}L{_x(t, shown.seen):.1f} {tall + 44:.1f}" fill="none" '
        f'stroke="{_COLOURS["kept" if t in counts else "faint"]}" stroke-opacity=".7"/>'
        for t, x in zip(chosen, centres, strict=True)
    )
    drawing = (
        f'<svg viewBox="0 0 {_WIDE:g} {bottom:.0f}" role="img" aria-label="What is remembered, '
        f'over the time of the video">{row}{leads}{lines}</svg>'
    )
    rest = [t for t in counts if t not in set(chosen) and t in shown.pictures]
    more = ""
    if rest:
        figures = "".join(_figure(shown, t, name) for t in rest)
        more = (
            f"<details><summary>{len(rest)} more frames hold tokens</summary>"
            f'<div class="frames">{figures}</div></details>'
        )
    unseen = len([t for t in counts if t not in shown.pictures])
    if unseen:
        more += f'<p class="note">{unseen} more frames hold tokens and are not drawn.</p>'
    return _with_layers(f"{drawing}{more}", layers, name)


def bytes_lines(
    points: Sequence[tuple[int, int]], keep_all: Line, what: str = "this memory"
) -> str:
    """The bytes of a memory, which do not grow, against those of keeping every token.

    Args:
      points: frames read and bytes held then, in order; at least one.
      keep_all: what every token would take.
      what: whose bytes they are.
    """
    frames, held = points[-1]
    frames = max(frames, 1)
    wide, high, left, top = 900.0, 170.0, _LEFT + 22, 18.0
    most = max(keep_all.at(frames), max(size for _, size in points)) * 1.08

    def place(t: float, size: float) -> str:
        return f"{left + (wide - left) * t / frames:.1f} {top + high * (1 - size / most):.1f}"

    flat = " L".join(place(t, size) for t, size in [(0, points[0][1]), *points])
    grows = f"{place(0, keep_all.at(0))} L{place(frames, keep_all.at(frames))}"
    ticks = "".join(
        f'<text x="{left - 6}" y="{top + high * (1 - share) + 4:.1f}" text-anchor="end" '
        f'font-size="11" fill="#6b7280">{size_text(most * share)}</text>'
        f'<path d="M{left} {top + high * (1 - share):.1f}H{wide}" stroke="#eef0f3"/>'
        for share in (0, 0.5, 1)
    )
    axis = "".join(
        f'<text x="{left + (wide - left) * share}" y="{top + high + 17}" text-anchor="middle" '
        f'font-size="11" fill="#6b7280">{round(frames * share):,}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    y_flat, y_all = (top + high * (1 - v / most) for v in (held, keep_all.at(frames)))
    if abs(y_flat - y_all) < 16:  # the two labels would lie on each other
        y_flat, y_all = (y_flat + 9, y_all - 9) if y_flat > y_all else (y_flat - 9, y_all + 9)
    return (
        f'<svg viewBox="0 0 1060 {top + high + 40:.0f}" role="img" aria-label="Bytes by frames">'
        f"{ticks}{axis}"
        f'<path d="M{grows}" fill="none" stroke="#b45309" stroke-width="2" '
        'stroke-dasharray="6 4"/>'
        f'<path d="M{flat}" fill="none" stroke="#0d9488" stroke-width="3"/>'
        f'<text x="{wide + 8}" y="{y_flat + 4:.1f}" font-size="12.5" font-weight="700" '
        f'fill="#0d9488">{escaped(what)}: {size_text(held)}</text>'
        f'<text x="{wide + 8}" y="{y_all + 4:.1f}" font-size="12.5" font-weight="700" '
        f'fill="#b45309">keep all: {size_text(keep_all.at(frames))}</text>'
        f'<text x="{(left + wide) / 2}" y="{top + high + 34}" text-anchor="middle" '
        'font-size="12" fill="#6b7280">frames read</text></svg>'
    )


def size_text(size: float) -> str:
    """Bytes for people: ``58 kB``, ``1.2 MB``."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    text = f"{size:.1f}" if size < 99.95 and unit != "B" else f"{size:.0f}"
    return f"{text.removesuffix('.0')} {unit}"


def clock(seconds: float) -> str:
    """``0:07``, ``12:34``, ``1:02:03``; a part of a second with its first decimal."""
    whole, tenth = divmod(round(seconds * 10), 10)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return f"{text}.{tenth}" if tenth else text


def _x(frame: int, seen: int) -> float:
    """Where a frame stands on the timeline: the middle of its share."""
    return _LEFT + (_WIDE - _LEFT) * (frame + 0.5) / max(seen, 1)


def _row(shown: Shown, chosen: Sequence[int], name: str) -> tuple[str, float, list[float]]:
    """The frames above the timeline, their height, and where each one's middle is."""
    if not chosen:
        return "", 0.0, []
    picture = shown.pictures[chosen[0]]
    count = max(len(chosen), 9)
    width = (_WIDE - _GAP * (count - 1)) / count
    height = width * picture.height / picture.width
    start = (_WIDE - len(chosen) * (width + _GAP) + _GAP) / 2
    made, centres = [], []
    for place, t in enumerate(chosen):
        left = start + place * (width + _GAP)
        centres.append(left + width / 2)
        made.append(
            f'<svg x="{left:.1f}" y="1" width="{width:.1f}" height="{height:.1f}" '
            f'viewBox="0 0 {width:.1f} {height:.1f}" overflow="visible">'
            f"{_frame(shown, t, width, height, name)}</svg>"
            f'<text x="{left + width / 2:.1f}" y="{height + 14:.1f}" text-anchor="middle" '
            f'font-size="11.5" fill="#1f2937">{clock(shown.time_of(t))}'
            f"{', newest' if t == shown.newest else ''}</text>"
        )
    return "".join(made), height + 2, centres


def _figure(shown: Shown, frame: int, name: str) -> str:
    """One frame by itself with its time."""
    picture = shown.pictures[frame]
    width = 104.0
    height = width * picture.height / picture.width
    return (
        f'<svg viewBox="-1 -1 {width + 2} {height + 18:.1f}">'
        f"{_frame(shown, frame, width, height, name)}"
        f'<text x="{width / 2}" y="{height + 14:.1f}" text-anchor="middle" font-size="12" '
        f'fill="#1f2937">{clock(shown.time_of(frame))}</text></svg>'
    )


def _frame(shown: Shown, frame: int, width: float, height: float, name: str) -> str:
    """A picture with what all layers keep of it, and, hidden, with what each layer keeps."""
    rows, columns = shown.grid
    layers = [
        {int(place) for place in pairs[pairs[:, 0] == frame, 1]}
        for pairs in (np.asarray(layer).reshape(-1, 2) for layer in shown.kept)
    ]
    picture = (
        f'<image href="{shown.pictures[frame].url}" width="{width:.1f}" height="{height:.1f}" '
        'preserveAspectRatio="none"/>'
    )

    def overlay(held: set[int]) -> str:
        cell = width / columns, height / rows
        boxes = [divmod(place - 1, columns) for place in sorted(held) if place]
        whole = f"M0 0H{width:.1f}V{height:.1f}H0Z"
        holes = "".join(
            f"M{column * cell[0]:.2f} {row * cell[1]:.2f}h{cell[0]:.2f}v{cell[1]:.2f}"
            f"h{-cell[0]:.2f}Z"
            for row, column in boxes
        )
        known = bool(held) or frame == shown.newest
        veil = "" if held == {0} or frame == shown.newest else whole + holes
        badge = (
            '<rect x="2" y="2" width="26" height="13" rx="3" fill="#0d9488"/><text x="15" y="12" '
            'text-anchor="middle" font-size="9.5" font-weight="700" fill="#fff">CLS</text>'
        )
        return (
            f'<path d="{veil}" fill="#fff" fill-opacity=".74" fill-rule="evenodd"/>'
            f'<path d="{holes}" fill="none" stroke="#0d9488" stroke-width="1.6"/>'
            f'<path d="{whole}" fill="none" stroke="{_COLOURS["kept" if known else "faint"]}" '
            f'stroke-width="{1.6 if known else 1}"/>{badge if 0 in held else ""}'
        )

    each = "".join(
        f'<g class="y {name}y{number}">{overlay(held)}</g>' for number, held in enumerate(layers, 1)
    )
    return f'{picture}<g class="{name}y0">{overlay(set().union(*layers))}</g>{each}'


def _layer_rows(shown: Shown, counts: Mapping[int, list[int]], top: float) -> tuple[str, float]:
    """A row of bars for each layer, and the axis beneath; with where it ends."""
    high = 30.0
    most = max((max(held) for held in counts.values()), default=1)
    wide = min(max((_WIDE - _LEFT) / max(shown.seen, 1) * 0.8, 2.0), 24.0)
    made = []
    for layer in range(len(shown.kept)):
        base = top + (layer + 1) * (high + 8)
        made.append(
            f'<text x="0" y="{base - 8:.1f}" font-size="12" fill="#6b7280">layer {layer + 1}</text>'
            f'<rect x="{_LEFT}" y="{base - 1:.1f}" width="{_WIDE - _LEFT}" height="1.5" '
            'fill="#cfd5dd"/>'
        )
        for t, held in counts.items():
            if held[layer]:
                tall = high * held[layer] / most
                made.append(
                    f'<rect x="{_x(t, shown.seen) - wide / 2:.2f}" y="{base - tall:.1f}" '
                    f'width="{wide:.2f}" height="{tall:.1f}" fill="#0d9488">'
                    f"<title>{clock(shown.time_of(t))}: {held[layer]} tokens</title></rect>"
                )
    base = top + len(shown.kept) * (high + 8)
    last = max(shown.seen - 1, 0)
    for t in sorted({round(last * share / 6) for share in range(7)}):
        anchor = "end" if last and t == last else "middle"  # not beyond the edge
        x = _WIDE if anchor == "end" else _x(t, shown.seen)
        made.append(
            f'<text x="{x:.1f}" y="{base + 16:.1f}" text-anchor="{anchor}" '
            f'font-size="11.5" fill="#6b7280">{clock(shown.time_of(t))}</text>'
        )
    return "".join(made), base + 24


def _with_layers(inner: str, layers: int, name: str) -> str:
    """A choice between all layers and each of them; style alone, so that it works everywhere."""
    if layers < 2:
        return inner
    picks, labels, rules = [], [], []
    for number in range(layers + 1):
        key = f"{name}p{number}"
        checked = "" if number else " checked"
        picks.append(f'<input class="pick" type="radio" name="{name}" id="{key}"{checked}>')
        labels.append(f'<label for="{key}">{f"layer {number}" if number else "all layers"}</label>')
        rules.append(
            f".memory #{key}:checked~.{name}b .{name}y{number}{{display:inline}}"
            f".memory #{key}:checked~.layers label[for={key}]"
            "{background:#0d9488;border-color:#0d9488;color:#fff}"
        )
        if number:
            rules.append(f".memory #{key}:checked~.{name}b .{name}y0{{display:none}}")
    return (
        f"<div><style>{''.join(rules)}</style>{''.join(picks)}"
        f'<div class="layers">What is kept by {"".join(labels)}</div>'
        f'<div class="{name}b">{inner}</div></div>'
    )
