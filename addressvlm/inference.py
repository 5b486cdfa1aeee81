"""A model folder as something to ask: free answers in batches, chat, and exact probabilities over a city's addresses.

    localizer = Localizer("runs/demo/models/addressvlm/merged")
    localizer.answer([photo], ["Which street is this?"], max_new_tokens=24)
    localizer.localize(photo, top_k=3)  # [Candidate(street=…, district=…, probability=…), …]

Everything goes through `AutoProcessor`'s chat template and `generate`, so any image-text-to-text family will do.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from addressvlm.addresses import Address, Gazetteer
from addressvlm.errors import InputError
from addressvlm.models.base import load, locate
from addressvlm.questions import ADDRESS_QUESTION

GAZETTEER = "gazetteer.geojson"
TOKENS_AT_ONCE = 16_384  # cached prompt tokens over all candidates scored together; bounds memory


@dataclass(frozen=True)
class Candidate:
    """An address of the gazetteer and how likely the model finds it, among all addresses of the gazetteer."""

    street: str
    district: str
    probability: float


class Localizer:
    """A vision-language model and, where its folder has one, the gazetteer of the city it knows.

    Args:
        folder: a model folder, a hub name, or `toy`.
        device: `cuda` where there is one, else `cpu`.
        dtype: float32 or bfloat16.

    Raises:
        InputError: the folder does not exist or is not a model.
    """

    def __init__(
        self, folder: str | Path, device: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
    ) -> None:
        self.folder = Path(locate(str(folder)))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, self.processor = load(str(folder), dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = model.to(self.device).eval()
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._special = re.compile("|".join(map(re.escape, _markers(self.processor))))
        self.ends = _end_tokens(self.model, self.tokenizer)
        gazetteer = self.folder / GAZETTEER
        self.gazetteer: Gazetteer | None = Gazetteer.load(gazetteer) if gazetteer.is_file() else None

    def answer(
        self, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """One answer to each question about the image at the same position; greedy unless the temperature is above 0.

        An image object that is given several times goes through the model once, if the model's family allows it.
        """
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions: there must be one image a question")
        if not images:
            return []
        prompts = [self._prompt([user_turn(question)]) for question in questions]
        return self._generate(prompts, [[image] for image in images], max_new_tokens, temperature)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        max_tokens: int = 256,
        temperature: float = 0.0,
    ) -> str:
        """The assistant's next turn; content parts `{"type": "image"}` stand for the images, in order.

        Raises:
            InputError: the messages have another number of image parts than there are images.
        """
        turns = [{"role": m["role"], "content": _parts(m["content"])} for m in messages]
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if places != len(images):
            raise InputError(f"the messages show {places} images and {len(images)} were given: they must be as many.")
        return self._generate([self._prompt(turns)], [list(images)], max_tokens, temperature)[0]

    def localize(self, image: Image.Image, top_k: int | None = 5) -> list[Candidate]:
        """The most likely addresses of the folder's gazetteer, best first; `None` gives all, their probabilities sum to 1.

        Raises:
            InputError: the folder has no gazetteer, or one without addresses.
        """
        if self.gazetteer is None or not self.gazetteer.addresses:
            raise InputError(
                f"{self.folder} holds no {GAZETTEER} with addresses: copy the dataset's into it to rank addresses."
            )
        addresses = self.gazetteer.addresses
        scores = self.log_likelihoods(image, ADDRESS_QUESTION, [a.text() for a in addresses])
        probabilities = torch.softmax(scores.double(), dim=0)
        order = torch.argsort(probabilities, descending=True, stable=True)[:top_k]
        return [_candidate(addresses[i], float(probabilities[i])) for i in order.tolist()]

    @torch.inference_mode()
    def log_likelihoods(self, image: Image.Image, question: str, answers: Sequence[str]) -> torch.Tensor:
        """ln p(answer and its end | image, question) of each answer, float32 (answers,).

        Image and question go through the model once; the answers then share its key-value cache.
        """
        turn = user_turn(question)
        prompt = self._prompt([turn])
        continuations = [self._continuation(turn, prompt, answer) for answer in answers]
        inputs = self._inputs([prompt], [[image]])
        length = inputs["input_ids"].shape[1]
        prefix = self.model(**inputs, use_cache=True)
        at_once = max(1, min(64, TOKENS_AT_ONCE // length))
        scores = torch.empty(len(answers))
        by_length = sorted(range(len(answers)), key=lambda i: len(continuations[i]))
        for start in range(0, len(answers), at_once):
            chosen = by_length[start : start + at_once]
            scores[chosen] = self._score(prefix, length, [continuations[i] for i in chosen])
        return scores

    def _score(self, prefix: Any, length: int, continuations: list[list[int]]) -> torch.Tensor:
        """ln p of token sequences that follow a prompt of `length` tokens whose output is `prefix`, (sequences,)."""
        rows, longest = len(continuations), max(map(len, continuations))  # B, T; logits are (B, T, vocabulary)
        tokens = torch.full((rows, longest), self.tokenizer.pad_token_id)
        real = torch.zeros((rows, longest), dtype=torch.long)
        for row, ids in enumerate(continuations):
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = 1
        tokens, real = tokens.to(self.device), real.to(self.device)
        logits = prefix.logits[:, -1:].expand(rows, -1, -1)
        if longest > 1:
            cache = copy.deepcopy(prefix.past_key_values)
            cache.batch_repeat_interleave(rows)
            seen = torch.ones((rows, length), dtype=torch.long, device=self.device)
            rest = self.model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([seen, real[:, :-1]], dim=1),
                past_key_values=cache,
                use_cache=True,
            )
            logits = torch.cat([logits, rest.logits], dim=1)
        log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[..., None])[..., 0]
        return (log_p * real).sum(dim=1).cpu()

    def _continuation(self, turn: dict[str, Any], prompt: str, answer: str) -> list[int]:
        """The tokens after the prompt that say the answer, its end included; made apart from the prompt, as in training."""
        whole = self._prompt([turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], finished=True)
        ids = self.tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        for at, token in enumerate(ids):
            if token in self.ends:
                return ids[: at + 1]
        return [*ids, self.tokenizer.eos_token_id]

    def _prompt(self, turns: list[dict[str, Any]], finished: bool = False) -> str:
        """The turns as the model reads them; what someone writes can't pass for an image or the end of a turn."""
        turns = [turn | {"content": [self._plain(part) for part in turn["content"]]} for turn in turns]
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=not finished)

    def _plain(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "text":
            return part
        pieces = self._special.split(part["text"])
        return part | {"text": " ".join(pieces)}

    def _inputs(self, prompts: list[str], images: list[list[Image.Image]]) -> Any:
        """What the processor makes of prompts and the images of each."""
        pictures = [[image.convert("RGB") for image in shown] for shown in images] if any(images) else None
        inputs = self.processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
        return inputs.to(self.device, dtype=self.model.dtype)

    @torch.inference_mode()
    def _generate(self, prompts: list[str], images: list[list[Image.Image]], max_tokens: int, temperature: float) -> list[str]:
        inputs = self._share_images(self._inputs(prompts, images), images)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature > 0
            else {"do_sample": False}
        )
        ids = self.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def _share_images(self, inputs: Any, images: list[list[Image.Image]]) -> dict[str, Any]:
        """The same inputs, with a key-value cache of every different image where prompts show one image each, again and again.

        Rows become image, padding, question; positions are counted by the attention mask, so padding in the middle is as
        good as on the left. Families whose inputs are not one row a prompt, or whose images differ in length, stay as
        they are.
        """
        token = getattr(self.model.config, "image_token_id", None) or getattr(self.model.config, "image_token_index", None)
        different = {id(shown[0]): row for row, shown in reversed(list(enumerate(images))) if shown}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        plain = all(len(value) == len(ids) and value.shape[:2] != ids.shape for value in others.values())
        if token is None or not plain or 2 * len(different) > len(images) or any(len(shown) != 1 for shown in images):
            return dict(inputs)
        padding = (mask == 0).sum(1).tolist()
        ends = {int((row == token).nonzero()[-1]) + 1 - pads for row, pads in zip(ids, padding, strict=True)}
        if len(ends) != 1:
            return dict(inputs)
        end, first = ends.pop(), torch.tensor(list(different.values()), device=ids.device)
        order = {image: number for number, image in enumerate(different)}
        ids, mask = _pads_after(end, padding, ids), _pads_after(end, padding, mask)
        seen = {key: value[first] for key, value in others.items()}
        cache = self.model(input_ids=ids[first, :end], attention_mask=mask[first, :end], **seen, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([order[id(shown[0])] for shown in images], device=ids.device))
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def _pads_after(end: int, padding: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, T) whose padding on the left is put behind their first `end` tokens instead."""
    moved = [torch.cat([r[p : p + end], r[:p], r[p + end :]]) for r, p in zip(rows, padding, strict=True)]
    return torch.stack(moved)


def user_turn(question: str) -> dict[str, Any]:
    """The turn that shows one image and asks about it."""
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _candidate(address: Address, probability: float) -> Candidate:
    return Candidate(address.street, address.district, probability)


def _markers(processor: Any) -> list[str]:
    """Texts that the tokenizer or the processor would take for something else than text, longest first."""
    markers = {*processor.tokenizer.all_special_tokens, *(str(t) for t in processor.tokenizer.added_tokens_decoder.values())}
    image = getattr(processor, "image_token", None)
    return sorted({m for m in markers | {str(image or "")} if m.strip()}, key=len, reverse=True)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a turn, by the model's and the tokenizer's word."""
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    return {token for token in ends if token is not None}
