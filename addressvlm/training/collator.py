"""Conversations about an image, or two -> token batches whose loss is on the answers only (paper 001, eq. 2)."""

import io
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from addressvlm.errors import InputError

IGNORE_INDEX = -100  # label of a token without loss
KINDS = ("generation", "judgment", "choice", "explanation")  # of rounds, by number; others count as one more
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # what a processor makes of the text


class SkipSampleError(Exception):
    """A row that can't be learnt from; the text says why."""


@dataclass(frozen=True)
class Sample:
    """One image, or a photo and its tile, and the question/answer rounds about it."""

    image: Image.Image
    rounds: list[tuple[str, str]]
    kinds: tuple[str, ...] = ()  # of the rounds: generation, judgment, choice or explanation
    tile: Image.Image | None = None  # the second image

    @property
    def images(self) -> list[Image.Image]:
        """In the order in which the conversation shows them."""
        return [self.image, self.tile] if self.tile else [self.image]


def sample_from_row(row: dict[str, Any]) -> Sample:
    """A row of a photos or alignment table (columns `image`, `rounds`, in some `tile`) as a sample.

    Raises:
        UnusableError: an image of it can't be decoded, or it has no rounds.
    """
    if not row["rounds"]:
        raise SkipSampleError("there is no question")
    kinds = tuple(r.get("kind") or "" for r in row["rounds"])
    rounds = [(r["question"], r["answer"]) for r in row["rounds"]]
    return Sample(image_from_row(row), rounds, kinds, image_from_row(row, "tile") if row.get("tile") else None)


def image_from_row(row: dict[str, Any], column: str = "image") -> Image.Image:
    """The decoded image of a row.

    Raises:
        UnusableError: it can't be decoded.
    """
    try:
        with Image.open(io.BytesIO(row[column]["bytes"])) as picture:
            return picture.convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SkipSampleError(f"the {column} can't be decoded ({' '.join(str(error).split())[:80]})") from None


