"""Does a session hold out for a day? Exits with 1, and says what does not hold.

    python benchmarks/check_stream.py [--model runs/quickstart/main] [--open-tokens 136] [--seed 0]

One session of the quickstart's model is pushed 24 hours of frames, one a second. In the first,
twelfth and twentieth hour one frame has a ground whose colour a question asks for that is known
from the beginning; after the twentieth hour one has a colour that nobody has asked for, and a
question about it comes after the last frame. All other frames distract: digits on the four other
grounds. Every frame is drawn anew, as the frames of training are, with digits that training has not
seen. From frame 1,000 on the bytes of the state and of all arrays on the device must not change,
resident memory must stay within 3 %, and nothing may be compiled; in the end all four answers must
be right.
"""

import argparse
import dataclasses
import gc
import json
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import adacm2_jax  # noqa: E402
from adacm2_jax.inference import session_steps  # noqa: E402
from adacm2_jax.inference.session import Session  # noqa: E402
from adacm2_jax.progress import Progress  # noqa: E402
from adacm2_jax.runs.load import experiment_of  # noqa: E402
from data.needle.render import COLOURS, QUESTIONS, draw_frame, load_digits  # noqa: E402

DAY = 86_400
#: Of the known questions' needles, and of the late one's: their hour of the day, from 1 on.
KNOWN_HOURS, LATE_HOUR = (1, 12, 20), 21
#: Frames until all is allocated and compiled, and between two measurements.
SETTLED, EVERY = 1000, 1000
#: Frames that are drawn at a time, so that they are little memory.
PIECE = 200
#: Tokens of the open memory: of eight frames. With those of two a late question that came three
#: hours after its frame found nothing.
OPEN_TOKENS = 136
#: That resident memory may change by.
SPREAD = 0.03


@dataclasses.dataclass(frozen=True)
class Needle:
    """The one frame whose ground has its colour."""

    frame: int
    colour: str
    image: int

    @property
    def question(self) -> str:
        return QUESTIONS[0].format(self.colour)


class Stream:
    """What the camera sees: everything follows from the number of frames and the seed.

    Attributes:
      needles: of the known questions, then of the late one.
      others: the colours of all other frames.
    """

    def __init__(self, frames: int, seed: int):
        self._rng = np.random.default_rng(seed)
        self._digits, self._labels = load_digits("test")
        colours = [list(COLOURS)[i] for i in self._rng.permutation(len(COLOURS))]
        hours = (*KNOWN_HOURS, LATE_HOUR)
        self.needles, self.others = [], colours[len(hours) :]
        for hour, colour in zip(hours, colours, strict=False):
            frame = int((hour - 1 + self._rng.random()) / 24 * frames)
            self.needles.append(Needle(frame, colour, self._image()))

    def _image(self) -> int:
        return int(self._rng.integers(len(self._labels)))

    def answer(self, needle: Needle) -> str:
        return str(self._labels[needle.image])

    def draw(self, first: int, count: int, size: int) -> np.ndarray:
        """The next frames, uint8[count, size, size, 3]; each is drawn once."""
        at = {needle.frame: needle for needle in self.needles}
        frames = []
        for number in range(first, first + count):
            image, colour = self._image(), self.others[self._rng.integers(len(self.others))]
            if needle := at.get(number):
                image, colour = needle.image, needle.colour
            frames.append(draw_frame(self._digits[image], COLOURS[colour], self._rng, size))
        return np.stack(frames)


class Watch:
    """What does not show in the answers: memory by the number of frames, and compilations."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []
        self._compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, _: float, **__: object) -> None:
        self._compiled += event == "/jax/core/compile/backend_compile_duration"

    def measure(self, session: Session) -> None:
        jax.block_until_ready(session.state)
        gc.collect()
        self.rows.append(
            {
                "frames": session.seen,
                "state": session.size,
                "device": sum(array.nbytes for array in jax.live_arrays()),
                "resident": resident_bytes(),
                "compiled": self._compiled,
            }
        )


def resident_bytes() -> int:
    """Of this process, now."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not say how much memory is resident")


