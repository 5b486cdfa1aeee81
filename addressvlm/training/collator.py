"""Conversations about one or two images -> token batches with labels on the answers only (paper 001, eq. 2)."""

import io
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from addressvlm.errors import InputError

IGNORE_INDEX = -100  # label of a token without loss
KINDS = ("generation", "judgment", "choice", "explanation")  # of questions, by number; others are number len(KINDS)
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of a processor's outputs


class SkipSampleError(Exception):
    """A row that can't be trained on; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One image, or a photo and its tile, and the question/answer rounds about it."""

    image: Image.Image
    rounds: list[tuple[str, str]]
    kinds: tuple[str, ...] = ()  # of the rounds, see KINDS
    tile: Image.Image | None = None  # the second image

    @property
    def images(self) -> list[Image.Image]:
        """In the order of the conversation."""
        return [self.image, self.tile] if self.tile else [self.image]


def sample_from_row(row: dict[str, Any]) -> Sample:
    """A row of a photos or alignment table (columns `image`, `rounds`, in some `tile`) as a sample.

    Raises:
        SkipSampleError: an image of it can't be decoded, or it has no rounds.
    """
    if not row["rounds"]:
        raise SkipSampleError("there is no question")
    kinds = tuple(r.get("kind") or "" for r in row["rounds"])
    rounds = [(r["question"], r["answer"]) for r in row["rounds"]]
    return Sample(image_from_row(row), rounds, kinds, image_from_row(row, "tile") if row.get("tile") else None)


def image_from_row(row: dict[str, Any], column: str = "image") -> Image.Image:
    """The decoded image of a row.

    Raises:
        SkipSampleError: it can't be decoded.
    """
    try:
        with Image.open(io.BytesIO(row[column]["bytes"])) as picture:
            return picture.convert("RGB")
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SkipSampleError(f"the {column} can't be decoded ({' '.join(str(error).split())[:80]})") from None


def messages(rounds: list[tuple[str, str]], images: int = 1) -> list[dict[str, Any]]:
    """Rounds as chat messages, the images in the first one; an empty answer leaves the last question open."""
    chat: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(rounds):
        content: list[dict[str, Any]] = [{"type": "image"}] * images if number == 0 else []
        chat.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if answer:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return chat


