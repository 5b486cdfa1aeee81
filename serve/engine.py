"""The model in one process: all cities of a replica on one base model, requests answered in batches. Not thread-safe."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from addressvlm import InputError
from addressvlm.answers.generate import generate_batch
from addressvlm.answers.question_parser import ParsedQuestion, parse_question
from addressvlm.answers.types import Completion, Sampling, TextChunk
from addressvlm.image_decode_worker import MAX_SIDE
from addressvlm.inference import Localization, Localizer
from addressvlm.models.loading import load_model
from addressvlm.storage.files import local_model_copy
from serve.cities import City, base_model
from serve.requests import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

LARGEST_SIDE_SETTING = 4096  # a processor's "longest_edge" above this counts all pixels, not those of one side


class Engine:
    """Answers for the loaded cities; loads and evicts adapters.

    Attributes:
        image_size: longer side of the model's input in pixels.
        context_length: tokens.
        tokens_per_image: tokens of a square image of that size beyond its placeholder in the prompt.

    Raises:
        InputError: the model can't be loaded.
    """

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        self.settings = settings
        self.cities = {city.id: city for city in cities}
        self.adapter_names = {city.id: f"city{number}" for number, city in enumerate(cities)}  # PEFT takes no dots in names
        self.localizers: dict[str, Localizer] = {}
        self.base: Any = None  # the model below the adapters; None for a merged model
        options: dict[str, Any] = {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
        first = cities[0]
        if first.adapter is None:
            localizer = Localizer(first.folder, memory_mb=settings.photo_memory_mb, **options)
            self.localizers[first.id], self.processor, config = localizer, localizer.processor, localizer.model.config
        else:
            self.base, self.processor = load_model(base_model(cities, settings.base), **options)
            config = self.base.config
        self.image_size = input_size(self.processor.image_processor)
        self.context_length = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        prompt = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        image = Image.fromarray(np.zeros((self.image_size, self.image_size, 3), np.uint8))
        length = self.processor(text=[prompt], images=[[image]], return_tensors="pt")["input_ids"].shape[1]
        self.tokens_per_image = length - len(self.processor.tokenizer(prompt)["input_ids"])

    def add_city(self, city: str) -> None:
        """Load a city's adapter beside the others. InputError: it does not fit the base."""
        if city in self.localizers:
            return
        name, folder = self.adapter_names[city], self.cities[city].folder
        adapter = str(local_model_copy(self.cities[city].adapter or ""))
        try:
            if isinstance(self.base, PeftModel):
                self.base.load_adapter(adapter, adapter_name=name, torch_device=str(self.base.device))
            else:
                self.base = PeftModel.from_pretrained(self.base, adapter, adapter_name=name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise InputError(f"{adapter} can't be put on the base model: {' '.join(str(error).split())[:300]}.") from error
        memory_mb = self.settings.photo_memory_mb / self.settings.cities_per_replica
        self.localizers[city] = Localizer(folder, memory_mb=memory_mb, loaded=(self.base.get_base_model(), self.processor))

    def remove_city(self, city: str) -> None:
        """Evict a city's adapter."""
        if self.localizers.pop(city, None) is None:
            return
        if self.localizers:
            self.base.delete_adapter(self.adapter_names[city])
        else:
            self.base = self.base.unload()  # PEFT keeps no model without adapters

    def localize(self, queries: Sequence[LocalizeQuery]) -> list[Localization | Exception]:
        """One result or exception per photo; those of one city go through the model together."""
        results: list[Any] = [None] * len(queries)
        for city, positions in _group_by(queries, lambda query: query.city).items():
            batch = _result_or_error(self._localize_batch, city, [queries[i] for i in positions])
            retry = isinstance(batch, Exception) and len(positions) > 1  # one bad prior must not fail the others
            for row, i in enumerate(positions):
                result = _result_or_error(self._localize_batch, city, [queries[i]]) if retry else batch
                results[i] = result if isinstance(result, Exception) else result[0 if retry else row]
        return results

    def chat(self, queries: Sequence[ChatQuery]) -> list[list[Completion] | Exception]:
        """Answers or an exception per query; similar queries about one photo each are batched, others go one by one."""
        results: list[Any] = [None] * len(queries)
        for key, positions in _group_by(queries, lambda query: _result_or_error(self._batch_key, query)).items():
            group = [queries[i] for i in positions]
            if isinstance(key, Exception):
                batch: Any = key
            elif key is None or (len(group) == 1 and key[0] == "generate"):
                batch = [_result_or_error(self._chat_one, query) for query in group]
            else:
                batch = _result_or_error(self._answer_address if key[0] == "address" else self._generate_batch, group)
            for row, i in enumerate(positions):
                results[i] = batch if isinstance(batch, Exception) else batch[row]
        return results

    def stream_chat(self, query: ChatQuery) -> Iterator[TextChunk]:
        """The answers chunk by chunk. Other cities may be used between two chunks, so each activates its adapter again."""
        if self._address_question(query):
            answer = self._answer_address([query])[0][0]
            yield TextChunk(0, answer.text, answer.finish, (), answer.prompt_tokens, answer.tokens)
            return
        sampling = self._fit_context(query)
        chunks = self._activate(query.city).stream(query.messages, _images(query), sampling)
        while True:
            self._activate(query.city)
            chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _activate(self, city: str) -> Localizer:
        """A city's localizer with its adapter active; loads it if it was evicted, and evicts others for it."""
        if self.base is not None:
            self.add_city(city)
            if self.base.active_adapter != self.adapter_names[city]:
                self.base.set_adapter(self.adapter_names[city], inference_mode=True)
            while len(self.localizers) > self.settings.cities_per_replica:
                self.remove_city(next(other for other in self.localizers if other != city))
        return self.localizers[city]

    def _localize_batch(self, city: str, queries: Sequence[LocalizeQuery]) -> list[Localization]:
        localizer = self._activate(city)
        photos, priors = [Image.fromarray(query.pixels) for query in queries], [query.prior for query in queries]
        results = []
        for distribution, query in zip(localizer.address_distributions(photos, priors), queries, strict=True):
            threshold = localizer.calibration.threshold if query.threshold is None else query.threshold
            results.append(distribution.localization(query.top_k, threshold))
        return results

    def _batch_key(self, query: ChatQuery) -> tuple[Any, ...] | None:
        """What queries of one batch have in common; None for those that go alone."""
        if self._address_question(query):
            return "address", query.city
        s = query.sampling
        special = s.stop or s.n > 1 or s.logprobs is not None or s.top_p < 1 or s.seed is not None
        first, part_types = query.messages[0], [part["type"] for m in query.messages for part in m["content"]]
        if special or len(query.messages) > 1 or first["role"] != "user" or part_types != ["image", "text"]:
            return None
        return "generate", query.city, self._fit_context(query).max_tokens, s.temperature

    def _generate_batch(self, queries: Sequence[ChatQuery]) -> list[list[Completion]]:
        """Answers to queries with the same batch key."""
        sampling, localizer = self._fit_context(queries[0]), self._activate(queries[0].city)
        images = [_images(query)[0] for query in queries]
        texts = [query.messages[0]["content"][1]["text"] for query in queries]
        return [[answer] for answer in generate_batch(localizer, images, texts, sampling.max_tokens, sampling.temperature)]

    def _chat_one(self, query: ChatQuery) -> list[Completion]:
        sampling = self._fit_context(query)
        return self._activate(query.city).chat(query.messages, _images(query), sampling)

    def _address_question(self, query: ChatQuery) -> ParsedQuestion | None:
        """The query as a question about the address, if the address distribution is to answer it."""
        gazetteer, sampling = self._activate(query.city).gazetteer, query.sampling
        greedy = sampling.temperature == 0 and sampling.n == 1 and sampling.logprobs is None and not sampling.stop
        if not (self.settings.exact_answers and greedy and gazetteer and gazetteer.addresses and len(query.images) == 1):
            return None
        text = " ".join(part["text"] for part in query.messages[-1]["content"] if part["type"] == "text")
        return parse_question(text, gazetteer)

    def _answer_address(self, queries: Sequence[ChatQuery]) -> list[list[Completion]]:
        """Answers to one city's questions about the address, from the address distributions."""
        localizer = self._activate(queries[0].city)
        distributions = localizer.address_distributions([_images(query)[0] for query in queries])
        answers = []
        for query, distribution in zip(queries, distributions, strict=True):
            question = self._address_question(query)
            text, most = question.answer(distribution)[0] if question else "", query.sampling.max_tokens
            ids = localizer.tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = len(ids) >= most
            text, tokens = (localizer.decode(ids[:most]).strip(), most) if cut else (text, len(ids) + 1)
            answers.append([Completion(text, "length" if cut else "stop", (), self._prompt_length(query), tokens)])
        return answers

    def _fit_context(self, query: ChatQuery) -> Sampling:
        """The query's sampling with at most as many tokens as the context has left."""
        used, sampling = self._prompt_length(query), query.sampling
        if used >= self.context_length:
            raise InputError(
                f"The conversation has {used} tokens and the model reads {self.context_length}: send a shorter one."
            )
        return replace(sampling, max_tokens=min(sampling.max_tokens, self.context_length - used))

    def _prompt_length(self, query: ChatQuery) -> int:
        """Tokens of the prompt, images included, without encoding them."""
        localizer = self._activate(query.city)
        text = localizer.prompt(query.messages)
        sizes = [pixels.shape[:2] for pixels in query.images]
        extra = [tokens - 1 for tokens in image_tokens(self.processor, sizes, self.image_size, self.tokens_per_image + 1)]
        return len(localizer.tokenizer(text)["input_ids"]) + sum(extra)


def input_size(processor: Any) -> int:
    """Pixels of the longer side to which an image processor resizes; the side of a square for one that limits the area."""
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size")]
    values = {key: value for size in sizes if size for key, value in dict(size).items() if isinstance(value, int)}
    if "longest_edge" in values and (hasattr(processor, "merge_size") or values["longest_edge"] > LARGEST_SIDE_SETTING):
        return min(math.isqrt(values["longest_edge"]), MAX_SIDE)  # Qwen's names for the least and the largest area
    return min(max(values.values(), default=MAX_SIDE), MAX_SIDE)


def image_tokens(processor: Any, sizes: Sequence[tuple[int, ...]], side: int, square: int) -> list[int]:
    """Tokens of images of these sizes (height, width), from those of a square image of that `side`."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)  # as vLLM counts them
    if count is None or not sizes:
        return [square] * len(sizes)
    *tokens, reference = count(image_sizes=[*sizes, (side, side)])["num_image_tokens"]
    return [square + n - reference for n in tokens]


def _images(query: ChatQuery) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in query.images]


def _group_by(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[int]]:
    """Positions of the items by key, in order."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for position, item in enumerate(items):
        groups[key(item)].append(position)
    return groups


def _result_or_error(function: Callable[..., Any], *args: Any) -> Any:
    """The result, or the exception as a value: one bad request must not fail the others of its batch."""
    try:
        return function(*args)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return InputError("The request needs more memory than the model's device has: send fewer images or a shorter text.")
    except Exception as error:
        return error
