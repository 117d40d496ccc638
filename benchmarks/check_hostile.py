"""Damaged files and requests against a real server: it answers every one, and goes on.

Real files of seven kinds, changed at random, are pushed, and requests, changed at random, are sent.
Then come the cases that were thought of: paths outside, links, bombs, endless bodies. Every answer
must have a status that says what was wrong within 30 seconds, the server must be the process that
it was, its memory must not have grown, and a good request must be answered as at the beginning:

    python -m benchmarks.check_hostile --model runs/quickstart/main
"""

import argparse
import collections
import concurrent.futures
import contextlib
import io
import json
import random
import socket
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import av
import numpy as np
import PIL.Image

from benchmarks._server import Server, resident

#: What a hostile request may be answered with.
STATUSES = {200, 400, 404, 405, 408, 413, 415, 422, 429}
SECONDS = 30
VIDEOS = {
    "mp4": ("libx264", "video/mp4"),
    "mkv": ("libx264", "video/x-matroska"),
    "webm": ("libvpx-vp9", "video/webm"),
    "avi": ("mpeg4", "video/x-msvideo"),
    "ts": ("mpeg2video", "video/mp2t"),
}
PICTURES = {"jpeg": "image/jpeg", "png": "image/png"}
#: Memory may grow by what a first use of everything takes, and no further.
GROWTH = 1.05


def make_files(directory: Path) -> dict[str, tuple[bytes, str]]:
    """One small file of every kind, and its type."""
    rng = np.random.default_rng(0)
    frames = [
        np.kron(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8), np.ones((12, 12, 1), np.uint8))
        for _ in range(20)
    ]
    made = {}
    for kind, (codec, mime) in VIDEOS.items():
        path = directory / f"clip.{kind}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=5)
            stream.width, stream.height, stream.pix_fmt = 72, 48, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
        made[kind] = path.read_bytes(), mime
    for kind, mime in PICTURES.items():
        target = io.BytesIO()
        PIL.Image.fromarray(frames[0]).save(target, kind)
        made[kind] = target.getvalue(), mime
    return made


def changed(content: bytes, rng: random.Random) -> bytes:
    """A file with something wrong in it."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        at = rng.randrange(len(data))
        how = rng.randrange(8)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at : at + rng.randrange(1, 256)]
        elif how == 4:
            data[at:at] = data[: rng.randrange(1, 256)]
        elif how == 5:  # a number somewhere becomes the largest, the smallest or zero
            number = rng.choice([0, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
            data[at : at + 4] = struct.pack(">I", number)
        elif how == 6 and len(data) > 64:  # near the beginning, where headers are
            data[rng.randrange(64)] = rng.randrange(256)
        else:
            other = rng.randrange(len(data))
            data[at : at + 32] = data[other : other + 32]
    return bytes(data)


def requests(session: str, rng: random.Random) -> tuple[str, str, bytes]:
    """A request with something wrong in it: method, path, body."""
    good = [
        (
            "/v1/chat/completions",
            {
                "model": "main",
                "session": session,
                "messages": [{"role": "user", "content": "which digit?"}],
                "temperature": 0.5,
                "max_tokens": 4,
                "stop": ["a"],
                "stream": rng.random() < 0.3,
            },
        ),
        (
            "/v1/chat/completions",
            {
                "model": "main",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
                            {"type": "text", "text": "which digit?"},
                        ],
                    }
                ],
            },
        ),
        (f"/v1/sessions/{session}/ask", {"question": "which digit?", "moments": 3}),
        (f"/v1/sessions/{session}/frames", {"frames": ["data:image/png;base64,iVBORw0KGgo="]}),
        ("/v1/sessions/none/ask", {"question": "which?"}),
    ]
    path, body = rng.choice(good)
    method, how = "POST", rng.randrange(6)
    if how < 3:
        spoil(body, rng)
    content = json.dumps(body).encode()
    if how == 3:
        content = changed(content, rng)
    elif how == 4:
        path = "".join(rng.choice([char, char, char, "%00", "..", "/", "\u00e9"]) for char in path)
        path = path.encode("ascii", "ignore").decode() or "/"
        path = path if path.startswith("/") else f"/{path}"
    elif how == 5:
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
        if method == "DELETE":
            path = "/v1/sessions/s-" + "A" * 16
    return method, path, content


ODD = (
    None, True, -1, 0, 1e308, -1e308, 10**30, "", "\u0000", "\ud800", "x" * 70_000, [], {}, [[]],
    ["a"] * 2000, {"a": {"b": {}}}, "NaN", "../../etc/passwd", "file:///etc/passwd",
    "http://127.0.0.1:1/", "data:,", "data:image/png;base64,AAAA",
)  # fmt: skip


def spoil(value, rng: random.Random) -> None:
    """Replaces, removes or adds something in a table or a list, at any depth."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and rng.random() < 0.7:
            value = value[key]
            continue
        how = rng.randrange(3)
        if how == 0:
            value[key] = rng.choice(ODD)
        elif how == 1:
            del value[key]
        elif isinstance(value, dict):
            value[rng.choice(["fps", "start", "end", "n", "seed", "x", "model"])] = rng.choice(ODD)
        else:
            value.append(rng.choice(ODD))
        return