def memory_faults(rows: Sequence[dict[str, int]], push_compiled: int) -> list[str]:
    """What does not hold of memory and compilations, a line each.

    Args:
      rows: of :class:`Watch`, from the first measurement that counts.
      push_compiled: programs that there are of the push step.
    """
    faults, first = [], rows[0]
    for name, what in (("state", "the state"), ("device", "the arrays on the device")):
        found = {row[name] for row in rows}
        if len(found) > 1:
            faults.append(f"{what}: {min(found):,} to {max(found):,} bytes, not always as many")
    far = max(rows, key=lambda row: abs(row["resident"] / first["resident"] - 1))
    change = far["resident"] / first["resident"] - 1
    if abs(change) > SPREAD:
        faults.append(
            f"resident memory: {change:+.1%} after {far['frames']:,} frames, allowed {SPREAD:.0%}"
        )
    if more := rows[-1]["compiled"] - first["compiled"]:
        faults.append(f"compilations after {first['frames']:,} frames: {more}, allowed none")
    if push_compiled != 1:
        faults.append(f"the push step: compiled {push_compiled} times, not once")
    return faults


def answered(needle: Needle, right: str, reply: adacm2_jax.Reply) -> dict:
    """What was answered, and how much of the needle is remembered, summed over the layers."""
    return {
        "frame": needle.frame,
        "question": needle.question,
        "policy": reply.policy,
        "answer": reply.answer,
        "right": right,
        "score": reply.score,
        "needle_tokens": sum(m.tokens for m in reply.moments if m.time == needle.frame),
        "remembered_frames": len(reply.moments),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="runs/quickstart/main", help="of `make quickstart`")
    parser.add_argument("--frames", type=int, default=DAY)
    parser.add_argument("--open-tokens", type=int, default=OPEN_TOKENS, help="of the open memory")
    parser.add_argument("--seed", type=int, default=0, help="other colours, digits and frames")
    parser.add_argument("--json", type=pathlib.Path, help="where the figures go")
    options = parser.parse_args(argv)

    stream, watch = Stream(options.frames, options.seed), Watch()
    *known, late = stream.needles
    model = adacm2_jax.load(options.model)
    size = experiment_of(options.model).model.vision.image_size
    session = model.session([each.question for each in known], open_tokens=options.open_tokens)
    start = time.perf_counter()
    with Progress("frames", options.frames, unit="frames") as progress:
        while session.seen < options.frames:
            # To the next measurement: in which pieces frames come does not matter.
            left = min(EVERY - session.seen % EVERY, options.frames - session.seen)
            count = min(left, PIECE)
            session.push(stream.draw(session.seen, count, size))
            if count == left:
                watch.measure(session)
            progress.update(count)
    seconds = time.perf_counter() - start
    pushes = session_steps.push._cache_size()

    rows = [row for row in watch.rows if row["frames"] >= min(SETTLED, options.frames)]
    faults = memory_faults(rows, pushes)
    # Of every frame that is remembered at all.
    moments = session.bound * 2
    replies = [*session.ask(moments=moments), session.ask(late.question, moments=moments)]
    answers = [
        answered(needle, stream.answer(needle), reply)
        for needle, reply in zip(stream.needles, replies, strict=True)
    ]
    faults += [
        f"{each['policy']}, asked of frame {each['frame']:,} of {session.seen:,}: "
        f"{each['question']} {each['answer']!r}, right is {each['right']!r}"
        for each in answers
        if each["answer"] != each["right"]
    ]
    resident = [row["resident"] for row in rows]
    results = {
        "frames": session.seen,
        "seconds": round(seconds, 1),
        "frames_a_second": round(session.seen / seconds, 1),
        "kept_tokens": session.kept,
        "bound_tokens": session.bound,
        "distracting_colours": stream.others,
        "state_bytes": sorted({row["state"] for row in rows}),
        "device_bytes": sorted({row["device"] for row in rows}),
        "resident_bytes": {"first": resident[0], "least": min(resident), "most": max(resident)},
        "push_compiled": pushes,
        "compiled_after": rows[-1]["compiled"] - rows[0]["compiled"],
        "answers": answers,
        "faults": faults,
    }
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results | {"measured": watch.rows}, indent=1) + "\n")
    for fault in faults:
        print(f"does not hold: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
