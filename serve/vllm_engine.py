"""The model served by vLLM: each replica starts a vLLM server on its node and passes requests on.

vLLM has no way to score a tree of answers in one pass. `localize` asks it for the log-probabilities of each address after the
photo, one request per address, so it suits cities of up to MAX_ADDRESSES; chats stream and batch as vLLM does.
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
from ray import serve
from transformers import AutoTokenizer

from addressvlm import InputError
from addressvlm.answers.address_distribution import AddressDistribution, Localization
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.trie import Trie
from addressvlm.answers.types import Completion, TextChunk, TokenScore
from addressvlm.config.labels import LabelsConfig
from addressvlm.image_decode_worker import MAX_SIDE
from addressvlm.labels.vllm_server import serving
from addressvlm.questions import ADDRESS_QUESTION
from addressvlm.storage.files import local_model_copy
from addressvlm.tools.export_vllm import export_for_vllm
from serve.cities import City
from serve.errors import LOGGING_CONFIG, ApiError, overloaded, return_user_errors
from serve.metrics import MetricsReplica, ServiceMetrics
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

MAX_ADDRESSES = 256  # candidates of one photo
END_OF_ANSWER = -1  # in place of the end token
CONCURRENT_SCORES = 32  # requests of a replica to vLLM


class VllmModel:
    """The interface of `serve.model.Model`, over a vLLM server of the one city's merged model."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        self.folder, self.metrics = local_model_copy(cities[0].folder), ServiceMetrics()
        self.gazetteer, self.calibration = cities[0].gazetteer(), Calibration.load(self.folder)
        self.end_tokens, self.side = _end_tokens(self.folder), _image_size(self.folder)
        addresses = [address.text() for address in self.gazetteer.addresses] if self.gazetteer else []
        self.prefix_lengths = unique_prefix_lengths(self.folder, addresses) if self.gazetteer else {}
        self.semaphore = asyncio.Semaphore(CONCURRENT_SCORES)
        self.resources = contextlib.ExitStack()
        scratch = Path(self.resources.enter_context(tempfile.TemporaryDirectory(prefix="addressvlm-")))
        export_for_vllm(self.folder, scratch / "model")
        config = LabelsConfig(
            model=str(scratch / "model"),
            vllm_python=settings.vllm_python,
            vllm_arguments=[*settings.vllm_options, *["--trust-remote-code"] * settings.trust_remote_code],
            dtype=settings.dtype,
        )
        self.name = config.model
        try:
            url = self.resources.enter_context(serving(config, scratch / "vllm.log"))
        except InputError as error:
            raise InputError(str(error).replace("labels.", "")) from None
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=settings.request_s)

    async def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return self.side

    @return_user_errors
    async def localize(self, query: LocalizeQuery) -> Localization:
        """The likeliest addresses of a photo. ApiError 501: too many; InputError: the prior excludes all of them."""
        if self.gazetteer is None:
            raise InputError("This model has no gazetteer.")
        log_weights = query.prior.log_weights(self.gazetteer)
        possible = np.flatnonzero(np.isfinite(log_weights))
        if len(possible) > MAX_ADDRESSES:
            message = f"{len(possible)} addresses are too many for engine=vllm, at most {MAX_ADDRESSES}: give a prior"
            raise ApiError(501, f"{message}, or serve with engine=transformers.", code="not_implemented")
        addresses = self.gazetteer.addresses
        with self.metrics.time("addressvlm_model_seconds", "localize"):
            scores = np.full(len(addresses), -np.inf)
            texts = [addresses[i].text() for i in possible.tolist()]
            scores[possible] = await self._address_scores(_data_url(query.pixels), texts)
        threshold = self.calibration.threshold if query.threshold is None else query.threshold
        distribution = AddressDistribution(addresses, self.calibration.apply(scores) + log_weights)
        return distribution.localization(query.top_k, threshold)

    @return_user_errors
    async def chat(self, query: ChatQuery) -> list[Completion]:
        """The answers to a conversation. InputError: the prompt is longer than the model's context."""
        response = await self._create(**openai_request(query))
        usage, answers = response.usage, list[Completion]()
        for choice in response.choices:
            tokens = 0 if answers else usage.completion_tokens  # vLLM counts those of all answers together
            text = (choice.message.content or "").strip()
            finish = "length" if choice.finish_reason == "length" else "stop"
            answers.append(Completion(text, finish, _token_scores(choice), usage.prompt_tokens, tokens))
        return answers

    async def stream_chat(self, query: ChatQuery) -> AsyncIterator[TextChunk | Exception]:
        """The answers chunk by chunk."""
        options = {"include_usage": True, "continuous_usage_stats": True}
        try:
            chunks = await self._create(**openai_request(query), stream=True, stream_options=options)
        except (InputError, ApiError) as error:
            yield error
            return
        async with chunks:  # else vLLM would go on for a caller who left
            async for chunk in chunks:
                for choice in chunk.choices:
                    text, usage = choice.delta.content or "", chunk.usage
                    finish = "length" if choice.finish_reason == "length" else "stop" if choice.finish_reason else None
                    if text or finish:
                        scores = _token_scores(choice)
                        yield TextChunk(choice.index, text, finish, scores, usage.prompt_tokens, usage.completion_tokens)

    async def check_health(self) -> None:
        """Raises if the vLLM server does not answer; Ray Serve then replaces the replica."""
        await self.client.models.list(timeout=20)

    async def _address_scores(self, photo: str, answers: Sequence[str]) -> np.ndarray:
        """ln p of each answer's shortest unique prefix after the photo and the address question, float64 (answers,)."""
        parts = [{"type": "image_url", "image_url": {"url": photo}}, {"type": "text", "text": ADDRESS_QUESTION}]
        turn = {"role": "user", "content": parts}
        prompt = (await self._prompt_logprobs([turn], True))[0]
        results = await asyncio.gather(
            *(self._prompt_logprobs([turn, {"role": "assistant", "content": answer}], False) for answer in answers)
        )
        log_probs = [answer_logprobs(prompt, tokens, logprobs, self.end_tokens) for tokens, logprobs in results]
        return np.array([sum(p[: self.prefix_lengths[answer]]) for p, answer in zip(log_probs, answers, strict=True)])

    async def _prompt_logprobs(self, messages: list[dict[str, Any]], generation_prompt: bool) -> tuple[list[int], list[Any]]:
        """The prompt's tokens and vLLM's log-probabilities of each; of a generation prompt, only the tokens."""
        prompt_logprobs = None if generation_prompt else 0
        extra_body = {"add_generation_prompt": generation_prompt, "prompt_logprobs": prompt_logprobs, "return_token_ids": True}
        async with self.semaphore:
            response = await self._create(messages=messages, max_tokens=1, temperature=0, extra_body=extra_body)
        fields = response.model_extra
        return fields["prompt_token_ids"], fields["prompt_logprobs"] or []

    async def _create(self, **request: Any) -> Any:
        try:
            return await self.client.chat.completions.create(model=self.name, **request)
        except APIStatusError as error:
            if error.status_code == 400:
                body = error.body if isinstance(error.body, dict) else {}
                raise InputError(str(body.get("message", "vLLM refuses this request."))[:300]) from None
            raise
        except APIConnectionError:  # or its subclass APITimeoutError
            raise overloaded() from None