class Check:
    """Sends, and counts what comes back."""

    def __init__(self, server: Server, session: str):
        self.server, self.session = server, session
        self.statuses: collections.Counter = collections.Counter()
        self.faults: list[str] = []
        self.slowest = 0.0

    def send(self, what: str, method: str, path: str, body: bytes, kind: str) -> int:
        began = time.monotonic()
        try:
            while True:
                status, answer = self.server.request(method, path, body, kind, SECONDS)
                if status != 429:
                    break
                time.sleep(0.05)
        except Exception as error:  # the server hung up, or said nothing
            self.faults.append(f"{what}: {type(error).__name__}: {error}")
            return 0
        took = time.monotonic() - began
        self.slowest = max(self.slowest, took)
        self.statuses[status] += 1
        if took > SECONDS:
            self.faults.append(f"{what}: {took:.0f} s")
        if status not in STATUSES:
            self.faults.append(f"{what}: status {status}: {answer[:200]!r}")
        if status >= 400 and method != "HEAD":
            with contextlib.suppress(ValueError):
                told = json.loads(answer)["error"]["message"]
                if not told or "Traceback" in told or "/tmp/" in told:
                    self.faults.append(f"{what}: says {told!r}")
        return status

    def file(self, kind: str, content: bytes, mime: str) -> int:
        path = f"/v1/sessions/{self.session}/frames"
        return self.send(f"{kind} of {len(content)} bytes", "POST", path, content, mime)

    def chat(self, what: str, part: dict, wanted: set[int]) -> None:
        body = {
            "model": "main",
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "which digit?"}]}
            ],
        }
        path, content = "/v1/chat/completions", json.dumps(body).encode()
        status = self.send(what, "POST", path, content, "application/json")
        self.expect(what, status, wanted)

    def expect(self, what: str, status: int, wanted: set[int]) -> None:
        print(f"  {what}: {status}")
        if status not in wanted:
            self.faults.append(f"{what}: status {status}, wanted {sorted(wanted)}")


def video_part(address: str) -> dict:
    return {"type": "video_url", "video_url": {"url": address}}


def png_bomb(side: int) -> bytes:
    """A PNG of side × side black pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def thought_of(check: Check, files: dict, allowed: Path) -> None:
    """What was thought of beforehand."""
    print("cases that were thought of:")
    outside = allowed.parent / "outside.mp4"
    outside.write_bytes(files["mp4"][0])
    (allowed / "inside.mp4").write_bytes(files["mp4"][0])
    (allowed / "link.mp4").symlink_to(outside)
    (allowed / "up").symlink_to(allowed.parent)
    check.chat("a file inside", video_part(f"file://{allowed}/inside.mp4"), {200})
    for what, address in (
        ("a file outside", f"file://{outside}"),
        ("a link to one outside", f"file://{allowed}/link.mp4"),
        ("a path with ..", f"file://{allowed}/../outside.mp4"),
        ("a path with %2e%2e", f"file://{allowed}/%2e%2e/outside.mp4"),
        ("a path by a linked directory", f"file://{allowed}/up/outside.mp4"),
        ("a device", "file:///dev/zero"),
        ("a file of the system", "file:///etc/passwd"),
        ("an address", "http://127.0.0.1:9/clip.mp4"),
        ("a protocol of FFmpeg's", "concat:/etc/passwd|/etc/passwd"),
    ):
        check.chat(what, video_part(address), {400})
    for side in (16384, 60000):
        check.expect(
            f"a PNG of {side} x {side}",
            check.file("png", png_bomb(side), "image/png"),
            {422},
        )
    wide = bytearray(files["mp4"][0])
    place = wide.find(b"avc1")
    wide[place + 28 : place + 32] = struct.pack(">HH", 16384, 16384)
    check.expect(
        "16,384 x 16,384 in an MP4's header",
        check.file("mp4", bytes(wide), "video/mp4"),
        {200, 422},
    )
    fast = bytearray(files["mp4"][0])
    place = fast.find(b"mdhd")
    fast[place + 16 : place + 20] = struct.pack(">I", 0xFFFFFFFF)
    check.expect(
        "4,294,967,295 ticks a second", check.file("mp4", bytes(fast), "video/mp4"), {200, 422}
    )
    long = bytearray(files["mp4"][0])
    for box, at in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24)):
        place = long.find(box)
        long[place + at : place + at + 4] = struct.pack(">I", 0xFFFFFFF0)
    check.expect("a header of centuries", check.file("mp4", bytes(long), "video/mp4"), {200, 422})
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    check.expect("a playlist", check.file("m3u8", playlist, "video/mp4"), {422})
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    check.expect("a list of files", check.file("ffconcat", concat, "video/mp4"), {422})
    deep = b'{"frames": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    status = check.send(
        "deep", "POST", f"/v1/sessions/{check.session}/frames", deep, "application/json"
    )
    check.expect("100,000 lists in each other", status, {400})
    check.expect("1 GB of base64", endless(check.server.port, 1 << 30), {413})
    slow(check)


def endless(port: int, size: int) -> int:
    """The status that a body of so many bytes gets, sent as long as the server takes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as line:
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        head = b'{"model": "main", "messages": [{"role": "user", "content": [{"type": "video_url", '
        head += b'"video_url": {"url": "data:video/mp4;base64,'
        sent, piece = 0, b"A" * 65536
        try:
            line.sendall(b"%x\r\n%s\r\n" % (len(head), head))
            while sent < size:
                line.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += len(piece)
        except OSError:
            pass  # it has answered and hung up
        with contextlib.suppress(OSError):
            answer = line.recv(65536)
            return int(answer.split(b" ")[1])
    return 413 if sent < size else 0  # hung up before the answer could be read


