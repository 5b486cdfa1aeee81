"""The model in one process: all cities of a replica on one base, requests answered in batches. Runs in one thread."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from addressvlm import InputError
from addressvlm.answers import question_parser
from addressvlm.answers.generate import generate_batch
from addressvlm.answers.types import Completion, Sampling, TextChunk
from addressvlm.image_decode_worker import LONGEST_SIDE
from addressvlm.inference import Localization, Localizer
from addressvlm.models.loading import load_model
from addressvlm.storage.files import local_model_copy
from serve.cities import City, base_of
from serve.schemas import ChatQuery, LocalizeQuery
from serve.settings import ServiceSettings

PIXEL_COUNT = 4096  # a processor's "size" above this is a number of pixels, not of one side


class Engine:
    """Answers for the cities that are loaded.

    Raises:
        InputError: the model can't be loaded.
    """

    def __init__(self, settings: ServiceSettings, cities: Sequence[City]) -> None:
        self.settings = settings
        self.cities = {city.id: city for city in cities}
        self.names = {city.id: f"city{number}" for number, city in enumerate(cities)}  # PEFT takes no dots in names
        self.localizers: dict[str, Localizer] = {}
        self.base: Any = None
        options: dict[str, Any] = {"dtype": settings.dtype, "trust_remote_code": settings.trust_remote_code}
        if cities[0].adapter is None:
            one = self.localizers[cities[0].id] = Localizer(cities[0].folder, memory_mb=settings.photo_memory_mb, **options)
            self.processor, self.config = one.processor, one.model.config
        else:
            self.base, self.processor = load_model(base_of(cities, settings.base), **options)
            self.config = self.base.config
        self.side = side_of(self.processor.image_processor)
        self.context = getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**20
        self.image_tokens = self._image_tokens()

    def add(self, city: str) -> None:
        """Load a city's adapter beside those that are there.

        Raises:
            InputError: the adapter does not fit the base.
        """
        if city in self.localizers:
            return
        name, adapter, folder = (
            self.names[city],
            str(local_model_copy(self.cities[city].adapter or "")),
            self.cities[city].folder,
        )
        try:
            if isinstance(self.base, PeftModel):
                self.base.load_adapter(adapter, adapter_name=name, torch_device=str(self.base.device))
            else:
                self.base = PeftModel.from_pretrained(self.base, adapter, adapter_name=name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise InputError(f"{adapter} can't be put on the base model: {' '.join(str(error).split())[:300]}.") from error
        memory_mb = self.settings.photo_memory_mb / self.settings.cities_per_replica
        self.localizers[city] = Localizer(folder, memory_mb=memory_mb, loaded=(self.base.get_base_model(), self.processor))

    def remove(self, city: str) -> None:
        """Forget a city's adapter."""
        if self.localizers.pop(city, None) is None:
            return
        if self.localizers:
            self.base.delete_adapter(self.names[city])
        else:
            self.base = self.base.unload()  # PEFT keeps no model without adapters

    def localize(self, asked: Sequence[LocalizeQuery]) -> list[Localization | Exception]:
        """One result or exception a photo; those of one city go through the model together."""
        found: list[Any] = [None] * len(asked)
        for city, rows in _groups(asked, lambda where: where.city).items():
            together = _attempt(self._localize, city, [asked[at] for at in rows])
            for number, at in enumerate(rows):
                alone = isinstance(together, Exception) and len(rows) > 1  # one bad prior must not fail the others
                result = _attempt(self._localize, city, [asked[at]]) if alone else together
                found[at] = result if isinstance(result, Exception) else result[0 if alone else number]
        return found

    def answer(self, asked: Sequence[ChatQuery]) -> list[list[Completion] | Exception]:
        """One result or exception a question: alike ones about one photo each go together, the rest one by one."""
        found: list[Any] = [None] * len(asked)
        for key, rows in _groups(asked, lambda question: _attempt(self._batch_of, question)).items():
            if isinstance(key, Exception):
                together: Any = key
            elif key is None or (len(rows) == 1 and key[0] == "plain"):
                together = [_attempt(self._chat, asked[at]) for at in rows]
            else:
                together = _attempt(self._known if key[0] == "address" else self._plain, [asked[at] for at in rows])
            for number, at in enumerate(rows):
                found[at] = together if isinstance(together, Exception) else together[number]
        return found

    def stream(self, question: ChatQuery) -> Iterator[TextChunk]:
        """The answer piece by piece. Other work may go on between two pieces, so each finds its adapter anew.

        Raises:
            InputError: the conversation is longer than the model's context.
        """
        if self._about_address(question):
            known = self._known([question])[0][0]
            yield TextChunk(0, known.text, known.finish, (), known.prompt_tokens, known.tokens)
            return
        sampling = self._room(question)
        pieces = self._use(question.city).stream(question.messages, _images(question), sampling)
        while True:
            self._use(question.city)
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _use(self, city: str) -> Localizer:
        """A city's localizer, its adapter at work; one that had to make room meanwhile comes back."""
        if self.base is not None:
            self.add(city)
            if self.base.active_adapter != self.names[city]:
                self.base.set_adapter(self.names[city], inference_mode=True)
            while len(self.localizers) > self.settings.cities_per_replica:
                self.remove(next(other for other in self.localizers if other != city))
        return self.localizers[city]

    def _localize(self, city: str, asked: Sequence[LocalizeQuery]) -> list[Localization]:
        localizer = self._use(city)
        beliefs = localizer.beliefs([Image.fromarray(where.pixels) for where in asked], [where.prior for where in asked])
        own = localizer.calibration.threshold
        return [
            belief.localization(where.top_k, own if where.threshold is None else where.threshold)
            for belief, where in zip(beliefs, asked, strict=True)
        ]

    def _batch_of(self, question: ChatQuery) -> tuple[Any, ...] | None:
        """What questions that are answered together have in common; None for those that go alone.

        Raises:
            InputError: the question is longer than the model's context.
        """
        if self._about_address(question):
            return "address", question.city
        s = question.sampling
        special = s.stop or s.n > 1 or s.logprobs is not None or s.top_p < 1 or s.seed is not None
        first, kinds_of = question.messages[0], [part["type"] for m in question.messages for part in m["content"]]
        if special or len(question.messages) > 1 or first["role"] != "user" or kinds_of != ["image", "text"]:
            return None
        return "plain", question.city, self._room(question).max_tokens, s.temperature

    def _plain(self, asked: Sequence[ChatQuery]) -> list[list[Completion]]:
        """Answers to questions of one city that have as much room."""
        room, localizer = self._room(asked[0]), self._use(asked[0].city)
        images = [_images(question)[0] for question in asked]
        texts = [question.messages[0]["content"][1]["text"] for question in asked]
        return [[answer] for answer in generate_batch(localizer, images, texts, room.max_tokens, room.temperature)]

    def _chat(self, question: ChatQuery) -> list[Completion]:
        sampling = self._room(question)
        return self._use(question.city).chat(question.messages, _images(question), sampling)

    def _about_address(self, question: ChatQuery) -> question_parser.ParsedQuestion | None:
        """The question as one about the address, if the probabilities of the city's addresses are to answer it."""
        gazetteer, sampling = self._use(question.city).gazetteer, question.sampling
        greedy = sampling.temperature == 0 and sampling.n == 1 and sampling.logprobs is None and not sampling.stop
        if not (self.settings.exact_answers and greedy and gazetteer and gazetteer.addresses and len(question.images) == 1):
            return None
        return question_parser.parse_question(
            " ".join(part["text"] for part in question.messages[-1]["content"] if part["type"] == "text"), gazetteer
        )

    def _known(self, asked: Sequence[ChatQuery]) -> list[list[Completion]]:
        """Answers to questions of one city about the address, by its probabilities."""
        localizer = self._use(asked[0].city)
        answers = []
        for question, beliefs in zip(asked, localizer.beliefs([_images(q)[0] for q in asked]), strict=True):
            about = self._about_address(question)
            text = about.answer(beliefs)[0] if about else ""
            tokens = len(localizer.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
            answers.append([Completion(text, "stop", (), self._length(question), tokens)])
        return answers

    def _room(self, question: ChatQuery) -> Sampling:
        """The question's sampling with no more tokens than the context has room for."""
        used, s = self._length(question), question.sampling
        if used >= self.context:
            raise InputError(f"The conversation has {used} tokens and the model reads {self.context}: send a shorter one.")
        return replace(s, max_tokens=min(s.max_tokens, self.context - used))

    def _length(self, question: ChatQuery) -> int:
        """Tokens of the prompt, images included, counted without looking at them."""
        localizer = self._use(question.city)
        text = localizer.prompt(question.messages)
        return len(localizer.tokenizer(text)["input_ids"]) + len(question.images) * self.image_tokens

    def _image_tokens(self) -> int:
        """How many tokens an image takes beyond its marker."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        prompt = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        image = Image.fromarray(np.zeros((self.side, self.side, 3), np.uint8))
        whole = self.processor(text=[prompt], images=[[image]], return_tensors="pt")["input_ids"].shape[1]
        return int(whole - len(self.processor.tokenizer(prompt)["input_ids"]))


def side_of(processor: Any) -> int:
    """Pixels of the longer side that an image processor brings images to."""
    sizes = [getattr(processor, name, None) for name in ("size", "crop_size")]
    values = [value for size in sizes if size for value in dict(size).values() if isinstance(value, int)]
    sides = [value if value <= PIXEL_COUNT else int(value**0.5) for value in values]
    return min(max(sides, default=LONGEST_SIDE), LONGEST_SIDE)


def _images(question: ChatQuery) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in question.images]


def _groups(items: Sequence[Any], key: Any) -> dict[Any, list[int]]:
    """Positions of the items by what they have in common, in order."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for at, item in enumerate(items):
        groups[key(item)].append(at)
    return groups


def _attempt(work: Any, *args: Any) -> Any:
    """The result, or the exception as a value: one bad request must not fail those that came together with it."""
    try:
        return work(*args)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return InputError("The request needs more memory than the model's device has: send fewer images or a shorter text.")
    except Exception as error:
        return error
