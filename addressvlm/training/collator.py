"""Conversations about one or two images -> token batches with labels on the answers only (paper 001, eq. 2)."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from addressvlm.errors import InputError
from addressvlm.models.families import image_merge, rope_positions
from addressvlm.training.pixels import PIXELS, PixelEncoder, as_bytes, decode, tensor_of

IGNORE_INDEX = -100  # label of a token without loss
KINDS = ("generation", "judgment", "choice", "explanation")  # of questions, by number; others are number len(KINDS)
CACHED_TEXTS = 50_000
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


def sample_from_row(row: dict[str, Any], size: tuple[int, int] | None = None) -> Sample:
    """A row of a photos or alignment table (columns `image`, `rounds`, in some `tile`) as a sample.

    Args:
        size: see `pixels.decode`.

    Raises:
        SkipSampleError: an image of it can't be decoded, or it has no rounds.
    """
    if not row["rounds"]:
        raise SkipSampleError("there is no question")
    kinds = tuple(r.get("kind") or "" for r in row["rounds"])
    rounds = [(r["question"], r["answer"]) for r in row["rounds"]]
    tile = image_from_row(row, "tile", size) if row.get("tile") else None
    return Sample(image_from_row(row, size=size), rounds, kinds, tile)


def image_from_row(row: dict[str, Any], column: str = "image", size: tuple[int, int] | None = None) -> Image.Image:
    """The decoded image of a row; `size` as for `pixels.decode`.

    Raises:
        SkipSampleError: it can't be decoded.
    """
    try:
        return decode(row[column]["bytes"], size)
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
        self,
        processor: Any,
        isolate_questions: bool = False,
        packed: bool = False,
        context: int | None = None,
        use_bytes: bool = False,
    ) -> None:
        """Choose the layout of rows.

        Args:
            isolate_questions: no round sees the others, so that each is trained as it will be asked, from the image alone.
                All rounds still share the image's tokens in one row: attention hides the other rounds, and positions
                continue from the image for each of them. Otherwise a row is one conversation in which later answers may
                follow from earlier ones.
            packed: all samples share one row, for `models/block_attention.py`; otherwise a row a sample, padded on the right.
            context: the model's context length in tokens.
            use_bytes: leave pixels as bytes, see `PixelEncoder`, and masks to be made, which `finish` does on the device.
        """
        self.processor, self.isolate_questions, self.packed, self.context = processor, isolate_questions, packed, context
        self.image_merge, self.pad = image_merge(processor), processor.tokenizer.pad_token_id or 0
        self.pixels, self.on_device = PixelEncoder(processor.image_processor), use_bytes
        special = {str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        self._own_tokens = re.compile("|".join(re.escape(token) for token in sorted({*special, processor.image_token})))
        self._formats: dict[int, list[TurnFormat] | None] = {}  # by number of images
        self._tokenized: dict[str, list[int]] = {}
        self._image_tokens: dict[Any, tuple[list[int], list[int]]] = {}  # ids and types up to a prompt's last image
        self._takes_images_alone: bool | None = None  # whether the processor needs no text
        if use_bytes:
            self.pixels.use_bytes(processor, self._rendered_turns([("?", "!")], 1)[0][0])

    def __getstate__(self) -> dict[str, Any]:
        """Without what was cached, for another process."""
        return {**self.__dict__, "_tokenized": {}, "_image_tokens": {}}

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """The `batch` of the `encode`d samples."""
        return self.batch([self.encode(sample) for sample in samples])

    def encode(self, sample: Sample) -> "EncodedSample":
        """Tokens and images of one sample.

        Raises:
            SkipSampleError: it is longer than the context, has no answer, or holds one of the model's own tokens.
            InputError: it has two images and the model's family takes one.
        """
        if found := self._own_tokens.search("\n".join(text for texts in sample.rounds for text in texts)):
            raise SkipSampleError(f"a question or answer holds {found[0]}, which is one of the model's own tokens")
        turns = self._turns(sample.rounds, len(sample.images))
        tokens = self._tokens([text for turn in turns for text in turn])
        prompts, answers = tokens[::2], tokens[1::2]
        pixels, prefix, types = self._encode_images(turns[0][0], prompts[0], sample.images)
        kinds = [KINDS.index(kind) if kind in KINDS else len(KINDS) for kind in sample.kinds]
        row = EncodedSample(pixels=pixels)
        row.add(prefix, IGNORE_INDEX, 0, 0)
        if types:
            row.types = types
        if self.image_merge:
            row.rope = rope_positions(types, pixels["image_grid_thw"].tolist(), self.image_merge)
        rope_start = 1 + max(map(max, row.rope)) if row.rope else 0
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
            question = prompt[self._after_image(prompt) :] if number == 1 or self.isolate_questions else prompt
            start = len(prefix) if self.isolate_questions else len(row.ids)
            row.add(question, IGNORE_INDEX, number, start)
            row.add(answer, None, number, start + len(question))
            row.kinds += [kinds[number - 1] if kinds else len(KINDS)] * (len(row.ids) - len(row.kinds))
            if self.image_merge:
                text = range(rope_start + start - len(prefix), rope_start + start - len(prefix) + len(question) + len(answer))
                row.rope = [axis + list(text) for axis in row.rope]
        if types:
            row.types = types + [0] * (len(row.ids) - len(types))
        if all(label == IGNORE_INDEX for label in row.labels):
            raise SkipSampleError("there is no answer")
        if self.context and max(row.positions) >= self.context:
            raise SkipSampleError(f"{max(row.positions) + 1} tokens are more than the model's context of {self.context}")
        return row

    def batch(self, rows: "list[EncodedSample]") -> dict[str, torch.Tensor]:
        """Inputs with `labels`, B x T tokens padded on the right, other tensors as the processor stacks them.

        `kinds` (B x T) are the numbers of the questions' kinds. With `isolate_questions` the attention mask is B x 1 x T x T,
        added to the attention's scores, and there are position_ids (B x T). Packed, B is 1, nothing is padded, and
        position_ids without a mask tell which tokens belong together. Of a model with positions by rows and columns
        position_ids are 4 x B x T: those, and the three axes.
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
            positions = [_padded([row.positions for row in rows], length, 0)]
            positions += [_padded([row.rope[axis] for row in rows], length, 0) for axis in range(3) if rows[0].rope]
            batch["position_ids"] = torch.stack(positions) if len(positions) > 1 else positions[0]
        if not self.packed:
            if self.isolate_questions:
                rounds = _padded([row.rounds for row in rows], length, -1)
                batch |= {"rounds": rounds} if self.on_device else {"attention_mask": block_causal_mask(rounds)}
            else:
                batch["attention_mask"] = _padded([[1] * len(row.ids) for row in rows], length, 0)
        if rows[0].types:
            batch["mm_token_type_ids"] = _padded([row.types for row in rows], length, 0)
        for key in rows[0].pixels:
            batch[key] = _stacked([row.pixels[key] for row in rows])
        return batch

    def finish(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A `batch` as the model takes it, made on the device where it is."""
        inputs = self.pixels.normalize({key: value for key, value in batch.items() if key != "rounds"})
        return {**inputs, "attention_mask": block_causal_mask(batch["rounds"])} if "rounds" in batch else inputs

    def _encode_images(
        self, prompt: str, tokens: list[int], images: list[Image.Image]
    ) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
        """The images' tensors, the first prompt's tokens up to the end of the images, and their types if the model has any.

        Args:
            prompt, tokens: with one token an image; the processor writes as many as the image has features.
        """
        images = [self.pixels.prepare(image) for image in images]
        sizes = tuple(image.size for image in images)
        key = prompt[: prompt.rfind(self.processor.image_token)], sizes
        cached = self._image_tokens.get(key)
        inputs = self._process(None if cached and self._takes_images_alone else prompt, images)
        pixels = {key: tensor_of(value) for key, value in inputs.items() if key not in TEXT_INPUTS}
        if self.pixels.options.get("do_rescale") is False:
            pixels[PIXELS] = as_bytes(pixels[PIXELS])
        if cached is None:
            first, rest = list(inputs["input_ids"][0]), len(tokens) - self._after_image(tokens)
            types = list(inputs["mm_token_type_ids"][0]) if "mm_token_type_ids" in inputs else []
            cached = first[: len(first) - rest], types[: len(first) - rest]
            if len(self._image_tokens) < CACHED_TEXTS:
                self._image_tokens[key] = cached
            if self._takes_images_alone is None:
                try:
                    self._takes_images_alone = set(self._process(None, images)) == set(pixels)
                except (TypeError, AttributeError, ValueError, InputError):
                    self._takes_images_alone = False
        return pixels, cached[0], cached[1]

    def _process(self, prompt: str | None, images: list[Image.Image]) -> Any:
        """The processor's outputs for the first prompt and its images, or for the images alone."""
        text = {} if prompt is None else {"text": [prompt]}
        if len(images) == 1:
            return self.processor(images=[images], **text, **self.pixels.options)
        try:
            if prompt is None or prompt.count(self.processor.image_token) == len(images):
                return self.processor(images=[images], **text, **self.pixels.options)
            reason = f"its chat template shows {prompt.count(self.processor.image_token)} of them"
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"the base model can't take {len(images)} images in a conversation ({reason}): set tiles.layout to graft or "
            "beside, or choose another model.base."
        )

    def _turns(self, rounds: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
        """`_rendered_turns`, put together from what the chat template writes around questions and answers."""
        if images not in self._formats:
            self._formats[images] = self._turn_formats(images)
        formats = self._formats[images]
        if formats is None or not all(text and text == text.strip() for texts in rounds for text in texts):
            return self._rendered_turns(rounds, images)
        first, later = formats[0], formats[0] if self.isolate_questions else formats[1]
        around = [first] + [later] * (len(rounds) - 1)
        return [
            (form.before + question + form.between, answer + form.after)
            for form, (question, answer) in zip(around, rounds, strict=True)
        ]

    def _turn_formats(self, images: int) -> "list[TurnFormat] | None":
        """What the template writes around the first round and around later ones; None if it changes the texts themselves."""
        probes = [(f"\ue000 question {n}", f"\ue000 answer {n}") for n in range(3)]
        formats = []
        for (prompt, answer), texts in zip(self._rendered_turns(probes, images), probes, strict=True):
            pieces = prompt.split(texts[0])
            if len(pieces) != 2 or not answer.startswith(texts[1]):
                return None
            formats.append(TurnFormat(pieces[0], pieces[1], answer.removeprefix(texts[1])))
        return formats if formats[1] == formats[2] else None

    def _rendered_turns(self, rounds: list[tuple[str, str]], images: int) -> list[tuple[str, str]]:
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

    def _after_image(self, ids: list[int]) -> int:
        """The index of the first token after the last image."""
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        return len(ids) - ids[::-1].index(image)

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text; all new ones are tokenized in one call, and most texts come again."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._tokenized]:
            if len(self._tokenized) > CACHED_TEXTS:
                self._tokenized = {text: self._tokenized[text] for text in texts if text in self._tokenized}
            ids = self.processor.tokenizer(new, add_special_tokens=False)["input_ids"]
            self._tokenized |= zip(new, ids, strict=True)
        return [self._tokenized[text] for text in texts]


class TurnFormat(NamedTuple):
    """The text that a chat template writes before a question, between it and its answer, and after that."""

    before: str
    between: str
    after: str


@dataclass
class EncodedSample:
    """One sample: for each token its id, label, round (0: shared by all), position, kind of question and, for some processors,
    type (text or image); the three axes of positions of models that have them; and the images' tensors."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    rope: list[list[int]] = field(default_factory=list)
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
        packed.rope = [[p for row in rows for p in row.rope[axis]] for axis in range(len(rows[0].rope))]
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
    return torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
