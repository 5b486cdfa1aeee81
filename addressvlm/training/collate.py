"""Conversations about one image -> token batches whose loss is on the answers only (paper 001, eq. 2)."""

import io
from dataclasses import dataclass, field
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

    def __init__(self, processor: Any, apart: bool = False) -> None:
        """`apart`: no round sees the others, so that each is learnt as it will be asked, from the image alone.

        All rounds still share the image's tokens in one row: the mask hides the other rounds, and positions go on from
        the image for each of them. Otherwise a row is one conversation in which later answers may follow from earlier ones.
        """
        self.processor, self.apart = processor, apart
        self.pad = processor.tokenizer.pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Inputs with `labels`; B x T tokens padded on the right, other tensors as the processor stacks them.

        With `apart` the attention mask is B x 1 x T x T, added to the attention's scores, and there are position_ids (B x T).
        """
        turns = [self._turns(sample.rounds) for sample in samples]
        first = self.processor(text=[t[0][0] for t in turns], images=[[s.image] for s in samples])
        rows = [self._row(list(ids), conversation) for ids, conversation in zip(first["input_ids"], turns, strict=True)]
        length = max(len(row.ids) for row in rows)
        batch = {
            "input_ids": _padded([row.ids for row in rows], length, self.pad),
            "attention_mask": _padded([[1] * len(row.ids) for row in rows], length, 0),
            "labels": _padded([row.labels for row in rows], length, IGNORE),
        }
        if self.apart:
            batch["attention_mask"] = _hidden(_padded([row.rounds for row in rows], length, -1))
            batch["position_ids"] = _padded([row.positions for row in rows], length, 0)
        for key, value in first.items():
            if key not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                batch[key] = value if isinstance(value, torch.Tensor) else _stack(value)
        return batch

    def _turns(self, rounds: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The conversation's text cut at every answer's start and end: [(prompt, answer), …].

        With `apart` every prompt begins anew, with the image.
        """
        template = self.processor.apply_chat_template
        turns, at = [], 0
        for number, (question, answer) in enumerate(rounds):
            before = [] if self.apart else rounds[:number]
            prompt = template(messages([*before, (question, "")]), add_generation_prompt=True, tokenize=False)
            whole = template(messages([*before, (question, answer)]), tokenize=False)
            turns.append((prompt[at:], whole[len(prompt) :]))
            at = 0 if self.apart else len(whole)
        return turns

    def _row(self, first: list[int], turns: list[tuple[str, str]]) -> "_Row":
        """Tokens of all turns; `first` are those of the first prompt, its image included."""
        row = _Row()
        shared = self._after_image(first) if self.apart else 0
        row.add(first[:shared], IGNORE, 0, 0)
        for number, (prompt, answer) in enumerate(turns, start=1):
            if number == 1:
                asked = first[shared:]
            else:
                asked = self._tokens(prompt)
                asked = asked[self._after_image(asked) :] if self.apart else asked
            start = shared if self.apart else len(row.ids)
            row.add(asked, IGNORE, number, start)
            row.add(self._tokens(answer), None, number, start + len(asked))
        return row

    def _after_image(self, ids: list[int]) -> int:
        """Where the text after the image begins."""
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return len(ids) - ids[::-1].index(image)

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class _Row:
    """Token by token: id, label, number of the round (0 is what all share) and position."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def add(self, ids: list[int], label: int | None, number: int, start: int) -> None:
        """Append tokens of a round at consecutive positions; each is its own label if `label` is None."""
        self.ids += ids
        self.labels += ids if label is None else [label] * len(ids)
        self.rounds += [number] * len(ids)
        self.positions += range(start, start + len(ids))


def _padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _hidden(rounds_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """B x 1 x T x T: 0 where a token sees another (earlier, of its own round or shared), else the lowest float."""
    own = rounds_BT[:, :, None] == rounds_BT[:, None, :]
    shared = rounds_BT[:, None, :] == 0
    seen = (own | shared).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _stack(values: Any) -> torch.Tensor:
    return torch.cat([torch.as_tensor(v)[None] if torch.as_tensor(v).dim() == 3 else torch.as_tensor(v) for v in values])
