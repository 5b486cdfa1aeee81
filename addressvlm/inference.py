"""A model folder as something to ask: addresses with probabilities, answers to questions, chat.

    localizer = Localizer("runs/demo/models/addressvlm/merged")
    localizer.localize(photo, top_k=3)  # Localization(candidates=[Candidate(street=…, district=…, probability=…), …], …)
    localizer.localize(photo, prior=Prior(circle=Circle(lat=52.2, lon=0.12, radius_m=200)))
    localizer.answer([photo], ["Which street is this?"], max_new_tokens=24)
    for piece in localizer.stream([{"role": "user", "content": "Hello"}]): print(piece.text, end="")

The pieces are in `addressvlm/answers/`; this module puts them together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution, Candidate, Level, Localization
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.chat_model import ChatModel, PrefillCache, cache_grew, user_turn
from addressvlm.answers.constrained_decoding import DecodedAnswer, beam_decode, greedy_decode
from addressvlm.answers.generate import (
    Completion,
    Conversation,
    ConversationAnswer,
    Sampling,
    TextChunk,
    TokenScore,
    complete_chat,
    generate_batch,
    prefill_batch,
    stream_tokens,
)
from addressvlm.answers.prefix_cache import PhotoCache, PhotoCaches, PrefixCacheEntry, extend_prefixes, prefill_photo
from addressvlm.answers.priors import Circle, Prior
from addressvlm.answers.sequence_scorer import SequenceScorer
from addressvlm.answers.trie import Trie
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.questions import ADDRESS_QUESTION
from addressvlm.storage.remote_path import AnyPath

__all__ = [
    "AddressDistribution",
    "Candidate",
    "Circle",
    "Completion",
    "Conversation",
    "ConversationAnswer",
    "Level",
    "Localization",
    "Localizer",
    "Prior",
    "Sampling",
    "TextChunk",
    "TokenScore",
    "user_turn",
]  # fmt: skip

PHOTOS_AT_ONCE = 8  # that go through the model together


class Localizer(ChatModel):
    """A vision-language model and, where its folder has them, the gazetteer of the city it knows and its calibration.

    Args:
        memory_mb: room for the caches of photos seen last; further questions about one of them cost no look at it.
        folder, device, dtype, trust_remote_code, loaded: see ChatModel.

    Raises:
        InputError: as ChatModel, or the calibration is damaged or of another gazetteer.
    """

    def __init__(
        self,
        folder: str | AnyPath,
        device: str | None = None,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        memory_mb: float = 256,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        super().__init__(folder, device, dtype, trust_remote_code, loaded)
        gazetteer = self.folder / GAZETTEER_FILE
        self.gazetteer: Gazetteer | None = Gazetteer.load(gazetteer) if gazetteer.is_file() else None
        self.calibration = Calibration.load(self.folder)
        if self.gazetteer:
            self.calibration.apply(np.zeros(len(self.gazetteer.addresses)))  # one of another gazetteer is told now
        self._sights = PhotoCaches(int(memory_mb * 2**20))
        self._scorer: SequenceScorer | None = None

    def localize(
        self, image: Image.Image, top_k: int | None = 5, prior: Prior | None = None, threshold: float | None = None
    ) -> Localization:
        """The most likely addresses of the folder's gazetteer, best first; `top_k=None` gives all, their sum is 1.

        Args:
            prior: what is known beforehand; addresses that it rules out are no candidates.
            threshold: confidence above which the answer counts as known; default: the calibration's.

        Raises:
            InputError: the folder has no gazetteer, or one without addresses, or an argument can't be used.
        """
        return self.localize_many([image], top_k, [prior], threshold)[0]

    def localize_many(
        self,
        images: Sequence[Image.Image],
        top_k: int | None = 5,
        priors: Sequence[Prior | None] | None = None,
        threshold: float | None = None,
    ) -> list[Localization]:
        """The same for many photos, several at a time through the model.

        Raises:
            InputError: as `localize`.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}: give 1 or more, or leave it out.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}: give a probability, 0 to 1.")
        least = self.calibration.threshold if threshold is None else threshold
        return [beliefs.localization(top_k, least) for beliefs in self.beliefs(images, priors)]

    def beliefs(self, images: Sequence[Image.Image], priors: Sequence[Prior | None] | None = None) -> list[AddressDistribution]:
        """The calibrated probabilities of all addresses for each photo.

        Raises:
            InputError: as `localize`.
        """
        gazetteer = self.known_city()
        given = [None] * len(images) if priors is None else list(priors)
        if len(given) != len(images):
            raise ValueError(f"{len(images)} images and {len(given)} priors: give one prior an image, or none at all.")
        weights = [0.0 if prior is None else prior.log_weights(gazetteer) for prior in given]
        scores = self.calibration.apply(self.address_scores(images)) if images else np.empty((0, 0))
        return [AddressDistribution(gazetteer.addresses, row + extra) for row, extra in zip(scores, weights, strict=True)]

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """ln p that the answer begins as only this address of the gazetteer does, float64 (images, addresses).

        What follows such a beginning by itself (`Forbes` -> ` Avenue, Oakland`) is not looked at.

        Raises:
            InputError: the folder has no gazetteer, or one without addresses.
        """
        scorer = self._address_scorer()
        seen = [self._sights.of(image) for image in images]
        new = list(
            {id(sight): (image, sight) for image, sight in zip(images, seen, strict=True) if sight.scores is None}.values()
        )
        for start in range(0, len(new), PHOTOS_AT_ONCE):
            self._score(scorer, new[start : start + PHOTOS_AT_ONCE])
        return torch.stack([s.scores for s in seen if s.scores is not None]).numpy() if seen else np.empty((0, 0))

    def trie(self, answers: Sequence[str]) -> Trie:
        """The answers that a question may have, as this model's tokens."""
        return Trie.build([self.continuation([user_turn("")], answer) for answer in answers])

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """One answer to each question about the image at the same position; greedy unless the temperature is above 0.

        An image object that is given several times goes through the model once, if the model's family allows it.
        """
        _same_number(images, questions)
        answers = generate_batch(self, images, questions, max_new_tokens, temperature) if images else []
        return [answer.text for answer in answers]

    def answer_from(
        self, images: Sequence[Image.Image], questions: Sequence[str], tries: Sequence[Trie], beams: int = 1
    ) -> list[DecodedAnswer]:
        """Like `answer`, but each answer is one of its trie; what follows by itself is not decoded."""
        _same_number(images, questions)
        if not images:
            return []
        prefix = prefill_batch(self, images, questions)
        longest = prefix.mask.shape[1] + max(len(trie) for trie in tries)
        if beams == 1 and self.takes_masks and cache_grew(prefix.cache, longest):
            return greedy_decode(self, prefix, tries)
        return beam_decode(self, prefix, tries, beams)

    def conversation(self, image: Image.Image, prior: Prior | None = None) -> Conversation:
        """Questions about one photo that know of each other; `.ask(question)` gives a `ConversationAnswer`."""
        return Conversation(self, image, prior)

    def chat(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image] = (), sampling: Sampling | None = None
    ) -> list[Completion]:
        """The assistant's next turn, `sampling.n` of them; parts `{"type": "image"}` stand for the images, in order.

        Raises:
            InputError: the messages have another number of image parts than there are images.
        """
        return complete_chat(self, self._read_chat(messages, images), sampling or Sampling())

    def stream(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image] = (), sampling: Sampling | None = None
    ) -> Iterator[TextChunk]:
        """The same piece by piece, as it is generated; stop iterating to stop the model. The prompt is read at once.

        Raises:
            InputError: as `chat`.
        """
        return stream_tokens(self, self._read_chat(messages, images), sampling or Sampling())

    def read_one(self, prompt: str, images: Sequence[Image.Image], *looks: PrefixCacheEntry | None) -> PrefillCache:
        """One prompt through the model, from where an earlier look at its photo, or one of `looks`, left off."""
        seen = self._sights.of(images[0]) if len(images) == 1 else PhotoCache()
        prefix = extend_prefixes(self, prompt, [*looks, seen.look])
        if prefix is None:
            inputs = self.inputs([prompt], [images])
            prefix = self.read(inputs)
            seen.look = prefill_photo(self, prompt, inputs["input_ids"], prefix)
        return prefix

    def _read_chat(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> PrefillCache:
        turns = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if places != len(images):
            raise InputError(f"the messages show {places} images and {len(images)} were given: they must be as many.")
        return self.read_one(self.prompt(turns), images)

    def known_city(self) -> Gazetteer:
        """The gazetteer.

        Raises:
            InputError: the folder has none, or one without addresses.
        """
        if self.gazetteer is None or not self.gazetteer.addresses:
            raise InputError(
                f"{self.folder} holds no {GAZETTEER_FILE} with addresses: copy the dataset's into it to rank addresses."
            )
        return self.gazetteer

    def _address_scorer(self) -> SequenceScorer:
        gazetteer = self.known_city()
        if self._scorer is None:
            self._scorer = SequenceScorer(self, self.trie([a.text() for a in gazetteer.addresses]).beginnings())
        return self._scorer

    def _score(self, scorer: SequenceScorer, photos: list[tuple[Image.Image, PhotoCache]]) -> None:
        """Find the scores of photos, and keep a look at each where there is room for it."""
        prompt = self.prompt([user_turn(ADDRESS_QUESTION)])
        if len(photos) == 1:
            image, sight = photos[0]
            sight.scores = scorer.score(self.read_one(prompt, [image]))[0]
            return
        inputs = self.inputs([prompt] * len(photos), [[image] for image, _ in photos])
        prefix = self.read(inputs)
        for row, ((_, sight), scores) in enumerate(zip(photos, scorer.score(prefix), strict=True)):
            sight.scores = scores
            if self._sights.most_bytes:
                sight.look = prefill_photo(self, prompt, inputs["input_ids"][row : row + 1], prefix.row(row))


def _same_number(images: Sequence[Image.Image], questions: Sequence[str]) -> None:
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images and {len(questions)} questions: there must be one image a question")


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
