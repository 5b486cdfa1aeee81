"""A trained model in a few lines of Python: addresses with probabilities, answers to questions, chat.

    localizer = Localizer("runs/demo/models/addressvlm/merged")
    localizer.localize(photo, top_k=3)  # Localization(candidates=[Candidate(street=…, district=…, probability=…), …], …)
    localizer.localize(photo, prior=Prior(circle=Circle(lat=52.2, lon=0.12, radius_m=200)))
    localizer.answer([photo], ["Which street is this?"], max_new_tokens=24)
    for chunk in localizer.stream([{"role": "user", "content": "Hello"}]): print(chunk.text, end="")

The parts are in `addressvlm/answers/`; this module puts them together.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm.answers.address_distribution import AddressDistribution, Candidate, Circle, Level, Localization, Prior
from addressvlm.answers.calibration import Calibration
from addressvlm.answers.chat_model import ChatModel, PreparedPrompt, Tensors, input_shapes, merge_inputs, user_turn
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
    stream_tokens,
)
from addressvlm.answers.kv_cache import PhotoCaches, PrefillCache, keeps_all_tokens
from addressvlm.answers.sequence_scorer import Pruning, SequenceScorer
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

PREFILL_TOKENS = 16_384  # of the photos that are scored together

States = list[tuple[list[int], PrefillCache]]


class Localizer(ChatModel):
    """A vision-language model with the gazetteer and the calibration of its city, where its folder has them.

    Args:
        folder, device, dtype, trust_remote_code, loaded, adapters, adapter: see ChatModel.
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
        adapters: Any = None,
        adapter: str = "",
    ) -> None:
        super().__init__(folder, device, dtype, trust_remote_code, loaded, adapters, adapter)
        gazetteer = self.folder / GAZETTEER_FILE
        self.gazetteer: Gazetteer | None = Gazetteer.load(gazetteer) if gazetteer.is_file() else None
        self.calibration = Calibration.load(self.folder)
        if self.gazetteer:
            self.calibration.apply(np.zeros(len(self.gazetteer.addresses)))  # refuses one of another gazetteer
        self.photo_caches = PhotoCaches(int(memory_mb * 2**20))

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
        return self.localize_prompts(self.prepare_questions(images, [ADDRESS_QUESTION] * len(images)), top_k, priors, threshold)

    def localize_prompts(
        self,
        prompts: Sequence[PreparedPrompt],
        top_k: int | None = 5,
        priors: Sequence[Prior | None] | None = None,
        threshold: float | None = None,
    ) -> list[Localization]:
        """The same of photos whose prompts are prepared by `prepare_questions` with ADDRESS_QUESTION."""
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}: give 1 or more, or leave it out.")
        if threshold is not None and not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}: give a probability, 0 to 1.")
        threshold = self.calibration.threshold if threshold is None else threshold
        return [distribution.localization(top_k, threshold) for distribution in self._distributions(prompts, priors)]

    def address_distributions(
        self, images: Sequence[Image.Image], priors: Sequence[Prior | None] | None = None
    ) -> list[AddressDistribution]:
        """The calibrated probabilities of all addresses for each photo."""
        self.require_gazetteer()
        return self._distributions(self.prepare_questions(images, [ADDRESS_QUESTION] * len(images)), priors)

    def _distributions(
        self, prompts: Sequence[PreparedPrompt], priors: Sequence[Prior | None] | None
    ) -> list[AddressDistribution]:
        gazetteer = self.require_gazetteer()
        priors = [None] * len(prompts) if priors is None else list(priors)
        if len(priors) != len(prompts):
            raise ValueError(f"{len(prompts)} images and {len(priors)} priors: give one prior an image, or none at all.")
        weights = [self.address_weights(prior) for prior in priors]
        return [
            AddressDistribution(gazetteer.addresses, scores / self.calibration.temperature + weight)
            for scores, weight in zip(self.score_prompts(prompts, weights=weights), weights, strict=True)
        ]

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """ln p of each address of the gazetteer, float64 (images, addresses).

        Each address is scored on its shortest unique prefix: tokens that must follow it (`Forbes` -> ` Avenue, Oakland`) do
        not count. InputError as `require_gazetteer`.
        """
        self.require_gazetteer()
        scores = self.score_prompts(self.prepare_questions(images, [ADDRESS_QUESTION] * len(images)))
        return np.stack(scores) if scores else np.empty((0, 0))

    @cached_property
    def scorer(self) -> SequenceScorer:
        """Of the addresses of the gazetteer; takes a while for many."""
        return SequenceScorer(self, self.trie([a.text() for a in self.require_gazetteer().addresses]).unique_prefixes())

    def score_prompts(
        self, prompts: Sequence[PreparedPrompt], owners: Sequence["Localizer"] = (), weights: Sequence[np.ndarray] = ()
    ) -> list[np.ndarray]:
        """`address_scores` of photos, (addresses,) each; prompts by `prepare_questions` with ADDRESS_QUESTION.

        Args:
            owners: the localizers of the photos' cities, on the same base as this one; by default this one.
            weights: the `address_weights` of each photo, float64 (addresses,): scores may be wrong where probabilities of one
                in a million are; by default they are exact.
        """
        owners = owners or [self] * len(prompts)
        keys = [(owner, prompt.photo) for owner, prompt in zip(owners, prompts, strict=True)]
        wanted: dict[tuple[Localizer, bytes], np.ndarray | None] = {}
        for i, key in enumerate(keys):
            own, other = weights[i] if weights else None, wanted.get(key)
            same = key not in wanted or (own is not None and other is not None and np.array_equal(other, own))
            wanted[key] = own if same else None  # exact, if a photo has two priors
        caches = {(owner, photo): owner.photo_caches.get(photo) for owner, photo in keys}
        by_key = dict(zip(keys, prompts, strict=True))
        new = [key for key in by_key if not caches[key].has_scores(wanted[key])]
        together = max(1, PREFILL_TOKENS // max(map(len, prompts), default=1))
        for start in range(0, len(new), together):
            batch = new[start : start + together]
            for rows, state in self.prefill_prompts([by_key[key] for key in batch], [owner for owner, _ in batch]):
                groups: dict[tuple[Localizer, bool], list[int]] = defaultdict(list)
                for place, row in enumerate(rows):
                    groups[batch[row][0], wanted[batch[row]] is None].append(place)
                for (owner, exact), places in groups.items():
                    own_weights, pruning = [wanted[batch[rows[place]]] for place in places], None
                    if not exact and owner.scorer.can_prune(len(places)):
                        pruning = Pruning(owner.calibration.temperature, np.array(own_weights))
                    scores = owner.scorer.score(state if len(groups) == 1 else state.rows(places), pruning)
                    for place, row, row_weights in zip(places, scores, own_weights, strict=True):
                        cache = caches[batch[rows[place]]]
                        cache.scores, cache.weights = row, row_weights if pruning else None
        return [scores.numpy() for key in keys if (scores := caches[key].scores) is not None]

    def address_weights(self, prior: Prior | None) -> np.ndarray:
        """What is added to scores / temperature of the calibration, so that they are ln of probabilities up to a constant.

        InputError: see `Prior.log_weights`.
        """
        gazetteer = self.require_gazetteer()
        weights = self.calibration.apply(np.zeros(len(gazetteer.addresses)))
        return weights if prior is None else weights + prior.log_weights(gazetteer)

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
        answers: dict[int, DecodedAnswer] = {}
        for rows, state in self.prefill_questions(images, questions):
            some = [tries[row] for row in rows]
            longest = state.mask.shape[1] + max(map(len, some))
            if beams == 1 and self.takes_4d_masks and keeps_all_tokens(state.cache, longest):
                decoded = greedy_decode(self, state, some)
            else:
                decoded = beam_decode(self, state, some, beams)
            answers |= dict(zip(rows, decoded, strict=True))
        return [answers[row] for row in range(len(tries))]

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

    def prepare_questions(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[PreparedPrompt]:
        """Questions, each about the image at the same position; an image object that occurs again is processed once."""
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: there must be one image a question")
        first: dict[int, PreparedPrompt] = {}
        prepared = []
        for image, question in zip(images, questions, strict=True):
            prepared.append(self.prepare(self.prompt([user_turn(question)]), [image], first.get(id(image))))
            first.setdefault(id(image), prepared[-1])
        return prepared

    def prefill_questions(self, images: Sequence[Image.Image], questions: Sequence[str]) -> States:
        """`prefill_prompts` of questions, each about the image at the same position."""
        return self.prefill_prompts(self.prepare_questions(images, questions))

    @torch.inference_mode()
    def prefill_prompts(self, prompts: Sequence[PreparedPrompt], owners: Sequence["Localizer"] = ()) -> States:
        """The state after prompts: the numbers of prompts, and the state whose rows they are; one such pair if possible.

        A photo that several of them show, or a recent one, goes through the model once, if the model's family allows it.

        Args:
            owners: whose prompts they are, on the same base as this one; by default this one's.
        """
        can_continue, owners = self.can_continue(max(map(len, prompts))), owners or [self] * len(prompts)
        keys = [(owner, prompt.photo if prompt.rest else b"") for owner, prompt in zip(owners, prompts, strict=True)]
        caches = {(owner, photo): owner.photo_caches.get(photo) for owner, photo in keys if photo}
        shown = Counter(keys)
        repeated = {
            key: prompt
            for key, prompt in zip(keys, prompts, strict=True)
            if can_continue and key in caches and shown[key] > 1 and caches[key].text != prompt.text
        }
        for rows, state in self._prefill_whole([(owner, prompt, prompt.inputs) for (owner, _), prompt in repeated.items()]):
            for place, (key, prompt) in enumerate([list(repeated.items())[row] for row in rows]):
                caches[key].text, caches[key].state = prompt.text, state.beginning(place, 0)
        states: States = []
        known = [i for i, key in enumerate(keys) if key in caches and caches[key].text == prompts[i].text]
        if known:
            distinct = list(dict.fromkeys(keys[i] for i in known))
            photos = PrefillCache.concat([kept for key in distinct if (kept := caches[key].state)])
            state = photos.rows([distinct.index(keys[i]) for i in known])
            states.append((known, self.extend(state, [prompts[i].rest for i in known], [owners[i] for i in known])))
        others = [i for i in range(len(prompts)) if i not in known]
        for rows, state in self._prefill_whole([(owners[i], prompts[i], prompts[i].whole()) for i in others]):
            numbers = [others[row] for row in rows]
            for place, i in enumerate(numbers):
                if can_continue and keys[i] in caches and owners[i].photo_caches.max_bytes:
                    cache, prompt = caches[keys[i]], prompts[i]
                    cache.text, cache.state = prompt.text, state.beginning(place, len(prompt.rest))
            states.append((numbers, state))
        if can_continue and len(states) > 1:
            states = [([i for rows, _ in states for i in rows], PrefillCache.concat([state for _, state in states]))]
        return states

    def _prefill_whole(self, prompts: Sequence[tuple["Localizer", PreparedPrompt, Tensors]]) -> States:
        """The states after inputs of prompts, those with images of the same shape as one batch."""
        several = len({owner for owner, _, _ in prompts}) > 1
        groups: dict[Any, list[int]] = defaultdict(list)
        for row, (owner, prompt, tensors) in enumerate(prompts):
            groups[None if several and prompt.photo and self.can_mix(tensors) else owner, input_shapes(tensors)].append(row)
        states = []
        for rows in groups.values():
            tensors = merge_inputs([prompts[row][2] for row in rows], self.tokenizer.pad_token_id)
            states.append((rows, self.prefill(self.to_device(tensors), [prompts[row][0] for row in rows])))
        return states

    def _prefill_chat(self, messages: Sequence[dict[str, Any]], images: Sequence[Image.Image]) -> PrefillCache:
        turns = [
            {"role": m["role"], "content": [{"type": "text", "text": c}] if isinstance(c := m["content"], str) else c}
            for m in messages
        ]
        placeholders = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if placeholders != len(images):
            raise InputError(f"the messages show {placeholders} images and there are {len(images)}: they must be as many.")
        ((_, state),) = self.prefill_prompts([self.prepare(self.prompt(turns), images)])
        return state

    def require_gazetteer(self) -> Gazetteer:
        """The gazetteer; InputError if the folder has none, or one without addresses."""
        if self.gazetteer is None or not self.gazetteer.addresses:
            raise InputError(
                f"{self.folder} holds no {GAZETTEER_FILE} with addresses: copy the dataset's into it to rank addresses."
            )
        return self.gazetteer
