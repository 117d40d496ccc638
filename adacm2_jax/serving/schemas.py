"""What callers send, as JSON; the names of OpenAI's API where it has one for the thing."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("true and false are no numbers")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Text = Annotated[str, Field(max_length=1 << 16)]
#: One that ends an answer is looked for after every token.
Stop = Annotated[str, Field(max_length=256)]
#: 1 / fps is a time between frames: neither is so small that the other has no bound.
Rate = Annotated[Number, Field(ge=1e-6, le=1000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Lenient(BaseModel):
    """Clients send fields that do not concern a model of videos."""

    model_config = ConfigDict(extra="ignore")


class Address(_Lenient):
    """``url``: a data address, ``file:///…`` or the id of an upload."""

    url: str


class File(_Lenient):
    """A file, by its id or its bytes."""

    file_id: str | None = None
    file_data: str | None = None


class Part(_Lenient):
    """A piece of a message."""

    type: Literal["text", "image_url", "video_url", "input_image", "input_video", "file"]
    text: Text | None = None
    image_url: Address | str | None = None
    video_url: Address | str | None = None
    file: File | None = None


class Message(_Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None


class StreamOptions(_Lenient):
    """``include_usage``: a last piece counts the tokens."""

    include_usage: bool = False


class ChatRequest(_Lenient):
    """``POST /v1/chat/completions``; ``session``, ``fps``, ``start`` and ``end`` are ours."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    n: Whole | None = 1
    logprobs: bool | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    session: Text | None = None
    fps: Rate = 1.0
    start: Annotated[Number, Field(ge=0)] | None = None
    end: Annotated[Number, Field(gt=0)] | None = None


class SessionRequest(_Strict):
    """``POST /v1/sessions``."""

    questions: list[Text] = []
    seconds_per_frame: Annotated[Number, Field(ge=1e-3, le=1e9)] = 1.0
    open_tokens: Annotated[Whole, Field(ge=0, le=1 << 20)] = 0


class FramesRequest(_Strict):
    """``POST /v1/sessions/{id}/frames``: pictures, or a video, by their addresses."""

    frames: list[str] | None = None
    video: str | None = None
    start: Annotated[Number, Field(ge=0)] | None = None
    end: Annotated[Number, Field(gt=0)] | None = None


class AskRequest(_Strict):
    """``POST /v1/sessions/{id}/ask``; without a question the first that is known."""

    question: Text | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] = 0
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    moments: Annotated[Whole, Field(ge=0, le=1000)] = 5


def address_of(value: Address | str | None) -> str:
    """The address in either of its two forms; "" if there is none."""
    return value.url if isinstance(value, Address) else value or ""
