"""The OpenAI chat format: its request in, the model's conversation out, and back."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from serve.errors import ApiError

ALIAS = "addressvlm"  # always accepted as the model's name
MAX_MESSAGES = 64
MAX_IMAGES = 8


class ImageUrl(BaseModel):
    url: str


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


def _parts(content: Any) -> Any:
    """Plain text and nothing are shorthands for a list of parts."""
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)] = []


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is understood of a chat request; other sampling parameters are accepted and have no effect."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    tools: None = None
    logprobs: Literal[False] | None = None
    response_format: dict[str, Any] | None = None

    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s]


def read_request(payload: Any, served: str) -> ChatRequest:
    """Check a request against the format and the name of the model served.

    Raises:
        ApiError: 400 naming the parameter, 404 for another model.
    """
    if not isinstance(payload, dict):
        raise ApiError(400, 'The body must be a JSON object with "model" and "messages".')
    try:
        request = ChatRequest.model_validate(payload)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{param}: {first['msg']}.", param=param) from None
    if request.model not in (served, ALIAS):
        raise ApiError(404, f"No model '{request.model}' here, this service has '{served}'.", "model", "model_not_found")
    if (request.response_format or {"type": "text"}).get("type") != "text":
        raise ApiError(400, "Answers are plain text: leave out response_format.", param="response_format")
    if request.messages[-1].role != "user":
        raise ApiError(400, "The last message must be the user's.", param="messages")
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


class Completion:
    """One answer in the shapes that clients expect: whole, or as server-sent events."""

    def __init__(self, model: str, text: str, finish: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.text, self.finish = text, finish
        self.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def whole(self) -> dict[str, Any]:
        """A `chat.completion` object."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": self.finish, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.usage}

    def events(self, include_usage: bool) -> Iterator[str]:
        """`chat.completion.chunk` events, a word at a time, then `[DONE]`."""
        yield self._chunk({"role": "assistant", "content": ""})
        for word in _words(self.text):
            yield self._chunk({"content": word})
        yield self._chunk({}, self.finish)
        if include_usage:
            yield self._event({"choices": [], "usage": self.usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> str:
        return self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]})

    def _event(self, body: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **body})}\n\n"


def _words(text: str) -> list[str]:
    """Pieces that joined are the text again."""
    first, *rest = text.split(" ")
    return [piece for piece in (first, *(f" {word}" for word in rest)) if piece]
