"""Does OpenAI's own client get right answers from ``adacm2 serve``? Exits with 1 if it does not.

    make check-openai RUN=runs/quickstart/main

Draws clips of the needle task, and asks ``adacm2_jax.load(RUN)`` about them. Then starts the server
as a process, and asks it about the same clips with the package ``openai``, in every way that the
client has: what the Python door gets right must come back right. A line a check.
"""

import argparse
import asyncio
import base64
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is tried is how they talk
os.environ["NO_PROXY"] = "127.0.0.1"  # the client would go through a proxy otherwise

import openai

import adacm2_jax
from adacm2_jax.errors import UserError
from benchmarks._clips import Clip, as_png, make_clips
from benchmarks._server import Server

CLIPS, FRAMES = 16, 16
#: Frames of the clips that keep a small server busy.
LONG = 64
TOKEN, NAME = "the token of this check", "needle"
#: How often the client asks again by itself, where a server is full.
RETRIES = 60


@dataclasses.dataclass
class Asked:
    """A clip, and what the Python door says of it.

    Attributes:
      door: of the file.
      known: of the frames, in a session that knows the question.
      late: of the frames, in a session that is asked when all are seen.
    """

    clip: Clip
    door: str
    known: str
    late: str


class Checks:
    """Prints a line for each, and counts those that do not hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, name: str, holds: bool, told: str = "") -> None:
        print(
            f"{'holds' if holds else 'FAILS'}  {name}" + (f": {told}" if told else ""), flush=True
        )
        if not holds:
            self.failed.append(name)

    def same(self, name: str, pairs: Iterable[tuple[str, str]]) -> None:
        """What came, and what is right."""
        pairs = list(pairs)
        right = sum(came == wanted for came, wanted in pairs)
        wrong = [f"{came!r} for {wanted!r}" for came, wanted in pairs if came != wanted]
        told = "; ".join([f"{right} of {len(pairs)} right", *wrong[:3]])
        self.check(name, bool(pairs) and right == len(pairs), told)

    def refused(
        self, name: str, kind: type[openai.APIStatusError], call: Callable[[], Any]
    ) -> None:
        """A call that must fail in one way."""
        try:
            call()
        except openai.OpenAIError as error:
            told = f"{type(error).__name__}, {error}"
            self.check(name, type(error) is kind and bool(getattr(error, "message", "")), told)
        else:
            self.check(name, False, "was answered")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="a run that knows the needle task")
    run = parser.parse_args().run
    checks = Checks()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        clips = make_clips(root / "clips", CLIPS, FRAMES)
        try:
            asked = ask_door(run, clips)
        except UserError as error:
            print(f"error: {error}; make quickstart makes a run, RUN=… names one", file=sys.stderr)
            return 2
        right = [each for each in asked if each.door == each.clip.answer]
        checks.check(
            "the Python door knows the task",
            len(right) >= CLIPS // 2,
            f"right about {len(right)} of {CLIPS} clips, openai {openai.__version__}",
        )
        (root / "token").write_text(TOKEN)
        flags = ("--name", NAME, "--token-file", str(root / "token"))
        server = Server(str(run), root / "state", *flags, "--allow", str(root / "clips"))
        try:
            client = openai.OpenAI(
                base_url=address(server), api_key=TOKEN, max_retries=0, timeout=300
            )
            check_models(checks, client)
            check_videos(checks, client, right)
            known = [each for each in asked if each.known == each.clip.answer]
            sent = [
                (say(client, messages(each.clip, *pictures(each.clip))), each) for each in known
            ]
            pairs = [(text, each.clip.answer) for text, each in sent]
            checks.same(f"{FRAMES} frames as image_url", pairs)
            check_streams(checks, client, right)
            size = check_sessions(checks, client, asked)
            check_errors(checks, client, right[0].clip, root)
            asyncio.run(check_many(checks, address(server), right))
        finally:
            server.stop()
        full = Server(str(run), root / "full", *flags, "--session-bytes", str(size * 3 // 2))
        try:
            long = make_clips(root / "long", 8, LONG)
            asyncio.run(check_full(checks, address(full), long))
        finally:
            full.stop()
    failed = checks.failed
    print(f"does not hold: {'; '.join(failed)}" if failed else "OpenAI's client is served")
    return 1 if failed else 0


def ask_door(run: Path, clips: list[Clip]) -> list[Asked]:
    """What the library answers, without a server."""
    model = adacm2_jax.load(run)
    asked = []
    for clip in clips:
        said = [model.ask(clip.path, clip.question).answer]
        for questions in ([clip.question], []):
            session = model.session(questions)
            session.push(clip.frames)
            said.append(session.ask(clip.question).answer)
        asked.append(Asked(clip, *said))
    return asked


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


# --- What is sent ------------------------------------------------------------------------------


def data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


def pictures(clip: Clip) -> list[dict]:
    urls = [data(as_png(frame), "image/png") for frame in clip.frames]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def messages(clip: Clip, *parts: dict) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": clip.question}]}]


def inline(clip: Clip) -> list[dict]:
    """A question with the video's bytes."""
    return messages(clip, video(data(clip.path.read_bytes(), "video/mp4")))


