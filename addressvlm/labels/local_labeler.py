"""Labels by a model on this machine, in batches: a vision-language model, or a text-only one that reads only the facts."""

import base64
import binascii
import hashlib
import io
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from addressvlm.answers.chat_model import ChatModel
from addressvlm.config.labels import LabelsConfig
from addressvlm.errors import InputError
from addressvlm.labels.answer_text import ParsedAnswer, cut_reasoning, no_text
from addressvlm.labels.labelers import Label, Request, RetryState
from addressvlm.models.loading import dtype_of, local

Messages = list[dict[str, Any]]


class LocalLabeler:
    """Labels rows, `labels.batch_size` at a time; rows that need another attempt join the next batches."""

    def __init__(self, new_state: Callable[[Request], RetryState], config: LabelsConfig) -> None:
        """Load the model."""
        self._new_state, self.config = new_state, config
        self._writer = load_writer(config)

    def label(self, requests: Sequence[Request]) -> list[Label]:
        """One label per request, in their order."""
        labels: dict[int, Label] = {}
        waiting = deque(enumerate(map(self._new_state, requests)))
        while waiting:
            batch = [waiting.popleft() for _ in range(min(self.config.batch_size, len(waiting)))]
            # From the rows and their attempts, so that a rerun samples the same.
            name = "|".join(f"{state.seed}:{state.request.id}:{state.attempts}" for _, state in batch)
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
            texts = self._writer.write([state.messages() for _, state in batch], seed)
            for (position, state), text in zip(batch, texts, strict=True):
                label = state.add_answer(*text)
                if label is None:
                    waiting.append((position, state))
                else:
                    labels[position] = label
        return [labels[position] for position in range(len(requests))]


def load_writer(config: LabelsConfig) -> "Writer":
    """The model that the settings name, with or without vision."""
    folder = local(config.model)
    try:
        kind = type(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"labels.model {config.model} can't be loaded: {' '.join(str(error).split())[:300]}.") from error
    text_only = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if text_only and config.send_image:
        raise InputError(
            f"labels.model {config.model} reads only text: set labels.send_image to false and labels.prompt to grounded, "
            "or give a vision-language model."
        )
    return TextWriter(config, folder) if text_only else VisionWriter(config)


class Writer(ABC):
    """A model that continues conversations; subclasses make its inputs."""

    def __init__(self, config: LabelsConfig, model: Any, tokenizer: Any, end_tokens: set[int]) -> None:
        self.config, self.model, self.tokenizer, self.end_tokens = config, model, tokenizer, end_tokens

    @abstractmethod
    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """Tensors for `generate`, padded on the left."""

    @torch.inference_mode()
    def write(self, conversations: Sequence[Messages], seed: int) -> list[ParsedAnswer]:
        """The assistant's next message in each, without special tokens and reasoning; `seed` is for a temperature above 0."""
        inputs = self.inputs(conversations)
        sampling = {"do_sample": True, "temperature": self.config.temperature, "top_k": 0, "top_p": 1.0}
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            ids = self.model.generate(
                **{key: value for key, value in inputs.items() if key != "token_type_ids"},
                max_new_tokens=self.config.max_tokens,
                eos_token_id=sorted(self.end_tokens),
                pad_token_id=self.tokenizer.pad_token_id,
                **(sampling if self.config.temperature > 0 else {"do_sample": False}),
            )
        answers = []
        for answer in ids[:, inputs["input_ids"].shape[1] :]:
            text, reasoned = cut_reasoning(self.tokenizer.decode(answer, skip_special_tokens=True))
            limit_reached = not self.end_tokens.intersection(answer.tolist())
            answers.append(ParsedAnswer(text) if text else no_text(reasoned, limit_reached, self.config.max_tokens))
        return answers


class VisionWriter(Writer):
    """An image-text-to-text model of any family whose processor has a chat template."""

    def __init__(self, config: LabelsConfig) -> None:
        self.chat = ChatModel(config.model, dtype=config.dtype)
        super().__init__(config, self.chat.model, self.chat.tokenizer, self.chat.end_tokens)

    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """See Writer."""
        turns = [[_parse_message(message) for message in messages] for messages in conversations]
        prompts = [self.chat.prompt([turn for turn, _ in conversation]) for conversation in turns]
        return self.chat.inputs(prompts, [[image for _, images in conversation for image in images] for conversation in turns])


class TextWriter(Writer):
    """A causal language model, which reads only the facts."""

    def __init__(self, config: LabelsConfig, folder: str) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(config.dtype), use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"labels.model {config.model} can't be loaded: {' '.join(str(error).split())[:300]}.") from error
        if not tokenizer.chat_template:
            raise InputError(f"labels.model {config.model} has no chat template: give a model that follows instructions.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        configured = model.generation_config.eos_token_id
        ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])} - {None}
        super().__init__(config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, ends)

    def inputs(self, conversations: Sequence[Messages]) -> Any:
        """See Writer."""
        prompts = [self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in conversations]
        return self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False).to(self.model.device)


def _parse_message(message: dict[str, Any]) -> tuple[dict[str, Any], list[Image.Image]]:
    """An OpenAI chat message as a turn for a chat template, and its images."""
    content = message["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    images: list[Image.Image] = []
    for part in parts:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition(",")[2]
            try:
                images.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
                images[-1].load()
            except (OSError, ValueError, SyntaxError, binascii.Error) as error:
                raise InputError(f"an image to label can't be decoded ({error}): make the table again.") from None
    plain = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
    return {"role": message["role"], "content": plain}, images
