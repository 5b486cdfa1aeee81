"""One call to an OpenAI-compatible endpoint, and what each way of failing means.

The key comes from OPENAI_API_KEY and from nowhere else; it is taken out of everything the endpoint says.
"""

import asyncio
import json
import os
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import openai
from pydantic_core import to_json

from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.response_cache import LONGEST_TEXT, CachedAnswer
from addressvlm.storage.http_client import retry_after

KEY = "OPENAI_API_KEY"
KEPT_S = 4.0  # that an idle connection is kept: vLLM's server closes them after 5, with a request on its way or not
LONGEST_SAID = 300  # characters of the endpoint's own words in an error
TOKEN = re.compile(r"(?i)\bsk-[\w-]{8,}")  # in a label, where a bearer may be a man of stone
BEARER = re.compile(r"(?i)\bbearer\s+\S+|\bsk-[\w-]{8,}")
_FOR_NOW = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_IMAGE_SIZE = re.compile(r"(?i)image.{0,80}(too (large|big)|exceed|maximum|limit)|(too (large|big)|exceed|maximum).{0,80}image")
_IMAGE_BAD = re.compile(
    r"(?i)(invalid|unsupported|corrupt|could not|can.?not|unable|fail).{0,60}image|image.{0,60}(invalid|corrupt)"
)
_POLICY = re.compile(r"(?i)content.{0,3}(management.)?(policy|filter)|safety system|moderation")


class TransientError(Exception):
    """The call failed and may work when it is tried again.

    Attributes:
        said: what happened, without the key.
        kind: HTTP status, or `time-out`, `connection`, `no JSON`; to count by.
        wait_s: how long the endpoint asks to wait, None if it does not say.
    """

    def __init__(self, said: str, kind: str, wait_s: float | None = None) -> None:
        super().__init__(said)
        self.said, self.kind, self.wait_s = said, kind, wait_s


class EndpointClient:
    """Asks one endpoint. Tries nothing twice: that is for those who know about limits and budgets."""

    def __init__(self, config: LabelsConfig) -> None:
        """Nothing is sent yet; needs a running event loop.

        Raises:
            InputError: the key is missing.
        """
        self.config, self._key = config, endpoint_key(config)
        # aiohttp needs half the processor time of httpx, and the body is made once instead of copied and walked through.
        limits = httpx2.Limits(max_connections=config.concurrency, keepalive_expiry=KEPT_S)
        http = openai.DefaultAioHttpClient(limits=limits)
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=config.base_url, timeout=None, max_retries=0, http_client=http
        )
        self._url = f"{self._client.base_url}chat/completions"  # whole: putting it together takes longer than sending
        self.where = _shown(str(self._client.base_url))

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.close()

    def body(self, messages: list[dict[str, Any]]) -> bytes:
        """The request that asks these messages, as JSON."""
        ours = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": self.config.max_tokens,
            "temperature": self.config.temperature,
        }
        fields = {key: value for key, value in {**ours, **self.config.extra_body}.items() if value is not None}
        return to_json(fields)

    async def ask(self, body: bytes) -> CachedAnswer:
        """The answer to a request; its price is not yet known.

        Raises:
            TransientError: it may work when it is tried again.
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
            raise TransientError(f"no answer within {self.config.timeout_s:g} s", "time-out") from None
        except openai.APIStatusError as error:
            return self._refused(error.status_code, error.body, error.response.headers, error.response.text)
        except openai.APIError as error:
            cause: BaseException = error  # the client calls a refused connection a time-out as well
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise TransientError(self._clean(f"the connection failed: {cause}"), "connection") from None
        return self._understood(response.content, response.headers, time.monotonic() - start)

    def _understood(self, content: bytes, headers: Any, seconds: float) -> CachedAnswer:
        """An answer with status 200, which may still be no answer."""
        try:
            said = json.loads(content)
        except ValueError:
            kind = "a page instead of JSON" if content.lstrip()[:1] == b"<" else "no whole JSON"
            page = _plain(content[:LONGEST_SAID].decode(errors="replace"))
            raise TransientError(self._clean(f"{kind} came back (“{page}”); is labels.base_url right?"), "no JSON") from None
        if not isinstance(said, dict) or (said.get("error") and not said.get("choices")):
            error = said.get("error") if isinstance(said, dict) else said
            code = str(error.get("code") or error.get("status") if isinstance(error, dict) else None)
            return self._refused(int(code) if code.isdigit() else 500, error, headers, str(error))
        choice = (said.get("choices") or [{}])[0] or {}
        message, usage = choice.get("message") or {}, said.get("usage") or {}
        text, refusal = message.get("content"), message.get("refusal")
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "content filter"
        return CachedAnswer(
            text=None if refusal or not isinstance(text, str) else self._without_key(text.strip(), TOKEN)[:LONGEST_TEXT],
            refusal=self._clean(str(refusal)) if refusal else None,
            tokens_in=int(usage.get("prompt_tokens") or 0),
            tokens_out=int(usage.get("completion_tokens") or 0),
            seconds=seconds,
        )

    def _refused(self, status: int, body: Any, headers: Any, raw: str) -> CachedAnswer:
        """What an error means: a refused row, a wait, or the end of the job."""
        error = body if isinstance(body, dict) else {}
        error = error["error"] if isinstance(error.get("error"), dict) else error
        said = self._clean(_plain(str(error.get("message") or raw)))
        sentence, code = f"{status}: {said}" if said else f"status {status}", str(error.get("code") or "")
        if status == 402 or code == "insufficient_quota":
            raise InputError(f"{self.where} has no credit left ({sentence}): add some, and run the same command again.")
        if status in _FOR_NOW or status >= 500:
            raise TransientError(sentence, str(status), retry_after(headers))
        if status == 413 or (status in (400, 422) and _IMAGE_SIZE.search(said)):
            raise InputError(
                f"{self.where} refuses the image as too large ({sentence}): lower labels.image_pixels or labels.image_quality."
            )
        if status in (400, 403, 422) and (_POLICY.search(code) or _POLICY.search(said)):
            return CachedAnswer(refusal=sentence)
        if status in (400, 422) and (code.startswith("invalid_image") or _IMAGE_BAD.search(said)):
            return CachedAnswer(refusal=sentence)
        raise InputError(
            f"{self.where} refuses the request ({sentence}): check {KEY}, labels.model, labels.base_url and labels.extra_body."
        )

    def _clean(self, said: str) -> str:
        """Words of the endpoint about a request, without the key, short."""
        return self._without_key(said, BEARER)[:LONGEST_SAID]

    def _without_key(self, said: str, others: re.Pattern[str]) -> str:
        """Words of the endpoint without the key and what else looks like one."""
        said = said.encode(errors="replace").decode()
        if self._key != "none":
            said = said.replace(self._key, "…")
        return others.sub("…", said)


def endpoint_key(config: LabelsConfig) -> str:
    """The key to the endpoint; a server of one's own may need none.

    Raises:
        InputError: it is missing.
    """
    key = os.environ.get(KEY) or ("none" if config.base_url else "")
    if not key:
        raise InputError(f"{KEY} is not set and labels.labeler is openai: set it where the job runs, or use template.")
    return key


def _shown(url: str) -> str:
    """An address as it may be printed: no user, no query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _plain(said: str) -> str:
    """Text of a page or a message in one line."""
    return " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", said).split())


