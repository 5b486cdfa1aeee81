"""The OpenAI chat format: its request in, the model's conversation out."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore
from serve.errors import ApiError, user_message
from serve.schemas import checked

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


class Reply:
    """The answers to one chat request.

    Args:
        model: the model's name.
        logprobs: whether they were asked for.
    """

    def __init__(self, model: str, logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.logprobs = logprobs
        self.used = (0, 0)  # tokens read and written so far

    def whole(self, answers: Sequence[Completion]) -> dict[str, Any]:
        """A `chat.completion` object."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "finish_reason": answer.finish,
                "logprobs": self._logprobs(answer.scores),
            }
            for index, answer in enumerate(answers)
        ]
        self.used = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": _usage(*self.used)}

    async def events(self, pieces: AsyncIterator[TextChunk], include_usage: bool) -> AsyncIterator[str]:
        """`chat.completion.chunk` events as the pieces come, then `[DONE]`; an error in between is an event too."""
        written: dict[int, int] = {}
        held: dict[int, str] = {}
        begun: set[int] = set()
        try:
            async for piece in pieces:
                if piece.index not in written:
                    yield self._chunk(piece.index, {"role": "assistant", "content": ""})
                written[piece.index] = piece.tokens
                self.used = piece.prompt_tokens, sum(written.values())
                text, held[piece.index] = _without_blanks(held.get(piece.index, ""), piece.text, piece.index not in begun)
                begun |= {piece.index} if text else set()
                if text or piece.scores:
                    yield self._chunk(piece.index, {"content": text}, scores=piece.scores)
                if piece.finish:
                    yield self._chunk(piece.index, {}, piece.finish)
        except Exception as error:
            yield f"data: {json.dumps(user_message(error).body())}\n\n"
            return
        if include_usage:
            yield self._event({"choices": [], "usage": _usage(*self.used)})
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None = None, scores: Sequence[TokenScore] = ()) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish,
            "logprobs": self._logprobs(scores) if scores else None,
        }
        return self._event({"choices": [choice]})

    def _event(self, body: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **body})}\n\n"

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**_token(score.text, score.log_p), "top_logprobs": [_token(text, log_p) for text, log_p in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}


def _token(text: str, log_p: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(log_p, -9999.0), "bytes": list(text.encode())}  # -9999: no -Infinity in JSON


def _without_blanks(held: str, text: str, first: bool) -> tuple[str, str]:
    """What may be given away, and the blanks at the end that wait for more: as when a whole answer is stripped."""
    text = held + text
    text = text.lstrip() if first else text
    kept = text.rstrip()
    return kept, text[len(kept) :]


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
