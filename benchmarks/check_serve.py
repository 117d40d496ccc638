"""Many sessions at once in a real server: each is itself, the budget holds, nothing is lost.

64 clients push, ask, fork, save and close at random, at a server whose budget holds a part of the
sessions; then the server is killed and started again. Every session that is left, and some of those
that were closed, is read once more, alone, from the same frames:

    python -m benchmarks.check_serve --model runs/quickstart/main --minutes 10
"""

import argparse
import concurrent.futures
import dataclasses
import io
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image

from benchmarks._server import Server

QUESTIONS = (
    "which digit was on the red ground?",
    "which digit was on the blue ground?",
    "which digit was on the green ground?",
)
LATE = "which digit was on the yellow ground?"
CLIENTS, MOST_FRAMES, REREAD = 64, 60, 60


@dataclasses.dataclass
class History:
    """What one session was told and said: all that it takes to have it once more."""

    questions: tuple[str, ...]
    pushes: list[list[int]] = dataclasses.field(default_factory=list)
    said: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)

    @property
    def frames(self) -> int:
        return sum(map(len, self.pushes))

    def copy(self) -> "History":
        return History(self.questions, [list(seeds) for seeds in self.pushes], list(self.said))


def picture(seed: int) -> bytes:
    """A frame: coloured ground, a few blocks."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:] = rng.integers(0, 255, 3)
    for _ in range(4):
        row, column = rng.integers(0, 24, 2)
        pixels[row : row + 8, column : column + 8] = rng.integers(0, 255, 3)
    target = io.BytesIO()
    PIL.Image.fromarray(pixels).save(target, "png")
    return target.getvalue()


class Clients:
    """All clients, and what they have seen."""

    def __init__(self, server: Server, state: Path):
        self.server, self.state = server, state
        self.lock = threading.Lock()
        self.counts: dict[str, int] = {}
        self.closed: list[tuple[History, bytes]] = []
        self.most = 0.0

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1

    def call(self, method: str, path: str, body=None, content: bytes | None = None):
        """A request; one that a full server refuses is sent again, as often as it takes."""
        while True:
            if content is not None:
                status, answer = self.server.request(method, path, content, "image/png")
                value = json.loads(answer)
            else:
                status, value = self.server.json(method, path, body)
            if status != 429:
                break
            assert value["error"]["message"], value
            self.count("429")
            time.sleep(random.uniform(0.01, 0.1))
        if status != 200:
            raise SystemExit(f"{method} {path}: {status} {value}")
        return value

    def open(self, questions: tuple[str, ...]) -> str:
        return self.call("POST", "/v1/sessions", {"questions": questions})["id"]

    def push(self, name: str, history: History, seeds: list[int]) -> None:
        if len(seeds) == 1:
            answer = self.call("POST", f"/v1/sessions/{name}/frames", content=picture(seeds[0]))
        else:
            frames = [data(seed) for seed in seeds]
            answer = self.call("POST", f"/v1/sessions/{name}/frames", {"frames": frames})
        history.pushes.append(seeds)
        assert answer["seen"] == history.frames, (answer, history.frames)

    def ask(self, name: str, question: str) -> str:
        return self.call("POST", f"/v1/sessions/{name}/ask", {"question": question})["answer"]

    def file(self, name: str) -> bytes:
        """What is saved of a session."""
        self.call("POST", f"/v1/sessions/{name}/save")
        return (self.state / "sessions" / f"{name}.session").read_bytes()

    def act(self, number: int, until: float) -> tuple[str, History]:
        """One client, until its time is over; the session that it has then."""
        rng = random.Random(number)

        def fresh() -> tuple[str, History]:
            questions = tuple(rng.sample(QUESTIONS, rng.choice([0, 1, 1, 2])))
            return self.open(questions), History(questions)

        name, history = fresh()
        while time.monotonic() < until:
            action = rng.choices(
                ["push", "ask", "fork", "save", "close"], [60, 25, 6, 5, 4 + history.frames // 8]
            )[0]
            self.count(action)
            if action == "push" and history.frames < MOST_FRAMES:
                count = rng.choice([1, 1, 1, 2, 5])
                self.push(name, history, [rng.randrange(10**6) for _ in range(count)])
            elif action == "ask" and history.frames:
                question = rng.choice([LATE, *history.questions])
                history.said.append((len(history.pushes), question, self.ask(name, question)))
            elif action == "fork":
                made = self.call("POST", f"/v1/sessions/{name}/fork")["id"]
                kept = history.copy()
                self.push(name, history, [1, 2])  # a future that only one of them has
                self.call("DELETE", f"/v1/sessions/{name}")
                name, history = made, kept
            elif action == "save":
                self.call("POST", f"/v1/sessions/{name}/save")
            elif action == "close":
                content = self.file(name)
                with self.lock:
                    self.closed.append((history, content))
                self.call("DELETE", f"/v1/sessions/{name}")
                name, history = fresh()
        return name, history

    def again(self, history: History) -> bytes:
        """The same history, alone; its answers must be the same. What is saved of it."""
        name, told = self.open(history.questions), list(history.said)
        copy = History(history.questions)
        for place, seeds in enumerate(history.pushes, 1):
            self.push(name, copy, seeds)
            while told and told[0][0] == place:
                _, question, answer = told.pop(0)
                found = self.ask(name, question)
                if found != answer:
                    raise SystemExit(f"alone it says {found!r}, among others {answer!r}")
        content = self.file(name)
        self.call("DELETE", f"/v1/sessions/{name}")
        return content


def data(seed: int) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(picture(seed)).decode()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="runs/quickstart/main")
    flags.add_argument("--minutes", type=float, default=10)
    args = flags.parse_args()
    root = Path(tempfile.mkdtemp(prefix="adacm2-serve-"))
    state = root / "state"

    probe = Server(args.model, root / "probe")
    opened = probe.json("POST", "/v1/sessions", {"questions": QUESTIONS[:2]})[1]
    probe.stop()
    budget = 24 * opened["bytes"]
    options = ("--session-bytes", str(budget), "--save-seconds", "1e9", "--waiting", "48")
    server = Server(args.model, state, *options)
    clients = Clients(server, state)
    until = time.monotonic() + 60 * args.minutes
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            now = server.metrics()
            clients.most = max(clients.most, now["adacm2_session_bytes_most"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        left = list(pool.map(lambda number: clients.act(number, until), range(CLIENTS)))
    over.set()
    watcher.join()
    now = server.metrics()
    print(f"{args.minutes:g} minutes, {CLIENTS} clients: {clients.counts}")
    print(
        f"budget {budget:,} bytes, the most in use {clients.most:,.0f}; put away "
        f"{now['adacm2_sessions_put_away']:,.0f} times, back {now['adacm2_sessions_resumed']:,.0f}"
    )
    faults = []
    if clients.most > budget:
        faults.append("the budget was exceeded")
    if not clients.counts.get("429"):
        faults.append("no 429 was seen")

    files = {name: clients.file(name) for name, _ in left}
    server.kill()
    again = Server(args.model, state, *options)
    clients.server = again
    listed = {entry["id"]: entry for entry in again.json("GET", "/v1/sessions")[1]["data"]}
    lost = [name for name, history in left if listed.get(name, {}).get("seen") != history.frames]
    print(f"killed and started again: {len(left) - len(lost)} of {len(left)} sessions are there")
    if lost:
        faults.append(f"{len(lost)} sessions are lost")
    random.Random(0).shuffle(clients.closed)
    chosen = [(history, files[name]) for name, history in left] + clients.closed[:REREAD]
    other = 0
    for name, history in left:
        if history.frames:
            clients.ask(name, LATE)
    for history, content in chosen:
        other += clients.again(history) != content
    print(
        f"read again alone: {len(chosen) - other} of {len(chosen)} bit for bit the same, with "
        f"{sum(len(history.said) for history, _ in chosen)} answers and "
        f"{sum(history.frames for history, _ in chosen)} frames"
    )
    if other:
        faults.append(f"{other} sessions are not what they are alone")
    again.stop()
    for fault in faults:
        print(f"FAULT: {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
