"""Conversations about one image -> token batches whose loss is on the answers only (paper 001, eq. 2)."""

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

IGNORE = -100  # label of a token without loss


@dataclass(frozen=True)
class Sample:
    """One image and the question/answer rounds about it."""

    image: Image.Image
    rounds: list[tuple[str, str]]


def sample_of(row: dict[str, Any]) -> Sample:
    """A row of a photos or alignment table (columns `image`, `rounds`) as a sample."""
    with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
        image = picture.convert("RGB")
    return Sample(image, [(r["question"], r["answer"]) for r in row["rounds"]])


def messages(rounds: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Rounds as chat messages, the image in the first one; an empty answer at the end leaves the question open."""
    chat: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(rounds):
        parts: list[dict[str, Any]] = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


class Collator:
    """Turns samples into model inputs for any processor with a chat template.

    Each turn is tokenized by itself, exactly as it is at inference, and no turn is ever cut: image tokens and answers
    stay whole.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.pad = processor.tokenizer.pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Inputs with `labels`; B x T tokens padded on the right, other tensors as the processor stacks them."""
        turns = [self._turns(sample.rounds) for sample in samples]
        first = self.processor(text=[t[0][0] for t in turns], images=[[s.image] for s in samples])
        sequences = [self._sequence(ids, conversation) for ids, conversation in zip(first["input_ids"], turns, strict=True)]
        length = max(len(ids) for ids, _ in sequences)
        batch = {
            "input_ids": torch.tensor([ids + [self.pad] * (length - len(ids)) for ids, _ in sequences]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in sequences]),
            "labels": torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in sequences]),
        }
        for key, value in first.items():
            if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                batch[key] = value if isinstance(value, torch.Tensor) else _stack(value)
        return batch

    def _turns(self, rounds: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The conversation's text cut at every answer's start and end: [(prompt, answer), …]."""
        template = self.processor.apply_chat_template
        turns, at = [], 0
        for number in range(len(rounds)):
            asked = [*rounds[:number], (rounds[number][0], "")]
            prompt = template(messages(asked), add_generation_prompt=True, tokenize=False)
            whole = template(messages(rounds[: number + 1]), tokenize=False)
            turns.append((prompt[at:], whole[len(prompt) :]))
            at = len(whole)
        return turns

    def _sequence(self, first: list[int], turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for number, (prompt, answer) in enumerate(turns):
            asked = list(first) if number == 0 else self._tokens(prompt)
            told = self._tokens(answer)
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        return ids, labels

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def _stack(values: Any) -> torch.Tensor:
    return torch.cat([torch.as_tensor(v)[None] if torch.as_tensor(v).dim() == 3 else torch.as_tensor(v) for v in values])
