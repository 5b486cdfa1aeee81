"""The model served by vLLM: each replica starts a vLLM server on its node and passes requests on.

vLLM has no way to score a tree of answers in one pass. `localize` asks it for the log-probabilities of each address after the
photo, one request an address, so it suits cities of up to MAX_ADDRESSES; chats stream and batch as vLLM does.
"""

import asyncio
import base64
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from PIL import Image
from prometheus_client.core import Metric
from ray import serve
from transformers import AutoTokenizer

from addressvlm import InputError
from addressvlm.answers.address_distribution import AddressDistribution, Localization
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.trie import Trie
from addressvlm.answers.types import Completion, TextChunk, TokenScore
from addressvlm.config.labels import LabelsConfig
from addressvlm.image_decode_worker import LONGEST_SIDE
from addressvlm.labels.vllm_server import serving
from addressvlm.questions import ADDRESS_QUESTION
from addressvlm.storage.files import local_model_copy
from addressvlm.tools.export_vllm import for_vllm
from serve.cities import City
from serve.errors import QUIET, ApiError, refusals_told
from serve.metrics import ServiceMetrics
from serve.schemas import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

MAX_ADDRESSES = 256  # that one photo is scored against
END = -1  # in place of the token that ends an answer
SCORED_TOGETHER = 32  # addresses that a replica asks for at a time


class VllmModel:
    """What `serve.model.Model` does, by a vLLM server of the one city's merged model."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        self.folder, self.records = local_model_copy(cities[0].folder), ServiceMetrics()
        self.gazetteer, self.calibration = cities[0].gazetteer(), Calibration.load(self.folder)
        self.ends, self.side = _ends(self.folder), _side(self.folder)
        self.telling = telling(self.folder, [address.text() for address in self.gazetteer.addresses]) if self.gazetteer else {}
        self.turns = asyncio.Semaphore(SCORED_TOGETHER)
        self.open = contextlib.ExitStack()
        scratch = Path(self.open.enter_context(tempfile.TemporaryDirectory(prefix="addressvlm-")))
        for_vllm(self.folder, scratch / "model")
        config = LabelsConfig(
            model=str(scratch / "model"),
            vllm_python=settings.vllm_python,
            vllm_arguments=[*settings.vllm_options, *["--trust-remote-code"] * settings.trust_remote_code],
            dtype=settings.dtype,
        )
        self.name = config.model
        try:
            url = self.open.enter_context(serving(config, scratch / "vllm.log"))
        except InputError as error:
            raise InputError(str(error).replace("labels.", "")) from None
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=settings.request_s)

    async def card(self) -> dict[str, Any]:
        """What the front needs to know of the model: the side of its input in pixels."""
        return {"side": self.side}

    @refusals_told
    async def localize(self, where: LocalizeQuery) -> Localization:
        """The likeliest addresses of a photo; refused where the city is too large, or the prior rules out all of it."""
        if self.gazetteer is None:
            raise InputError("This model has no gazetteer.")
        weights = where.prior.log_weights(self.gazetteer)
        left = np.flatnonzero(np.isfinite(weights))
        if len(left) > MAX_ADDRESSES:
            words = f"{len(left)} addresses are too many for engine=vllm, at most {MAX_ADDRESSES}: give a prior"
            raise ApiError(501, f"{words}, or serve with engine=transformers.", code="not_implemented")
        addresses = self.gazetteer.addresses
        with self.records.time("addressvlm_model_seconds", "localize"):
            scores = np.full(len(addresses), -np.inf)
            scores[left] = await self._scores(_data_url(where.pixels), [addresses[i].text() for i in left.tolist()])
        beliefs = AddressDistribution(addresses, self.calibration.apply(scores) + weights)
        least = self.calibration.threshold if where.threshold is None else where.threshold
        return beliefs.localization(where.top_k, least)

    @refusals_told
    async def answer(self, question: ChatQuery) -> list[Completion]:
        """The answers to a conversation; refused where the prompt is longer than the model's context."""
        told = await self._create(**_request(question))
        return [
            Completion((c.message.content or "").strip(), _finish(c), _scores(c), told.usage.prompt_tokens, tokens)
            for c, tokens in zip(told.choices, _shared(told.usage.completion_tokens, len(told.choices)), strict=True)
        ]

    async def stream(self, question: ChatQuery) -> AsyncIterator[TextChunk | Exception]:
        """The same piece by piece."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        try:
            chunks = await self._create(**_request(question), stream=True, stream_options=options)
        except (InputError, ApiError) as error:
            yield error
            return
        async for chunk in chunks:
            for c in chunk.choices:
                if c.delta.content or c.finish_reason:
                    used = chunk.usage
                    finish = _finish(c) if c.finish_reason else None
                    yield TextChunk(
                        c.index, c.delta.content or "", finish, _scores(c), used.prompt_tokens, used.completion_tokens
                    )

    async def check_health(self) -> None:
        """Raises where the server is gone; Serve then replaces the replica."""
        await self.client.models.list(timeout=20)

    async def _scores(self, photo: str, answers: Sequence[str]) -> np.ndarray:
        """ln p of each answer after the photo and the question for the address, as far as `telling`, float64 (answers,)."""
        parts = [{"type": "image_url", "image_url": {"url": photo}}, {"type": "text", "text": ADDRESS_QUESTION}]
        turn = {"role": "user", "content": parts}
        before = (await self._read([turn], True))[0]
        told = await asyncio.gather(*(self._read([turn, {"role": "assistant", "content": a}], False) for a in answers))
        tails = [tail(before, tokens, log_p, self.ends) for tokens, log_p in told]
        return np.array([sum(found[: self.telling[answer]]) for found, answer in zip(tails, answers, strict=True)])

    async def _read(self, messages: list[dict[str, Any]], ask: bool) -> tuple[list[int], list[Any]]:
        """The prompt's tokens, and for each of them what the model thought of it."""
        more = {"add_generation_prompt": ask, "prompt_logprobs": None if ask else 0, "return_token_ids": True}
        async with self.turns:
            told = await self._create(messages=messages, max_tokens=1, temperature=0, extra_body=more)
        fields = told.model_extra
        return fields["prompt_token_ids"], fields["prompt_logprobs"] or []

    async def _create(self, **request: Any) -> Any:
        try:
            return await self.client.chat.completions.create(model=self.name, **request)
        except APIStatusError as error:
            if error.status_code == 400:
                body = error.body if isinstance(error.body, dict) else {}
                raise InputError(str(body.get("message", "vLLM refuses this request."))[:300]) from None
            raise
        except APIConnectionError:  # or its APITimeoutError
            raise ApiError(503, "The service is busy: try again in a moment.", code="overloaded") from None