def say(client: openai.OpenAI, sent: list[dict], **options: Any) -> str:
    completion = client.chat.completions.create(model=NAME, messages=sent, **options)
    return completion.choices[0].message.content


# --- The checks --------------------------------------------------------------------------------


def check_models(checks: Checks, client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    checks.check("models.list", names == [NAME], ", ".join(names))
    checks.check("models.retrieve", client.models.retrieve(NAME).id == NAME)


def check_videos(checks: Checks, client: openai.OpenAI, right: list[Asked]) -> None:
    """The same clips in three ways."""

    def all_right(name: str, sent: Callable[[Clip], list[dict]]) -> None:
        checks.same(name, [(say(client, sent(each.clip)), each.clip.answer) for each in right])

    all_right("a video as data URL", inline)
    all_right(
        "a video as file:// below --allow", lambda clip: messages(clip, video(clip.path.as_uri()))
    )
    uploads = []

    def uploaded(clip: Clip) -> list[dict]:
        with clip.path.open("rb") as file:
            uploads.append(client.files.create(file=file, purpose="user_data"))
        return messages(clip, {"type": "file", "file": {"file_id": uploads[-1].id}})

    all_right("a video as upload", uploaded)
    wanted = [(each.clip.path.name, each.clip.path.stat().st_size) for each in right]
    page = client.files.list()
    checks.check("files.list ends", not page.has_next_page())
    listed = sorted((file.filename, file.bytes) for file in page.data)
    checks.check("files.list names the uploads", listed == wanted, f"{len(listed)} files")
    first = uploads[0].id
    checks.check("files.retrieve", client.files.retrieve(first).bytes == wanted[0][1])
    checks.check("files.delete", all(client.files.delete(file.id).deleted for file in uploads))
    checks.refused("a deleted upload", openai.NotFoundError, lambda: client.files.retrieve(first))


def check_pictures(checks: Checks, client: openai.OpenAI, asked: list[Asked]) -> None:
    """Frames without a video."""
    clips = [each.clip for each in asked if each.known == each.clip.answer]
    said = [(say(client, messages(clip, *pictures(clip))), clip.answer) for clip in clips]
    checks.same(f"{FRAMES} frames as image_url", said)


def check_streams(checks: Checks, client: openai.OpenAI, right: list[Asked]) -> None:
    """The pieces of an answer make the answer, also where there are several."""

    def streamed(clip: Clip, **options: Any) -> tuple[str, list, list]:
        chunks = list(
            client.chat.completions.create(
                model=NAME,
                messages=inline(clip),
                stream=True,
                stream_options={"include_usage": True},
                **options,
            )
        )
        choices = [choice for chunk in chunks for choice in chunk.choices]
        return "".join(choice.delta.content or "" for choice in choices), choices, chunks

    checks.same("stream=True", [(streamed(one.clip)[0], one.clip.answer) for one in right])
    clip, pairs, most, counted = right[0].clip, [], 0, True
    for seed in range(8):  # so hot that the answers are long, and anything
        options = {"temperature": 10.0, "seed": seed}
        whole = client.chat.completions.create(model=NAME, messages=inline(clip), **options)
        text, choices, chunks = streamed(clip, **options)
        pairs.append((text, whole.choices[0].message.content))
        most = max(most, sum(bool(choice.delta.content) for choice in choices))
        ends = [choice.finish_reason for choice in choices if choice.finish_reason]
        usage = [chunk.usage for chunk in chunks if chunk.usage]
        counted &= ends == [whole.choices[0].finish_reason] and usage == [whole.usage]
        counted &= not chunks[-1].choices and usage[0].completion_tokens > 0
    checks.same("the pieces of a stream make the whole answer", pairs)
    checks.check("some of them come in several pieces", most > 1, f"at most {most}")
    checks.check("include_usage counts as the whole answer does, and last", counted)


def check_sessions(checks: Checks, client: openai.OpenAI, asked: list[Asked]) -> int:
    """Sessions opened by the client's low-level calls, asked by chat; the bytes of one."""
    known, late, seen = [], [], True
    for each in asked:
        clip = each.clip
        body = {"questions": [clip.question]}
        opened: Any = client.post("/sessions", cast_to=object, body=body)
        size = opened["bytes"]
        for half in (slice(0, FRAMES // 2), slice(FRAMES // 2, FRAMES)):
            frames = [data(as_png(frame), "image/png") for frame in clip.frames[half]]
            pushed: Any = client.post(
                f"/sessions/{opened['id']}/frames", cast_to=object, body={"frames": frames}
            )
            seen &= pushed["seen"] == half.stop
        sent = [{"role": "user", "content": clip.question}]
        if each.known == clip.answer:
            known.append((say(client, sent, extra_body={"session": opened["id"]}), clip.answer))
        client.delete(f"/sessions/{opened['id']}", cast_to=object)

        opened = client.post("/sessions", cast_to=object, body={})
        frames = [data(as_png(frame), "image/png") for frame in clip.frames]
        path = f"/sessions/{opened['id']}/frames"
        client.post(path, cast_to=object, body={"frames": frames})
        completion = client.chat.completions.create(
            model=NAME, messages=sent, extra_body={"session": opened["id"]}
        )
        late.append((completion.choices[0].message.content, each.late))
        evidence = completion.model_extra["adacm2"]
        seen &= (evidence["session"], evidence["frames"]) == (opened["id"], FRAMES)
        client.delete(f"/sessions/{opened['id']}", cast_to=object)
    checks.same("a session that knows the question, by extra_body", known)
    checks.same("a session asked late, against the Python door's", late)
    right = sum(each.late == each.clip.answer for each in asked)
    checks.check("sessions see every frame", seen, f"the late door is right {right} times")
    return size


def check_errors(checks: Checks, client: openai.OpenAI, clip: Clip, root: Path) -> None:
    """Each fault is the exception that OpenAI's client has for it."""
    stranger = client.with_options(api_key="another")
    checks.refused("a wrong token", openai.AuthenticationError, stranger.models.list)
    create = client.chat.completions.create

    def asking(*parts: dict, **options: Any) -> Callable[[], Any]:
        options = {"model": NAME, "messages": messages(clip, *parts)} | options
        return lambda: create(**options)

    good = video(clip.path.as_uri())
    missing, bad = openai.NotFoundError, openai.BadRequestError
    unreadable = openai.UnprocessableEntityError
    checks.refused("an unknown model", missing, asking(good, model="gpt-5"))
    checks.refused("models.retrieve of another", missing, lambda: client.models.retrieve("gpt-5"))
    checks.refused("no such session", missing, asking(extra_body={"session": "s-none"}))
    text = data(b"This is a text, and no video.", "video/mp4")
    checks.refused("an unreadable video", unreadable, asking(video(text)))
    cut = data(clip.path.read_bytes()[:500], "video/mp4")
    checks.refused("a video that is cut short", unreadable, asking(video(cut)))
    no_picture = {"type": "image_url", "image_url": {"url": data(b"text", "image/png")}}
    checks.refused("an unreadable picture", unreadable, asking(no_picture))
    checks.refused("temperature=-1", bad, asking(good, temperature=-1.0))
    checks.refused("n=2", bad, asking(good, n=2))
    checks.refused("no video", bad, asking())
    checks.refused("an address", bad, asking(video("https://127.0.0.1/clip.mp4")))
    outside = root / "outside.mp4"
    outside.write_bytes(clip.path.read_bytes())
    checks.refused("a file outside --allow", bad, asking(video(outside.as_uri())))
    stream = asking(video(text), stream=True)
    checks.refused("an unreadable video, streamed", unreadable, stream)


async def check_many(checks: Checks, url: str, right: list[Asked]) -> None:
    """Eight at once, by the asynchronous client."""
    async with openai.AsyncOpenAI(base_url=url, api_key=TOKEN, max_retries=0) as client:

        async def one(each: Asked) -> tuple[str, str]:
            completion = await client.chat.completions.create(
                model=NAME, messages=inline(each.clip)
            )
            return completion.choices[0].message.content, each.clip.answer

        eight = (right * 8)[:8]
        checks.same("8 requests at once", await asyncio.gather(*map(one, eight)))


async def check_full(checks: Checks, url: str, clips: list[Clip]) -> None:
    """A server with room for one session: others are told so, and come in when they ask again."""
    async with openai.AsyncOpenAI(base_url=url, api_key=TOKEN, max_retries=0) as client:

        async def one(clip: Clip, retries: int) -> str | Exception:
            create = client.with_options(max_retries=retries).chat.completions.create
            try:
                completion = await create(model=NAME, messages=inline(clip))
            except openai.OpenAIError as error:
                return error
            return completion.choices[0].message.content

        said = await asyncio.gather(*(one(clip, 0) for clip in clips))
        full = [one for one in said if isinstance(one, openai.RateLimitError)]
        answered = sum(isinstance(one, str) for one in said)
        told = f"{answered} answered, {len(full)} refused" + (f", {full[0]}" if full else "")
        checks.check("a full server", full and answered and len(full) + answered == len(said), told)
        said = await asyncio.gather(*(one(clip, RETRIES) for clip in clips))
        others = [one for one in said if not isinstance(one, str)]
        told = f"{len(said) - len(others)} answered" + (f", {others[0]!r}" if others else "")
        checks.check("a full server, asked again by the client itself", not others, told)


if __name__ == "__main__":
    sys.exit(main())