def slow(check: Check) -> None:
    """Two hundred callers who begin a request and say nothing more."""
    lines = []
    for _ in range(200):
        line = socket.create_connection(("127.0.0.1", check.server.port))
        line.sendall(
            b"POST /v1/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        lines.append(line)
    status, _ = check.server.request("GET", "/health", timeout=SECONDS)
    check.expect("health beside 200 callers who say nothing", status, {200})
    for line in lines:
        line.close()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="runs/quickstart/main")
    flags.add_argument("--files", type=int, default=10_000)
    flags.add_argument("--requests", type=int, default=2_000)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    root = Path(tempfile.mkdtemp(prefix="adacm2-hostile-")).resolve()
    allowed = root / "allowed"
    allowed.mkdir()
    files = make_files(root)
    server = Server(
        args.model,
        root / "state",
        *("--allow", str(allowed), "--name", "main", "--decoder-seconds", "20"),
    )
    pid = server.pid
    session = server.json("POST", "/v1/sessions", {})[1]["id"]
    check = Check(server, session)
    for kind, (content, mime) in files.items():
        if check.file(kind, content, mime) != 200:
            raise SystemExit(f"the {kind} file as it was made is not read")
    question = {"question": "which digit?"}
    before = server.json("POST", f"/v1/sessions/{session}/fork")[1]["id"]
    expected = server.json("POST", f"/v1/sessions/{before}/ask", question)[1]

    kinds = list(files)
    memory = [resident(pid)]

    def one_file(number: int) -> None:
        rng = random.Random(args.seed * 10**6 + number)
        kind = kinds[number % len(kinds)]
        content, mime = files[kind]
        check.file(kind, changed(content, rng), mime)

    def one_request(number: int) -> None:
        rng = random.Random(args.seed * 10**6 + number)
        method, path, body = requests(session, rng)
        check.send(f"{method} {path[:80]}", method, path, body, "application/json")

    for what, act, total in (
        ("files", one_file, args.files),
        ("requests", one_request, args.requests),
    ):
        check.statuses.clear()
        check.slowest = 0.0
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for first in range(0, total, max(total // 10, 1)):
                list(pool.map(act, range(first, min(first + max(total // 10, 1), total))))
                memory.append(resident(pid))
        statuses = ", ".join(
            f"{status}: {count}" for status, count in sorted(check.statuses.items())
        )
        print(
            f"{total:,} changed {what}: {statuses}; the slowest {check.slowest:.1f} s", flush=True
        )
    thought_of(check, files, allowed)
    memory.append(resident(pid))
    megabytes = [round(each / 1e6) for each in memory]
    print(f"memory of the server and its decoders, MB: {megabytes}")
    warm = max(memory[:3])  # the first tenths of the files use everything once
    if memory[-1] > GROWTH * warm:
        check.faults.append(f"memory has grown from {warm / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB")
    after = server.json("POST", f"/v1/sessions/{before}/ask", question)[1]
    if after != expected:
        check.faults.append(f"a good request was answered {expected}, now {after}")
    if not server.running or server.pid != pid:
        check.faults.append("the server is not the process that it was")
    server.stop()
    for fault in check.faults[:50]:
        print(f"FAULT: {fault}")
    print(f"{len(check.faults)} faults")
    sys.exit(bool(check.faults))


if __name__ == "__main__":
    main()