@serve.deployment(name="Localizer", logging_config=QUIET)
class VllmDeployment(VllmModel):
    """The same as a deployment."""

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return str(serve.get_replica_context().replica_tag), self.records.collect()

    def __del__(self) -> None:
        self.open.close()


def tail(before: Sequence[int], tokens: Sequence[int], log_p: Sequence[Any], ends: set[int]) -> list[float]:
    """ln p of each token that follows a prompt's, up to the first end, from vLLM's prompt log-probabilities.

    Args:
        before: the tokens of the prompt alone.
        tokens, log_p: those of the prompt with an answer, and for each a mapping of token -> {"logprob"}.
    """
    start = next((at for at, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), min(len(before), len(tokens)))
    stop = next((at + 1 for at in range(start, len(tokens)) if tokens[at] in ends), len(tokens))
    return [float(log_p[at][str(tokens[at])]["logprob"]) for at in range(start, stop)]


def telling(folder: Path, texts: Sequence[str]) -> dict[str, int]:
    """How many of its first tokens tell each text from all others, as `Localizer.address_scores` counts them."""
    read = AutoTokenizer.from_pretrained(folder)
    trie = Trie.build([[*read(text, add_special_tokens=False)["input_ids"], END] for text in texts]).beginnings()
    return dict(zip(texts, trie.depths[trie.ends].tolist(), strict=True))


def _request(question: ChatQuery) -> dict[str, Any]:
    """The question as OpenAI's client takes it."""
    urls, s = iter([_data_url(pixels) for pixels in question.images]), question.sampling
    messages = [{"role": m["role"], "content": [_part(part, urls) for part in m["content"]]} for m in question.messages]
    request: dict[str, Any] = {
        "messages": messages,
        "max_tokens": s.max_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "n": s.n,
        "stop": list(s.stop) or None,
        "seed": s.seed,
        "logprobs": s.logprobs is not None,
        "top_logprobs": s.logprobs,
    }
    return {key: value for key, value in request.items() if value is not None}


def _part(part: dict[str, Any], urls: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part


def _data_url(pixels: np.ndarray) -> str:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _finish(choice: Any) -> str:
    return "length" if choice.finish_reason == "length" else "stop"


def _scores(choice: Any) -> tuple[TokenScore, ...]:
    found = (choice.logprobs.content if choice.logprobs else None) or []
    return tuple(TokenScore(t.token, t.logprob, tuple((o.token, o.logprob) for o in t.top_logprobs)) for t in found)


def _shared(tokens: int, answers: int) -> list[int]:
    """vLLM tells the tokens of all answers together; only their sum is of use."""
    return [tokens, *[0] * (answers - 1)]


def _ends(folder: Path) -> set[int]:
    file = folder / "generation_config.json"
    told = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return set(told if isinstance(told, list) else [told]) - {None}


def _side(folder: Path) -> int:
    """Pixels of the model's input, from its configuration."""
    vision = json.loads((folder / "config.json").read_text()).get("vision_config", {})
    side = vision.get("image_size")
    return min(max(side) if isinstance(side, list) else side, LONGEST_SIDE) if side else LONGEST_SIDE