class Collator:
    """Turns samples into model inputs for any processor with a chat template.

    Each turn is tokenized by itself, exactly as it is at inference, and no turn is ever cut: image tokens and answers
    stay whole.
    """

    def __init__(
        self, processor: Any, isolate_questions: bool = False, packed: bool = False, context: int | None = None
    ) -> None:
        """Choose the layout of rows.

        Args:
            isolate_questions: no round sees the others, so that each is trained as it will be asked, from the image alone.
                All rounds still share the image's tokens in one row: attention hides the other rounds, and positions
                continue from the image for each of them. Otherwise a row is one conversation in which later answers may
                follow from earlier ones.
            packed: all samples share one row, for `models/block_attention.py`; otherwise a row a sample, padded on the right.
            context: the model's context length in tokens.
        """
        self.processor, self.isolate_questions, self.packed, self.context = processor, isolate_questions, packed, context
        self.pad = processor.tokenizer.pad_token_id or 0

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """The `batch` of the `encode`d samples."""
        return self.batch([self.encode(sample) for sample in samples])

    def encode(self, sample: Sample) -> "EncodedSample":
        """Tokens and images of one sample.

        Raises:
            SkipSampleError: it is longer than the context, or has no answer.
            InputError: it has two images and the model's family takes one.
        """
        turns = self._turns(sample.rounds, len(sample.images))
        inputs = self._process(turns[0][0], sample.images)
        kinds = [KINDS.index(kind) if kind in KINDS else len(KINDS) for kind in sample.kinds]
        row = self._encode_turns(list(inputs["input_ids"][0]), turns, kinds)
        if all(label == IGNORE_INDEX for label in row.labels):
            raise SkipSampleError("there is no answer")
        if self.context and max(row.positions) >= self.context:
            raise SkipSampleError(f"{max(row.positions) + 1} tokens are more than the model's context of {self.context}")
        row.pixels = {key: _tensor(value) for key, value in inputs.items() if key not in TEXT_INPUTS}
        if "mm_token_type_ids" in inputs:
            types = list(inputs["mm_token_type_ids"][0])
            row.types = types + [0] * (len(row.ids) - len(types))
        return row

    def batch(self, rows: "list[EncodedSample]") -> dict[str, torch.Tensor]:
        """Inputs with `labels`, B x T tokens padded on the right, other tensors as the processor stacks them.

        `kinds` (B x T) are the numbers of the questions' kinds. With `isolate_questions` the attention mask is B x 1 x T x T,
        added to the attention's scores, and there are position_ids (B x T). Packed, B is 1, nothing is padded, and
        position_ids without a mask tell which tokens belong together.
        """
        if self.packed:
            rows = [EncodedSample.concatenate(rows)]
        length = max(len(row.ids) for row in rows)
        batch = {
            "input_ids": _padded([row.ids for row in rows], length, self.pad),
            "labels": _padded([row.labels for row in rows], length, IGNORE_INDEX),
            "kinds": _padded([row.kinds for row in rows], length, len(KINDS)),
        }
        if self.isolate_questions or self.packed:
            batch["position_ids"] = _padded([row.positions for row in rows], length, 0)
        if not self.packed:
            if self.isolate_questions:
                batch["attention_mask"] = block_causal_mask(_padded([row.rounds for row in rows], length, -1))
            else:
                batch["attention_mask"] = _padded([[1] * len(row.ids) for row in rows], length, 0)
        if rows[0].types:
            batch["mm_token_type_ids"] = _padded([row.types for row in rows], length, 0)
        for key in rows[0].pixels:
            batch[key] = _stacked([row.pixels[key] for row in rows])
        return batch

    def _process(self, prompt: str, images: list[Image.Image]) -> Any:
        """The processor's outputs for the first prompt and its images."""
        if len(images) == 1:
            return self.processor(text=[prompt], images=[images])
        try:
            if prompt.count(self.processor.image_token) == len(images):
                return self.processor(text=[prompt], images=[images])
            reason = f"its chat template shows {prompt.count(self.processor.image_token)} of them"
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the base model can't take {len(images)} images in a conversation ({reason}): set tiles.layout to graft or "
            "beside, or choose another model.base."
        )

    def _turns(self, rounds: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
        """The conversation's text cut at every answer's start and end: [(prompt, answer), …].

        With `isolate_questions` every prompt starts over, with the images.
        """
        template = self.processor.apply_chat_template
        turns, start = [], 0
        for number, (question, answer) in enumerate(rounds):
            before = [] if self.isolate_questions else rounds[:number]
            prompt = template(messages([*before, (question, "")], images), add_generation_prompt=True, tokenize=False)
            text = template(messages([*before, (question, answer)], images), tokenize=False)
            turns.append((prompt[start:], text[len(prompt) :]))
            start = 0 if self.isolate_questions else len(text)
        return turns

    def _encode_turns(self, first: list[int], turns: list[tuple[str, str]], kinds: list[int]) -> "EncodedSample":
        """Tokens of all turns; `first` are those of the first prompt with its images."""
        row = EncodedSample()
        shared = self._after_image(first) if self.isolate_questions else 0
        row.add(first[:shared], IGNORE_INDEX, 0, 0)
        for number, (prompt, answer) in enumerate(turns, start=1):
            if number == 1:
                question = first[shared:]
            else:
                question = self._tokens(prompt)
                question = question[self._after_image(question) :] if self.isolate_questions else question
            start = shared if self.isolate_questions else len(row.ids)
            row.add(question, IGNORE_INDEX, number, start)
            row.add(self._tokens(answer), None, number, start + len(question))
            row.kinds += [kinds[number - 1] if kinds else len(KINDS)] * (len(row.ids) - len(row.kinds))
        return row

    def _after_image(self, ids: list[int]) -> int:
        """The index of the first token after the last image."""
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return len(ids) - ids[::-1].index(image)

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class EncodedSample:
    """One sample: for each token its id, label, round (0: shared by all), position, kind of question and, for some processors,
    type (text or image); and the images' tensors."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, ids: list[int], label: int | None, number: int, start: int) -> None:
        """Append tokens of a round at consecutive positions from `start`; without a label each token is its own."""
        self.ids += ids
        self.labels += ids if label is None else [label] * len(ids)
        self.rounds += [number] * len(ids)
        self.positions += range(start, start + len(ids))

    @classmethod
    def concatenate(cls, rows: "list[EncodedSample]") -> "EncodedSample":
        """The samples one after the other in one row; each begins with a question, whose tokens have no label."""
        packed = cls()
        for row in rows:
            for name in ("ids", "labels", "rounds", "positions", "kinds", "types"):
                getattr(packed, name).extend(getattr(row, name))
        packed.pixels = {key: _stacked([row.pixels[key] for row in rows]) for key in rows[0].pixels}
        return packed


def _padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    """Images concatenated along the first axis; smaller ones (Idefics3) are padded with zeros, as its processor does."""
    sizes = [max(image.shape[dim] for image in images) for dim in range(1, images[0].dim())]
    padded = [F.pad(image, [n for size, side in zip(sizes[::-1], image.shape[:0:-1], strict=True) for n in (0, size - side)])
              for image in images]  # fmt: skip
    return torch.cat(padded)


def block_causal_mask(rounds_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803
    """B x 1 x T x T: 0 where a token attends to another (earlier, in its round or shared), else the lowest float."""
    same_round = rounds_BT[:, :, None] == rounds_BT[:, None, :]
    shared = rounds_BT[:, None, :] == 0
    visible = (same_round | shared).tril()
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


def _tensor(values: Any) -> torch.Tensor:
    """A processor's output for one sample's images as one tensor."""
    if isinstance(values, list | tuple) and values and not isinstance(values[0], int | float):
        pieces = [_tensor(value) for value in values]
        return torch.cat([piece[None] if piece.dim() in (0, 1, 3) else piece for piece in pieces])
    return torch.as_tensor(values)
