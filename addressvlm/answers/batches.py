"""Many questions in one batch, where what an image costs is paid once; free answers by the family's own `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from addressvlm.answers.model import ChatModel, Prefix, user_turn
from addressvlm.answers.texts import Completion


@torch.inference_mode()
def answer_freely(
    model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str], max_tokens: int, temperature: float
) -> list[Completion]:
    """One answer to each question about the image at the same position; blanks around it are cut off."""
    inputs = _inputs(model, images, questions)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    )
    ids = model.model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(model.ends),
        pad_token_id=model.tokenizer.pad_token_id,
        **sampling,
    )
    prompts, new = inputs["attention_mask"].sum(1).tolist(), ids[:, inputs["input_ids"].shape[1] :].tolist()
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    answers = []
    for text, prompt, row in zip(texts, prompts, new, strict=True):
        end = next((at for at, token in enumerate(row) if token in model.ends), None)
        finish, tokens = ("length", len(row)) if end is None else ("stop", end + 1)
        answers.append(Completion(text.strip(), finish, (), prompt, tokens))
    return answers


@torch.inference_mode()
def read_batch(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> Prefix:
    """The questions read, each about the image at the same position."""
    inputs = _inputs(model, images, questions)
    cache = inputs.pop("past_key_values", None)
    if cache is None:
        return model.read(inputs)
    ids, mask, end = inputs["input_ids"], inputs["attention_mask"], cache.get_seq_length()
    positions = (mask.cumsum(1) - 1)[:, end:]
    read = model.model(
        input_ids=ids[:, end:], attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    )
    return Prefix(read.past_key_values, mask, read.logits[:, -1], mask.sum(1))


def _inputs(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
    prompts = [model.prompt([user_turn(question)]) for question in questions]
    return share_images(model, model.inputs(prompts, [[image] for image in images]), images)


def share_images(model: ChatModel, inputs: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    """The same inputs, with a key-value cache of every different image where prompts show one image each, again and again.

    Rows become image, padding, question; positions are counted by the attention mask, so padding in the middle is as
    good as on the left. Families whose inputs are not one row a prompt, or whose images differ in length, stay as
    they are.
    """
    token = model.image_token
    different = {id(image): row for row, image in reversed(list(enumerate(images)))}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    plain = all(len(value) == len(ids) and value.shape[:2] != ids.shape for value in others.values())
    if token is None or not plain or 2 * len(different) > len(images):
        return dict(inputs)
    padding = (mask == 0).sum(1).tolist()
    ends = {int((row == token).nonzero()[-1]) + 1 - pads for row, pads in zip(ids, padding, strict=True)}
    if len(ends) != 1:
        return dict(inputs)
    end, first = ends.pop(), torch.tensor(list(different.values()), device=ids.device)
    order = {image: number for number, image in enumerate(different)}
    ids, mask = _pads_after(end, padding, ids), _pads_after(end, padding, mask)
    seen = {key: value[first] for key, value in others.items()}
    cache = model.model(input_ids=ids[first, :end], attention_mask=mask[first, :end], **seen, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([order[id(image)] for image in images], device=ids.device))
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def _pads_after(end: int, padding: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, T) whose padding on the left is put behind their first `end` tokens instead."""
    moved = [torch.cat([r[p : p + end], r[:p], r[p + end :]]) for r, p in zip(rows, padding, strict=True)]
    return torch.stack(moved)