class RateLimiter:
    """Requests and tokens a minute, evenly spread: no window of any length holds more than its share and one request.

    A bucket that may be emptied at once would let a minute's worth pass in its first second, which endpoints refuse.
    """

    def __init__(self, requests: float | None, tokens: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Limits a minute; None is no limit."""
        self._request_s = 60 / requests if requests else 0.0
        self._token_s = 60 / tokens if tokens else 0.0
        self._clock = clock
        self._next_request = self._next_token = clock()

    def slot(self, tokens: float) -> float:
        """Take the next turn for a request of so many tokens, and say in how many seconds it comes."""
        now = self._clock()
        turn = max(now, self._next_request, self._next_token)
        self._next_request = turn + self._request_s
        self._next_token = turn + tokens * self._token_s
        return turn - now

    async def wait(self, tokens: float) -> None:
        """Return when it is this request's turn."""
        if self._request_s or self._token_s:
            await asyncio.sleep(self.slot(tokens))


class Budget:
    """What may be spent on a run, in tokens and in money, what is spent, and what is set aside for asks in flight.

    An ask starts only if there is enough left for what it may cost at most, so that the cap holds although many are in
    flight. It is overshot only where an endpoint counts more tokens than were estimated, by as many asks as are in flight.
    """

    def __init__(self, config: LabelsConfig, tokens: int = 0, usd: float = 0.0) -> None:
        """`tokens` and `usd` are spent already."""
        self.config, self.tokens, self.usd = config, tokens, usd
        self._held_tokens, self._held_usd, self._holders = 0.0, 0.0, 0
        self._changed = asyncio.Event()

    def price(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars for so many tokens; 0 where no prices are set."""
        return (tokens_in * (self.config.usd_per_million_in or 0) + tokens_out * (self.config.usd_per_million_out or 0)) / 1e6

    async def hold(self, tokens_in: float, tokens_out: float) -> None:
        """Set aside what an ask may cost; waits while asks in flight may leave enough.

        Raises:
            InputError: there is not enough left.
        """
        tokens, usd = tokens_in + tokens_out, self.price(tokens_in, tokens_out)
        while not self._fits(tokens, usd):
            if not self._holders:
                raise self._used_up()
            self._changed.clear()
            await self._changed.wait()
        self._held_tokens += tokens
        self._held_usd += usd
        self._holders += 1

    def release(self, tokens_in: float, tokens_out: float) -> None:
        """Give back what `hold` set aside."""
        self._held_tokens -= tokens_in + tokens_out
        self._held_usd -= self.price(tokens_in, tokens_out)
        self._holders -= 1
        self._changed.set()

    def spend(self, tokens_in: int, tokens_out: int) -> float:
        """Count what an answer cost, and return that in US dollars."""
        usd = self.price(tokens_in, tokens_out)
        self.tokens += tokens_in + tokens_out
        self.usd += usd
        return usd

    def _fits(self, tokens: float, usd: float) -> bool:
        most_tokens, most_usd = self.config.budget_tokens, self.config.budget_usd
        return (most_tokens is None or self.tokens + self._held_tokens + tokens <= most_tokens) and (
            most_usd is None or self.usd + self._held_usd + usd <= most_usd + 1e-9
        )

    def _used_up(self) -> InputError:
        limits = []
        if self.config.budget_tokens is not None:
            limits.append(f"{self.tokens:,} of labels.budget_tokens={self.config.budget_tokens:,} tokens")
        if self.config.budget_usd is not None:
            limits.append(f"{self.usd:.4g} of labels.budget_usd={self.config.budget_usd:g} dollars")
        return InputError(
            f"the budget leaves no room for another ask ({' and '.join(limits)} spent on this run): raise it and run the same "
            "command again; every answer so far is kept."
        )