@serve.deployment(name="Localizer", logging_config=LOGGING_CONFIG)
class VllmDeployment(VllmModel, MetricsReplica):
    """`VllmModel` as a deployment."""

    def __del__(self) -> None:
        self.resources.close()


def answer_logprobs(prompt: Sequence[int], tokens: Sequence[int], logprobs: Sequence[Any], end_tokens: set[int]) -> list[float]:
    """ln p of each token of an answer up to its first end token, from vLLM's prompt log-probabilities.

    Args:
        prompt: the tokens of the prompt alone.
        tokens, logprobs: those of the prompt with the answer, and for each a mapping of token -> {"logprob"}.
    """
    different = (i for i, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b)
    start = next(different, min(len(prompt), len(tokens)))
    stop = next((i + 1 for i in range(start, len(tokens)) if tokens[i] in end_tokens), len(tokens))
    return [float(logprobs[i][str(tokens[i])]["logprob"]) for i in range(start, stop)]


def unique_prefix_lengths(folder: Path, texts: Sequence[str]) -> dict[str, int]:
    """Text -> tokens of its shortest prefix that no other text has, as `Localizer.address_scores` counts them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sequences = [[*tokenizer(text, add_special_tokens=False)["input_ids"], END_OF_ANSWER] for text in texts]
    trie = Trie.build(sequences).unique_prefixes()
    return dict(zip(texts, trie.depths[trie.ends].tolist(), strict=True))


def openai_request(query: ChatQuery) -> dict[str, Any]:
    """The query as arguments of OpenAI's client."""
    urls, sampling = iter([_data_url(pixels) for pixels in query.images]), query.sampling

    def part(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part

    request: dict[str, Any] = {
        "messages": [{"role": m["role"], "content": [part(p) for p in m["content"]]} for m in query.messages],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "n": sampling.n,
        "stop": list(sampling.stop) or None,
        "seed": sampling.seed,
        "logprobs": sampling.logprobs is not None,
        "top_logprobs": sampling.logprobs,
    }
    return {key: value for key, value in request.items() if value is not None}


def _data_url(pixels: np.ndarray) -> str:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _token_scores(choice: Any) -> tuple[TokenScore, ...]:
    tokens = (choice.logprobs.content if choice.logprobs else None) or []
    return tuple(TokenScore(t.token, t.logprob, tuple((o.token, o.logprob) for o in t.top_logprobs)) for t in tokens)


def _end_tokens(folder: Path) -> set[int]:
    file = folder / "generation_config.json"
    tokens = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    return set(tokens if isinstance(tokens, list) else [tokens]) - {None}


def _image_size(folder: Path) -> int:
    """Pixels of the model's input, from its configuration."""
    size = json.loads((folder / "config.json").read_text()).get("vision_config", {}).get("image_size")
    return min(max(size) if isinstance(size, list) else size, MAX_SIDE) if size else MAX_SIDE
