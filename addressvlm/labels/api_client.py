"""Requests to an OpenAI-compatible endpoint.

The key comes from OPENAI_API_KEY only; it is removed from everything that the endpoint returns.
"""

import asyncio
import json
import os
import re
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import httpx2
import openai
from pydantic_core import to_json

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.answer_text import completion_text, token_counts
from addressvlm.labels.response_cache import MAX_TEXT, CachedAnswer
from addressvlm.storage.http_client import retry_after

KEY = "OPENAI_API_KEY"
KEEPALIVE_S = 4.0  # of an idle connection: vLLM's server closes them after 5 s, even if a request is on its way
MAX_MESSAGE = 300  # characters of the endpoint's message in an error
MAX_PAGE = 10_000  # characters of a page in which the message is looked for
KEY_PATTERN = re.compile(r"(?i)\bsk-[\w-]{8,}")  # in a label, where "bearer" may be an ordinary word
BEARER_PATTERN = re.compile(r"(?i)\bbearer\s+\S+|\bsk-[\w-]{8,}")
TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_IMAGE_SIZE = re.compile(r"(?i)image.{0,80}(too (large|big)|exceed|maximum|limit)|(too (large|big)|exceed|maximum).{0,80}image")
_IMAGE_BAD = re.compile(
    r"(?i)(invalid|unsupported|corrupt|could not|can.?not|unable|fail).{0,60}image|image.{0,60}(invalid|corrupt)"
)
_POLICY = re.compile(r"(?i)content.{0,3}(management.)?(policy|filter)|safety system|moderation")


class TransientError(Exception):
    """A request failed and may work when it is retried.

    Attributes:
        message: what happened, without the key.
        kind: for statistics: the HTTP status, or `time-out`, `connection`, `no JSON`.
        retry_after_s: how long the endpoint asks to wait, None if it does not say.
        paid: the endpoint may have charged the request.
    """

    def __init__(self, message: str, kind: str, retry_after_s: float | None = None, paid: bool = False) -> None:
        super().__init__(message)
        self.message, self.kind, self.retry_after_s, self.paid = message, kind, retry_after_s, paid


