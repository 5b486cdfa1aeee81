"""A trained model in a few lines of Python: addresses with probabilities, answers to questions, chat.

    localizer = Localizer("runs/demo/models/addressvlm/merged")
    localizer.localize(photo, top_k=3)  # Localization(candidates=[Candidate(street=…, district=…, probability=…), …], …)
    localizer.localize(photo, prior=Prior(circle=Circle(lat=52.2, lon=0.12, radius_m=200)))
    localizer.answer([photo], ["Which street is this?"], max_new_tokens=24)
    for chunk in localizer.stream([{"role": "user", "content": "Hello"}]): print(chunk.text, end="")

The parts are in `addressvlm/answers/`; this module puts them together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution, Candidate, Circle, Level, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.chat_model import ChatModel, PrefillCache, keeps_all_tokens, user_turn
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
from addressvlm.answers.prefix_cache import PhotoCache, PhotoCaches, PrefixCacheEntry, extend_prefixes
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

BATCH_SIZE = 8  # photos that go through the model together


class Localizer(ChatModel):
    """A vision-language model with the gazetteer and the calibration of its city, where its folder has them.

    Args:
        folder, device, dtype, trust_remote_code, loaded: see ChatModel.
        memory_mb: for key-value caches of recent photos, which make further questions about one of them cheap.

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
            self.calibration.apply(np.zeros(len(self.gazetteer.addresses)))  # refuses one of another gazetteer
        self.photo_caches = PhotoCaches(int(memory_mb * 2**20))
        self._scorer: SequenceScorer | None = None

    def localize(
        self, image: Image.Image, top_k: int | None = 5, prior: Prior | None = None, threshold: float | None = None
    ) -> Localization:
        """The most likely addresses of the gazetteer, best first; `top_k=None` gives all, whose probabilities sum to 1.

        Args:
            prior: prior knowledge; addresses that it rules out are no candidates.
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
        """The same for many photos, in batches."""
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}: give 1 or more, or leave it out.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}: give a probability, 0 to 1.")
        threshold = self.calibration.threshold if threshold is None else threshold
        return [distribution.localization(top_k, threshold) for distribution in self.address_distributions(images, priors)]

    def address_distributions(
        self, images: Sequence[Image.Image], priors: Sequence[Prior | None] | None = None
    ) -> list[AddressDistribution]:
        """The calibrated probabilities of all addresses for each photo."""
        gazetteer = self.require_gazetteer()
        priors = [None] * len(images) if priors is None else list(priors)
        if len(priors) != len(images):
            raise ValueError(f"{len(images)} images and {len(priors)} priors: give one prior an image, or none at all.")
        weights = [0.0 if prior is None else prior.log_weights(gazetteer) for prior in priors]
        scores = self.calibration.apply(self.address_scores(images)) if images else np.empty((0, 0))
        return [AddressDistribution(gazetteer.addresses, row + weight) for row, weight in zip(scores, weights, strict=True)]

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """ln p of each address of the gazetteer, float64 (images, addresses).

        Each address is scored on its shortest unique prefix: tokens that must follow it (`Forbes` -> ` Avenue, Oakland`) do
        not count. InputError as `require_gazetteer`.
        """
        gazetteer = self.require_gazetteer()
        if self._scorer is None:
            self._scorer = SequenceScorer(self, self.trie([a.text() for a in gazetteer.addresses]).unique_prefixes())
        caches = [self.photo_caches.get(image) for image in images]
        new = {id(cache): (image, cache) for image, cache in zip(images, caches, strict=True) if cache.scores is None}
        photos = list(new.values())
        for start in range(0, len(photos), BATCH_SIZE):
            self._score(self._scorer, photos[start : start + BATCH_SIZE])
        return torch.stack([c.scores for c in caches if c.scores is not None]).numpy() if caches else np.empty((0, 0))

    def trie(self, answers: Sequence[str]) -> Trie:
        """The possible answers to a question as a trie of this model's tokens."""
        return Trie.build([self.answer_tokens([user_turn("")], answer) for answer in answers])

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """One answer to each question about the image at the same position; greedy unless the temperature is above 0.

        An image object that occurs several times goes through the model once, if the model's family allows it.
        """
        if not (images or questions):
            return []
        return [answer.text for answer in generate_batch(self, images, questions, max_new_tokens, temperature)]

    def answer_from(
        self, images: Sequence[Image.Image], questions: Sequence[str], tries: Sequence[Trie], beams: int = 1
    ) -> list[DecodedAnswer]:
        """Like `answer`, but each answer is one of its trie; forced tokens are not decoded."""
        if not (images or questions):
            return []
        prefill = prefill_batch(self, images, questions)
        longest = prefill.mask.shape[1] + max(len(trie) for trie in tries)
        if beams == 1 and self.takes_4d_masks and keeps_all_tokens(prefill.cache, longest):
            return greedy_decode(self, prefill, tries)
        return beam_decode(self, prefill, tries, beams)

    def conversation(self, image: Image.Image, prior: Prior | None = None) -> Conversation:
        """A conversation about one photo; `.ask(question)` gives a `ConversationAnswer`."""
        return Conversation(self, image, prior)

    def chat(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image] = (), sampling: Sampling | None = None
    ) -> list[Completion]:
        """The assistant's next turn, `sampling.n` of them; parts `{"type": "image"}` stand for the images, in order.

        Raises:
            InputError: the messages have another number of image parts than there are images.
        """
        return complete_chat(self, self._prefill_chat(messages, images), sampling or Sampling())

    def stream(
        self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image] = (), sampling: Sampling | None = None
    ) -> Iterator[TextChunk]:
        """The same as it is generated; stop iterating to stop the model. The prompt is prefilled at once."""
        return stream_tokens(self, self._prefill_chat(messages, images), sampling or Sampling())

    def prefill_prompt(self, prompt: str, images: Sequence[Image.Image], *prefixes: PrefixCacheEntry | None) -> PrefillCache:
        """Prefill one prompt, from the cache of its photo or from one of `prefixes` where it starts with one."""
        cache = self.photo_caches.get(images[0]) if len(images) == 1 else PhotoCache()
        prefill = extend_prefixes(self, prompt, [*prefixes, cache.prefix])
        if prefill is None:
            inputs = self.inputs([prompt], [images])
            prefill = self.prefill(inputs)
            cache.prefix = PrefixCacheEntry.up_to_image(self, prompt, inputs["input_ids"], prefill)
        return prefill

    def _prefill_chat(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> PrefillCache:
        turns = [
            {"role": m["role"], "content": [{"type": "text", "text": c}] if isinstance(c := m["content"], str) else c}
            for m in messages
        ]
        placeholders = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if placeholders != len(images):
            raise InputError(f"the messages show {placeholders} images and there are {len(images)}: they must be as many.")
        return self.prefill_prompt(self.prompt(turns), images)

    def require_gazetteer(self) -> Gazetteer:
        """The gazetteer; InputError if the folder has none, or one without addresses."""
        if self.gazetteer is None or not self.gazetteer.addresses:
            raise InputError(
                f"{self.folder} holds no {GAZETTEER_FILE} with addresses: copy the dataset's into it to rank addresses."
            )
        return self.gazetteer

    def _score(self, scorer: SequenceScorer, photos: list[tuple[Image.Image, PhotoCache]]) -> None:
        """Fill in the scores of photos and, where there is memory for it, the state after each."""
        prompt = self.prompt([user_turn(ADDRESS_QUESTION)])
        if len(photos) == 1:
            image, cache = photos[0]
            cache.scores = scorer.score(self.prefill_prompt(prompt, [image]))[0]
            return
        inputs = self.inputs([prompt] * len(photos), [[image] for image, _ in photos])
        prefill = self.prefill(inputs)
        for row, ((_, cache), scores) in enumerate(zip(photos, scorer.score(prefill), strict=True)):
            cache.scores = scores
            if self.photo_caches.max_bytes:
                ids = inputs["input_ids"][row : row + 1]
                cache.prefix = PrefixCacheEntry.up_to_image(self, prompt, ids, prefill.rows([row]))
