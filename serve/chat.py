"""The OpenAI chat format: its request in, the model's conversation out."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from addressvlm.answers.texts import Sampling
from serve.body import checked
from serve.errors import ApiError

ALIAS = "addressvlm"  # accepted as the model's name where one model is served
MAX_MESSAGES = 64
MAX_IMAGES = 8
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_TEXT = 100_000  # characters of all messages; no model here reads as much, and counting its tokens takes time
Stop = Annotated[str, Field(max_length=200)]


class _Loose(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ImageUrl(_Loose):
    """An image of a message."""

    url: str = Field(description="a data URL, or a web address of a host that this service allows")
    detail: str | None = None


class Part(_Loose):
    """Text or an image."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


def _parts(content: Any) -> Any:
    """Plain text and nothing are shorthands for a list of parts."""
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Loose):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part] | None)] = []


class StreamOptions(_Loose):
    """What a stream tells beside the text."""

    include_usage: bool = False


class ChatRequest(_Loose):
    """What is understood of a chat request; what would change the answer and can't is refused, all else has no effect."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[str, Any] | None = None

    def sampling(self, most: int) -> Sampling:
        """How the model is to draw, with at most `most` tokens an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=min(self.max_completion_tokens or self.max_tokens or most, most),
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            n=self.n or 1,
            stop=[stop for stop in stops if stop],
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            seed=self.seed,
        )


def read_request(payload: Any) -> ChatRequest:
    """Check a request against the format.

    Raises:
        ApiError: 400 naming the parameter.
    """
    request = checked(ChatRequest, payload)
    if (request.response_format or {"type": "text"}).get("type") != "text":
        raise ApiError(400, "Answers are plain text: leave out response_format.", param="response_format")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    if request.messages[-1].role != "user":
        raise ApiError(400, "The last message must be the user's.", param="messages")
    size = sum(len(part.text) for message in request.messages for part in message.content)
    if size > MAX_TEXT:
        raise ApiError(400, f"The messages have {size} characters, at most {MAX_TEXT} are read.", param="messages")
    return request


def conversation(request: ChatRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages as chat templates take them, and the images' URLs in the order they appear.

    Within a turn images go before the text, as in training.

    Raises:
        ApiError: an image part without its URL, an image not from the user, or too many images.
    """
    messages, urls = [], []
    for number, message in enumerate(request.messages):
        content: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
                continue
            if part.image_url is None or message.role != "user":
                raise ApiError(400, "An image is a user's part with image_url.url.", param=f"messages.{number}.content")
            content.append({"type": "image"})
            urls.append(part.image_url.url)
        content.sort(key=lambda part: part["type"] != "image")
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if len(urls) > MAX_IMAGES:
        raise ApiError(400, f"{len(urls)} images in one request, at most {MAX_IMAGES} are accepted.", param="messages")
    return messages, urls