class EndpointClient:
    """Sends single requests, without retries: those are for the scheduler, which knows limits and budget.

    Attributes:
        address: of the endpoint, for messages: without user and query.
    """

    def __init__(self, config: LabelsConfig) -> None:
        """Sends nothing yet; needs a running event loop."""
        self.config, self._key = config, endpoint_key(config)
        # aiohttp needs half the processor time of httpx, and a body that is bytes is not copied and parsed again.
        limits = httpx2.Limits(max_connections=config.concurrency, keepalive_expiry=KEEPALIVE_S)
        http = openai.DefaultAioHttpClient(limits=limits)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=config.base_url, timeout=None, max_retries=0, http_client=http
        )
        self._url = f"{self._client.base_url}chat/completions"  # absolute: joining it takes longer than sending
        url = urlsplit(str(self._client.base_url))
        self.address = urlunsplit((url.scheme, url.netloc.rpartition("@")[2], url.path, "", ""))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def body(self, messages: list[dict[str, Any]]) -> bytes:
        """The JSON body of a request with these chat messages."""
        fields = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
            **self.config.extra_body,
        }
        return to_json({key: value for key, value in fields.items() if value is not None})

    async def send(self, body: bytes) -> CachedAnswer:
        """The answer to a request, without its price.

        Raises:
            TransientError: it may work when it is retried.
            InputError: the endpoint refuses the key, the model or the request.
        """
        start = time.monotonic()
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self.config.timeout_s):
                response = await self._client.post(
                    self._url, content=body, cast_to=httpx2.Response, options={"headers": headers}
                )
        except TimeoutError:
            raise TransientError(f"no answer within {self.config.timeout_s:g} s", "time-out", paid=True) from None
        except openai.APIStatusError as error:
            return self._answer_of_error(error.status_code, error.body, error.response.headers, error.response.text)
        except openai.APIError as error:
            cause: BaseException = error  # the client calls a refused connection a time-out as well
            while cause.__cause__ is not None:
                cause = cause.__cause__
            paid = not isinstance(cause, aiohttp.ClientConnectorError | ConnectionRefusedError)  # it was sent
            raise TransientError(self._redact(f"the connection failed: {cause}"), "connection", paid=paid) from None
        return self._answer_of_success(response.content, response.headers, time.monotonic() - start)

    def _answer_of_success(self, content: bytes, headers: Any, seconds: float) -> CachedAnswer:
        """The answer in a response with status 200, which may hold an error or no JSON nevertheless."""
        try:
            response = json.loads(content)
        except (ValueError, RecursionError):
            kind = "a page instead of JSON" if content.lstrip()[:1] == b"<" else "incomplete JSON"
            page = _plain_text(content[:MAX_MESSAGE].decode(errors="replace"))
            raise TransientError(
                self._redact(f"{kind} came back (“{page}”); is labels.base_url right?"), "no JSON", paid=True
            ) from None
        fields = response if isinstance(response, dict) else {}
        choices, error = fields.get("choices"), fields.get("error")
        if error and not choices:
            code = str(error.get("code") or error.get("status") if isinstance(error, dict) else None)
            return self._answer_of_error(
                int(code) if re.fullmatch("[1-5][0-9][0-9]", code) else 500, error, headers, str(error)
            )
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict) and isinstance(choice.get("error"), dict):  # OpenRouter, when a provider fails half-way
            raise TransientError(
                self._redact(f"the model broke off ({choice['error'].get('message')})"), "broken off", paid=True
            )
        text, refusal, unusable = completion_text(response, self.config.max_tokens)
        tokens_in, tokens_out = token_counts(fields.get("usage"))
        return CachedAnswer(
            text=self._redact(text, KEY_PATTERN, MAX_TEXT) if text else text,
            refusal=self._redact(refusal) if refusal else None,
            unusable=unusable,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            seconds=seconds,
        )

    def _answer_of_error(self, status: int, body: Any, headers: Any, raw: str) -> CachedAnswer:
        """A refusal of this row; other errors are raised, to retry or to end the job."""
        error = body if isinstance(body, dict) else {}
        error = error["error"] if isinstance(error.get("error"), dict) else error
        message = self._redact(_plain_text(str(error.get("message") or raw)))
        sentence, code = f"{status}: {message}" if message else f"status {status}", str(error.get("code") or "")
        if status == 402 or code == "insufficient_quota":
            raise InputError(f"{self.address} has no credit left ({sentence}): add some, then rerun to resume.")
        if status in TRANSIENT_STATUS or status >= 500:
            raise TransientError(sentence, str(status), retry_after(headers))
        if status == 413 or (status in (400, 422) and _IMAGE_SIZE.search(message)):
            raise InputError(
                f"{self.address} refuses the image as too large ({sentence}): lower labels.image_pixels or "
                "labels.image_quality."
            )
        if status in (400, 403, 422) and (_POLICY.search(code) or _POLICY.search(message)):
            return CachedAnswer(refusal=sentence)
        if status in (400, 422) and (code.startswith("invalid_image") or _IMAGE_BAD.search(message)):
            return CachedAnswer(refusal=sentence)
        raise InputError(
            f"{self.address} refuses the request ({sentence}): check {KEY}, labels.model, labels.base_url and "
            "labels.extra_body."
        )

    def _redact(self, text: str, similar: re.Pattern[str] = BEARER_PATTERN, length: int = MAX_MESSAGE) -> str:
        """The text without the key and what looks like one, cut to `length`."""
        text = text.encode(errors="replace").decode()
        if self._key != "none":
            text = text.replace(self._key, "…")
        return similar.sub("…", text)[:length]


def endpoint_key(config: LabelsConfig) -> str:
    """The key to the endpoint; `none` for a server of your own without one."""
    key = os.environ.get(KEY) or ("none" if config.base_url else "")
    if not key:
        raise InputError(f"{KEY} is not set and labels.labeler is openai: set it where the job runs, or use template.")
    return key


def _plain_text(page: str) -> str:
    """Text of an HTML page or a message, on one line, from its beginning (time grows by the square of what is read)."""
    return " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", page[:MAX_PAGE]).split())
