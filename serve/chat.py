"""The OpenAI chat format: from its request to the model's conversation, and from the model's answers to its response."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from addressvlm.answers.types import Completion, TextChunk, TokenScore
from serve.errors import ApiError, to_api_error
from serve.requests import validate
from serve.schemas import ChatRequest

MODEL_ALIAS = "addressvlm"  # accepted as the model's name if the service has one model
MAX_IMAGES = 8
UNSUPPORTED = (
    "presence_penalty frequency_penalty repetition_penalty top_k min_p logit_bias tools tool_choice functions function_call "
    "modalities audio prediction web_search_options"
).split()
MAX_TEXT = 100_000  # characters of all messages; no model here reads as many, and counting their tokens takes time


def parse_chat(payload: Any) -> ChatRequest:
    """Check a request against the format. ApiError: 400 naming the parameter."""
    try:
        request = validate(ChatRequest, payload)
    except ApiError as error:
        field = (error.param or "").partition(".")[0]
        if field in UNSUPPORTED:
            raise ApiError(400, f"{field} is not supported, and would change the answer: leave it out.", field) from None
        raise
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
    """The messages as chat templates take them, and the images' URLs in order of appearance.

    Within a turn images go before the text, as in training. ApiError: 400 an image has no URL or is not the user's; too many.
    """
    messages: list[dict[str, Any]] = []
    urls: list[str] = []
    for number, message in enumerate(request.messages):
        images = [part.image_url for part in message.content if part.type == "image_url"]
        if images and (message.role != "user" or None in images):
            raise ApiError(400, "An image is a user's part with image_url.url.", param=f"messages.{number}.content")
        urls += [image.url for image in images if image]
        content = [{"type": "text", "text": part.text} for part in message.content if part.type == "text"]
        content = [*({"type": "image"} for _ in images), *content]
        messages.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if len(urls) > MAX_IMAGES:
        raise ApiError(400, f"{len(urls)} images in one request, at most {MAX_IMAGES} are accepted.", param="messages")
    return messages, urls


class ChatResponse:
    """The response to one chat request, at once or as a stream of events.

    Args:
        model: the model's name.
        logprobs: whether the request wants them.

    Attributes:
        usage: tokens read and written so far.
        error: that ended the stream early.
    """

    def __init__(self, model: str, logprobs: bool) -> None:
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.logprobs = logprobs
        self.usage = (0, 0)
        self.error: ApiError | None = None

    def completion(self, answers: Sequence[Completion]) -> dict[str, Any]:
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
        self.usage = answers[0].prompt_tokens, sum(answer.tokens for answer in answers)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": _usage(*self.usage)}

    async def events(self, chunks: AsyncIterator[TextChunk], include_usage: bool) -> AsyncIterator[str]:
        """`chat.completion.chunk` events as the chunks come, then `[DONE]`; an error on the way is an event, too."""
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        tokens: dict[int, int] = {}  # of each answer
        blanks: dict[int, str] = {}  # at the end of each answer so far
        started: set[int] = set()  # answers that have text
        try:
            async for chunk in chunks:
                index = chunk.index
                if index not in tokens:
                    yield self._event(index, {"role": "assistant", "content": ""}, **usage)
                tokens[index] = chunk.tokens
                self.usage = chunk.prompt_tokens, sum(tokens.values())
                text, blanks[index] = strip_stream(blanks.get(index, ""), chunk.text, index not in started)
                if text:
                    started.add(index)
                if text or chunk.scores:
                    yield self._event(index, {"content": text}, scores=chunk.scores, **usage)
                if chunk.finish:
                    yield self._event(index, {}, chunk.finish, **usage)
        except Exception as error:
            self.error = to_api_error(error)
            yield f"data: {json.dumps(self.error.body())}\n\n"
            return
        if include_usage:
            yield self._encode({"choices": [], "usage": _usage(*self.usage)})
        yield "data: [DONE]\n\n"

    def _event(
        self, index: int, delta: dict[str, str], finish: str | None = None, scores: Sequence[TokenScore] = (), **usage: None
    ) -> str:
        logprobs = self._logprobs(scores) if scores else None
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return self._encode({"choices": [choice], **usage})

    def _encode(self, body: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **body})}\n\n"

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None

        def token(text: str, log_p: float) -> dict[str, Any]:
            return {"token": text, "logprob": max(log_p, -9999.0), "bytes": list(text.encode())}  # JSON has no -Infinity

        content = [{**token(score.text, score.log_p), "top_logprobs": [token(*top) for top in score.top]} for score in scores]
        return {"content": content, "refusal": None}


def strip_stream(blanks: str, text: str, first: bool) -> tuple[str, str]:
    """Strip an answer that comes in chunks.

    Args:
        blanks: whitespace at the end of the chunks before.
        first: whether all before was whitespace.

    Returns:
        Text to send now, and the whitespace at its end, which is sent only if more text follows.
    """
    text = blanks + text
    text = text.lstrip() if first else text
    stripped = text.rstrip()
    return stripped, text[len(stripped) :]


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