def kind_number(kind: str) -> int:
    """The number of a kind of round, see `KINDS`."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def messages(rounds: list[tuple[str, str]], images: int = 1) -> list[dict[str, Any]]:
    """Rounds as chat messages, the images in the first one; an empty answer at the end leaves the question open."""
    chat: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(rounds):
        parts: list[dict[str, Any]] = [{"type": "image"}] * images if number == 0 else []
        chat.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


class Collator:
    """Turns samples into model inputs for any processor with a chat template.

    Each turn is tokenized by itself, exactly as it is at inference, and no turn is ever cut: image tokens and answers
    stay whole.
    """

    def __init__(self, processor: Any, apart: bool = False, packed: bool = False, context: int | None = None) -> None:
        """How rows are made.

        Args:
            apart: no round sees the others, so that each is learnt as it will be asked, from the image alone. All rounds
                still share the image's tokens in one row: attention hides the other rounds, and positions go on from the
                image for each of them. Otherwise a row is one conversation in which later answers may follow from earlier
                ones.
            packed: all samples in one row, for `models/block_attention.py`; otherwise a row a sample, padded on the right.
            context: the most tokens of a sample that the model has positions for.
        """
        self.processor, self.apart, self.packed, self.context = processor, apart, packed, context
        self.pad = processor.tokenizer.pad_token_id or 0

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """`batch` of `encode`d samples."""
        return self.batch([self.encode(sample) for sample in samples])

    def encode(self, sample: Sample) -> "EncodedSample":
        """Tokens and images of one sample.

        Raises:
            UnusableError: it has more tokens than the model has positions for, or no answer to learn from.
            InputError: it has two images, and the model's family takes one.
        """
        turns = self._turns(sample.rounds, len(sample.images))
        first = self._read(turns[0][0], sample.images)
        row = self._row(list(first["input_ids"][0]), turns, [kind_number(kind) for kind in sample.kinds])
        if all(label == IGNORE_INDEX for label in row.labels):
            raise SkipSampleError("there is no answer")
        if self.context and max(row.positions) >= self.context:
            raise SkipSampleError(f"{max(row.positions) + 1} tokens are more than the model's context of {self.context}")
        row.image = {key: _tensor(value) for key, value in first.items() if key not in OF_TEXT}
        if "mm_token_type_ids" in first:
            types = list(first["mm_token_type_ids"][0])
            row.types = types + [0] * (len(row.ids) - len(types))
        return row

    def batch(self, rows: "list[EncodedSample]") -> dict[str, torch.Tensor]:
        """Inputs with `labels`, B x T tokens padded on the right, other tensors as the processor stacks them.

        With `apart` the attention mask is B x 1 x T x T, added to the attention's scores, and there are position_ids (B x T).
        Packed, B is 1, nothing is padded, and position_ids without a mask tell which tokens belong together.
        """
        if self.packed:
            rows = [EncodedSample.joined(rows)]
        length = max(len(row.ids) for row in rows)
        batch = {
            "input_ids": _padded([row.ids for row in rows], length, self.pad),
            "labels": _padded([row.labels for row in rows], length, IGNORE_INDEX),
            "asked": _padded([row.asked for row in rows], length, len(KINDS)),
        }
        if self.apart or self.packed:
            batch["position_ids"] = _padded([row.positions for row in rows], length, 0)
        if not self.packed:
            seen = [[1] * len(row.ids) for row in rows]
            hidden = _block_causal_mask(_padded([row.rounds for row in rows], length, -1)) if self.apart else None
            batch["attention_mask"] = _padded(seen, length, 0) if hidden is None else hidden
        if rows[0].types:
            batch["mm_token_type_ids"] = _padded([row.types for row in rows], length, 0)
        for key in rows[0].image:
            batch[key] = _stacked([row.image[key] for row in rows])
        return batch

    def _read(self, prompt: str, images: list[Image.Image]) -> Any:
        """What the processor makes of the first prompt and its images."""
        if len(images) == 1:
            return self.processor(text=[prompt], images=[images])
        try:
            if prompt.count(self.processor.image_token) == len(images):
                return self.processor(text=[prompt], images=[images])
            why = f"its chat template shows {prompt.count(self.processor.image_token)} of them"
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            why = " ".join(str(error).split())[:160]
        raise InputError(
            f"the base model can't be given {len(images)} images in a conversation ({why}): set tiles.layout to graft or "
            "beside, or take another model.base."
        )

    def _turns(self, rounds: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
        """The conversation's text cut at every answer's start and end: [(prompt, answer), …].

        With `apart` every prompt begins anew, with the images.
        """
        template = self.processor.apply_chat_template
        turns, at = [], 0
        for number, (question, answer) in enumerate(rounds):
            before = [] if self.apart else rounds[:number]
            prompt = template(messages([*before, (question, "")], images), add_generation_prompt=True, tokenize=False)
            whole = template(messages([*before, (question, answer)], images), tokenize=False)
            turns.append((prompt[at:], whole[len(prompt) :]))
            at = 0 if self.apart else len(whole)
        return turns

    def _row(self, first: list[int], turns: list[tuple[str, str]], kinds: list[int]) -> "EncodedSample":
        """Tokens of all turns; `first` are those of the first prompt, its images included."""
        row = EncodedSample()
        shared = self._after_image(first) if self.apart else 0
        row.add(first[:shared], IGNORE_INDEX, 0, 0)
        for number, (prompt, answer) in enumerate(turns, start=1):
            if number == 1:
                asked = first[shared:]
            else:
                asked = self._tokens(prompt)
                asked = asked[self._after_image(asked) :] if self.apart else asked
            start = shared if self.apart else len(row.ids)
            row.add(asked, IGNORE_INDEX, number, start)
            row.add(self._tokens(answer), None, number, start + len(asked))
            row.asked += [kinds[number - 1] if kinds else len(KINDS)] * (len(row.ids) - len(row.asked))
        return row

    def _after_image(self, ids: list[int]) -> int:
        """Where the text after the last image begins."""
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return len(ids) - ids[::-1].index(image)

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class EncodedSample:
    """Token by token: id, label, number of the round (0 is what all share), position, number of the kind of question, and the
    type that some processors give (text or image); and the images' tensors."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    image: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, ids: list[int], label: int | None, number: int, start: int) -> None:
        """Append tokens of a round at consecutive positions; each is its own label if `label` is None."""
        self.ids += ids
        self.labels += ids if label is None else [label] * len(ids)
        self.rounds += [number] * len(ids)
        self.positions += range(start, start + len(ids))

    @classmethod
    def joined(cls, rows: "list[EncodedSample]") -> "EncodedSample":
        """One row after the other; each begins with a question, whose tokens have no label."""
        whole = cls()
        for row in rows:
            for name in ("ids", "labels", "rounds", "positions", "asked", "types"):
                getattr(whole, name).extend(getattr(row, name))
        whole.image = {key: _stacked([row.image[key] for row in rows]) for key in rows[0].image}
        return whole


def _padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    """Images below each other; those of fewer tiles or pixels (Idefics3) get zeros, as its own processor gives them."""
    sizes = [max(image.shape[dim] for image in images) for dim in range(1, images[0].dim())]
    whole = [F.pad(image, [n for size, own in zip(sizes[::-1], image.shape[:0:-1], strict=True) for n in (0, size - own)])
             for image in images]  # fmt: skip
    return torch.cat(whole)


def _block_causal_mask(rounds_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """B x 1 x T x T: 0 where a token sees another (earlier, of its own round or shared), else the lowest float."""
    own = rounds_BT[:, :, None] == rounds_BT[:, None, :]
    shared = rounds_BT[:, None, :] == 0
    seen = (own | shared).tril()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _tensor(values: Any) -> torch.Tensor:
    """What a processor returned for one sample's images, one after the other."""
    if isinstance(values, list | tuple) and values and not isinstance(values[0], int | float):
        pieces = [_tensor(value) for value in values]
        return torch.cat([piece[None] if piece.dim() in (0, 1, 3) else piece for piece in pieces])
    return torch.as_tensor(values)
