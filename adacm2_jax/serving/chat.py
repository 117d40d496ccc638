"""OpenAI's chat completions: from messages to media and a question, and answers back."""

import contextlib
import dataclasses
import json
import secrets
import time
from typing import Any

from adacm2_jax.errors import UserError, printable
from adacm2_jax.serving.decoders import Media
from adacm2_jax.serving.limits import LargeError
from adacm2_jax.serving.media import Media as Files
from adacm2_jax.serving.operations import Said, Wish
from adacm2_jax.serving.schemas import ChatRequest, Part, address_of

#: Kinds of file by how a data address begins; others are taken for videos.
_PICTURES = ("data:image/",)


@dataclasses.dataclass(frozen=True)
class Chat:
    """What a conversation comes to.

    Attributes:
      media: in the order in which they stand in it.
      wish: the question and how it is to be answered.
    """

    media: list[Media]
    wish: Wish


def read_chat(
    request: ChatRequest, files: Files, stack: contextlib.ExitStack, longest: int, most: int
) -> Chat:
    """The media and the question of a conversation.

    The question is the text of the last message. Media may stand in any message of the user's;
    together they are one stream of frames. Other texts are not read: the model answers a question
    about what it sees, and remembers no conversation.

    Args:
      request: the conversation.
      files: where media are.
      stack: what is written for them is removed when it closes.
      longest: tokens of the longest answer.
      most: pictures and videos that there may be.

    Raises:
      UserError: for what the model cannot do.
    """
    if request.n not in (None, 1):
        raise UserError(f"n is {request.n}; this server writes one answer, ask again for another")
    if request.logprobs:
        raise UserError("logprobs are not given; an answer's score is in its field adacm2")
    last = request.messages[-1]
    if last.role != "user":
        raise UserError(f"the last message is of role {last.role!r}; end with the user's question")
    contents = [message.content for message in request.messages]
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > most:
        raise LargeError(f"the messages have {parts:,} parts, the limit is {most:,} (--frames)")
    media: list[Media] = []
    for number, message in enumerate(request.messages):
        if isinstance(message.content, list) and message.role == "user":
            for place, part in enumerate(message.content):
                what = f"messages[{number}].content[{place}]"
                _add(media, part, request, files, stack, what)
    written = last.content if isinstance(last.content, list) else []
    texts = [part.text or "" for part in written if part.type == "text"]
    question = last.content if isinstance(last.content, str) else "\n".join(texts)
    if request.session and media:
        raise UserError(
            "a request names a session and brings media; push them to "
            "/v1/sessions/ID/frames, or leave the session out"
        )
    if not request.session and not media:
        raise UserError(
            "no message holds a video or a picture, and no session is named; add a part of type "
            "video_url or image_url, or the field session"
        )
    return Chat(media, _wish(request, question, longest))


def _wish(request: ChatRequest, question: str | None, longest: int) -> Wish:
    stop = request.stop or []
    most = request.max_completion_tokens or request.max_tokens or longest
    return Wish(
        question=(question or "").strip(),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(31) if request.seed is None else request.seed % 2**31,
        max_tokens=min(most, longest),
        stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
    )


def _add(
    media: list[Media],
    part: Part,
    request: ChatRequest,
    files: Files,
    stack: contextlib.ExitStack,
    what: str,
) -> None:
    """A part that is no text becomes one of the media; pictures that follow each other join."""
    if part.type == "text":
        return
    kind, address = _address(part, what)
    path = files.resolve(address, stack, what)
    previous = media[-1] if media else None
    if kind == "pictures" and previous is not None and previous.kind == "pictures":
        media[-1] = dataclasses.replace(previous, paths=(*previous.paths, path))
    elif kind == "pictures":
        media.append(Media("pictures", (path,), what))
    else:
        media.append(Media("video", (path,), what, request.fps, request.start, request.end))


def _address(part: Part, what: str) -> tuple[str, str]:
    if part.type in ("image_url", "input_image"):
        kind, address = "pictures", address_of(part.image_url)
    elif part.type in ("video_url", "input_video"):
        kind, address = "video", address_of(part.video_url)
    else:
        file = part.file
        address = (file.file_id or file.file_data or "") if file else ""
        kind = "pictures" if address.startswith(_PICTURES) else "video"
    if not address:
        raise UserError(f"{what} is of type {printable(part.type)} and names nothing; add its url")
    return kind, address


# --- Answers -----------------------------------------------------------------------------------


def completion(said: Said, model: str, session: str | None) -> dict[str, Any]:
    """A whole answer."""
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.reply.answer, "refusal": None},
                "logprobs": None,
                "finish_reason": said.finish,
            }
        ],
        "usage": _usage(said),
        "adacm2": evidence(said, session),
    }


def evidence(said: Said, session: str | None = None) -> dict[str, Any]:
    """What an answer rests on."""
    reply = said.reply
    return {
        "session": session,
        "policy": reply.policy,
        "score": reply.score,
        "frames": reply.frames,
        "kept_tokens": reply.kept_tokens,
        "total_tokens": reply.total_tokens,
        "moments": [dataclasses.asdict(moment) for moment in reply.moments],
    }


class Pieces:
    """An answer piece by piece, as server-sent events.

    Args:
      model: its name.
      session: that is asked, if it is one.
      include_usage: a last piece counts the tokens.
    """

    def __init__(self, model: str, session: str | None, include_usage: bool):
        self._session, self._include_usage = session, include_usage
        self._same = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }

    def first(self) -> str:
        """Before the first text."""
        return self._event({"role": "assistant", "content": ""})

    def text(self, text: str) -> str:
        """A piece of the answer."""
        return self._event({"content": text})

    def last(self, said: Said) -> str:
        """After the last text."""
        ends = self._event({}, said.finish, adacm2=evidence(said, self._session))
        if self._include_usage:
            ends += line(self._same | {"choices": [], "usage": _usage(said)})
        return ends + "data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return line(self._same | {"choices": [choice]} | more)


def line(value: dict[str, Any]) -> str:
    """A server-sent event.

    Raises:
      ValueError: for a number that JSON does not have.
    """
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _usage(said: Said) -> dict[str, int]:
    return {
        "prompt_tokens": said.prompt_tokens,
        "completion_tokens": said.completion_tokens,
        "total_tokens": said.prompt_tokens + said.completion_tokens,
    }
