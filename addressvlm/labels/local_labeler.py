"""Labels written by a model on this machine, in batches: a vision-language model, or a text-only one without the image."""

import base64
import binascii
import hashlib
import io
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from addressvlm.answers.chat_model import ChatModel
from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.labelers import Label, Request
from addressvlm.labels.retry import RetryState
from addressvlm.models.loading import dtype_of, local

Messages = list[dict[str, Any]]


class LocalLabeler:
    """Drives rows through their attempts, `labels.batch_size` at a time; those to be asked again join the next batches."""

    def __init__(self, begin: Callable[[Request], RetryState], config: LabelsConfig) -> None:
        """Load the model.

        Args:
            begin: the attempts of a row.

        Raises:
            InputError: there is no such model, or it can't read what would be sent.
        """
        self._begin, self.config = begin, config
        self._writer = load_writer(config)

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """One label a request, in their order.

        Raises:
            InputError: an image can't be decoded.
        """
        labels: dict[int, Label] = {}
        waiting = deque(enumerate(map(self._begin, requests)))
        while waiting:
            batch = [waiting.popleft() for _ in range(min(self.config.batch_size, len(waiting)))]
            texts = self._writer.write([row.messages() for _, row in batch], _seed(row for _, row in batch))
            for (place, row), text in zip(batch, texts, strict=True):
                label = row.take(text)
                if label is None:
                    waiting.append((place, row))
                else:
                    labels[place] = label
        return [labels[place] for place in range(len(requests))]


class Writer(Protocol):
    """A model that goes on with conversations."""

    def write(self, conversations: Sequence[Messages], seed: int) -> list[str]:
        """The assistant's next turn in each; `seed` decides what a temperature above 0 draws."""
        ...


def load_writer(config: LabelsConfig) -> Writer:
    """The model that the settings name: one that sees, unless nothing is to be seen and it only reads.

    Raises:
        InputError: there is no such model, or it only reads and images would be sent.
    """
    where = local(config.model)
    try:
        kind = type(AutoConfig.from_pretrained(where))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"labels.model {config.model} can't be loaded: {' '.join(str(error).split())[:300]}.") from error
    reads_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if reads_only and config.send_image:
        raise InputError(
            f"labels.model {config.model} reads only text: set labels.send_image to false and labels.prompt to grounded, "
            "or give a vision-language model."
        )
    return TextWriter(config, where) if reads_only else VisionWriter(config)


class VisionWriter:
    """An image-text-to-text model of any family whose processor has a chat template."""

    def __init__(self, config: LabelsConfig) -> None:
        self.config = config
        self.chat = ChatModel(config.model, dtype=config.dtype)

    def write(self, conversations: Sequence[Messages], seed: int) -> list[str]:
        """See Writer."""
        turns = [[_turn(message) for message in messages] for messages in conversations]
        prompts = [self.chat.prompt([turn for turn, _ in of]) for of in turns]
        images = [[image for _, shown in of for image in shown] for of in turns]
        return _generate(
            self.chat.model, self.chat.tokenizer, self.chat.inputs(prompts, images), self.chat.ends, self.config, seed
        )


class TextWriter:
    """A causal language model, which reads the facts alone."""

    def __init__(self, config: LabelsConfig, where: str) -> None:
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype_of(config.dtype), use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"labels.model {config.model} can't be loaded: {' '.join(str(error).split())[:300]}.") from error
        if not self.tokenizer.chat_template:
            raise InputError(f"labels.model {config.model} has no chat template: give a model that follows instructions.")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.to(self.device).eval()
        configured = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        self.ends = {token for token in ends if token is not None}

    def write(self, conversations: Sequence[Messages], seed: int) -> list[str]:
        """See Writer."""
        prompts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False).to(self.device)
        return _generate(self.model, self.tokenizer, inputs, self.ends, self.config, seed)


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, inputs: Any, ends: set[int], config: LabelsConfig, seed: int) -> list[str]:
    """What follows each row of the inputs, without the marks of turns."""
    drawn = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        ids = model.generate(
            **{key: value for key, value in inputs.items() if key != "token_type_ids"},
            max_new_tokens=config.max_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            **(drawn if config.temperature > 0 else {"do_sample": False}),
        )
    return [text.strip() for text in tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


def _turn(message: dict[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
    """An OpenAI chat message as a turn for a chat template, and the images that it shows."""
    content = message["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
    plain = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
    return {"role": message["role"], "content": plain}, images


def _picture(url: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True)))
        image.load()
    except (OSError, ValueError, SyntaxError, binascii.Error) as error:
        raise InputError(f"an image to label can't be decoded ({error}): make the table again.") from None
    return image


def _seed(rows: Any) -> int:
    """From the rows of a batch and how often each was asked, so that a rerun draws the same."""
    asked = "|".join(f"{row.seed}:{row.request.id}:{row.number}" for row in rows)
    return int.from_bytes(hashlib.sha256(asked.encode()).digest()[:6])
