"""Free generation: several continuations of one prompt as a stream, batches of questions, and conversations about a photo."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.chat_model import ChatModel, PrefillCache, Turn, user_turn
from addressvlm.answers.prefix_cache import PrefixCacheEntry
from addressvlm.answers.question_parser import parse_question
from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore

if TYPE_CHECKING:
    from addressvlm.inference import Localizer


def stream_tokens(model: ChatModel, prefill: PrefillCache, sampling: Sampling) -> Iterator[TextChunk]:
    """The continuations of one prompt, a chunk whenever one has new text; stop iterating to stop the model.

    Text that may be the beginning of a stop text, or of a character of several tokens, waits until that is decided.
    """
    answers = [_PartialAnswer(model, sampling, i, int(prefill.mask.sum())) for i in range(sampling.n)]
    for row_tokens, logits in _decode_steps(model, prefill, sampling, answers):
        log_p = torch.log_softmax(logits.float(), dim=-1) if sampling.logprobs is not None else None
        for row, (answer, token) in enumerate(zip(answers, row_tokens, strict=True)):
            if answer.finish is None and (chunk := answer.add(token, None if log_p is None else log_p[row])):
                yield chunk


def complete_chat(model: ChatModel, prefill: PrefillCache, sampling: Sampling) -> list[Completion]:
    """The finished continuations of one prompt, `sampling.n` of them, without surrounding blanks."""
    answers: list[list[TextChunk]] = [[] for _ in range(sampling.n)]
    for chunk in stream_tokens(model, prefill, sampling):
        answers[chunk.index].append(chunk)
    return [
        Completion(
            "".join(c.text for c in chunks).strip(), chunks[-1].finish or "stop", tuple(s for c in chunks for s in c.scores),
            chunks[-1].prompt_tokens, chunks[-1].tokens,
        )
        for chunks in answers
    ]  # fmt: skip


def _decode_steps(
    model: ChatModel, prefill: PrefillCache, sampling: Sampling, answers: list["_PartialAnswer"]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """A token for each answer and the logits it was drawn from (n, vocabulary), until all are finished."""
    device = prefill.mask.device
    generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)
    penalty = getattr(model.model.generation_config, "repetition_penalty", None)
    penalize = RepetitionPenaltyLogitsProcessor(penalty) if penalty and penalty != 1.0 else None
    rows = prefill.rows([0] * sampling.n)
    cache, mask, logits = rows.cache, rows.mask, rows.logits
    generated = torch.zeros(sampling.n, 0, dtype=torch.long, device=device)
    while True:
        if penalize and generated.shape[1]:
            logits = penalize(generated, logits)
        tokens = sample_tokens(logits, sampling, generator)
        yield tokens.tolist(), logits
        if all(answer.finish for answer in answers):
            return
        generated = torch.cat([generated, tokens[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        with torch.inference_mode():
            logits = model.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=rows.position[:, None] + generated.shape[1] - 1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]


def sample_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row, (rows,), from logits (rows, vocabulary)."""
    if sampling.temperature <= 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        descending, order = p.sort(dim=-1, descending=True, stable=True)
        before = descending.cumsum(dim=-1) - descending
        p = torch.zeros_like(p).scatter(1, order, descending.masked_fill(before >= sampling.top_p, 0.0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@dataclass
class _PartialAnswer:
    """One continuation as it grows; `sent` is the text of its chunks so far."""

    model: ChatModel
    sampling: Sampling
    index: int
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    sent: str = ""
    finish: str | None = None
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, token: int, log_p: torch.Tensor | None) -> TextChunk | None:
        """Append a token; the next chunk, if there is any."""
        self.ids.append(token)
        if log_p is not None:
            decode = self.model.tokenizer.decode
            best = torch.topk(log_p, min(self.sampling.logprobs or 0, len(log_p)))
            top = tuple((decode([i]), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self.scores.append(TokenScore(decode([token]), float(log_p[token]), top))
        ended = token in self.model.end_tokens
        text = self.model.decode(self.ids[:-1] if ended else self.ids)
        stops = self.sampling.stop
        cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None or ended:
            self.finish = "stop"
        elif len(self.ids) >= self.sampling.max_tokens:
            self.finish = "length"
        # characters at the end that may still change, or turn out to be the beginning of a stop
        partial = [n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        undecided = max(len(text) - len(text.rstrip("\ufffd")), *partial, 0)
        ready = text[:cut] if self.finish else text[: len(text) - undecided]
        new = ready[len(self.sent) :]
        if not (new or self.finish):
            return None
        self.sent += new
        scores, self.scores = tuple(self.scores), []
        return TextChunk(self.index, new, self.finish, scores, self.prompt_tokens, len(self.ids))


@torch.inference_mode()
def generate_batch(
    model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str], max_tokens: int, temperature: float
) -> list[Completion]:
    """One answer to each question about the image at the same position, without surrounding blanks."""
    inputs = _batch_inputs(model, images, questions)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    ids = model.model.generate(
        **inputs,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(model.end_tokens),
        pad_token_id=model.tokenizer.pad_token_id,
        do_sample=temperature > 0,
        **sampling,
    )
    prompts, new = inputs["attention_mask"].sum(1).tolist(), ids[:, inputs["input_ids"].shape[1] :].tolist()
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    answers = []
    for text, prompt, row in zip(texts, prompts, new, strict=True):
        end = next((i for i, token in enumerate(row) if token in model.end_tokens), None)
        finish, tokens = ("length", len(row)) if end is None else ("stop", end + 1)
        answers.append(Completion(text.strip(), finish, (), prompt, tokens))
    return answers


@torch.inference_mode()
def prefill_batch(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> PrefillCache:
    """Prefill questions, each about the image at the same position."""
    inputs = _batch_inputs(model, images, questions)
    cache = inputs.pop("past_key_values", None)
    if cache is None:
        return model.prefill(inputs)
    ids, mask, start = inputs["input_ids"], inputs["attention_mask"], cache.get_seq_length()
    positions = (mask.cumsum(1) - 1)[:, start:]
    output = model.model(
        input_ids=ids[:, start:], attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    )
    return PrefillCache(output.past_key_values, mask, output.logits[:, -1], mask.sum(1))


def _batch_inputs(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images and {len(questions)} questions: there must be one image a question")
    prompts = [model.prompt([user_turn(question)]) for question in questions]
    return share_image_prefixes(model, model.inputs(prompts, [[image] for image in images]), images)


def share_image_prefixes(model: ChatModel, inputs: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    """The same inputs, with a key-value cache of every distinct image where prompts show one image each, again and again.

    Rows become image, padding, question; positions are counted by the attention mask, so padding in the middle is as
    good as on the left. Families whose inputs are not one row a prompt, or whose images differ in length, stay as
    they are.
    """
    token = model.image_token
    first_rows = {id(image): row for row, image in reversed(list(enumerate(images)))}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    others = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    one_row_a_prompt = all(len(value) == len(ids) and value.shape[:2] != ids.shape for value in others.values())
    if token is None or not one_row_a_prompt or 2 * len(first_rows) > len(images):
        return dict(inputs)
    padding = (mask == 0).sum(1).tolist()
    ends = {int((row == token).nonzero()[-1]) + 1 - pads for row, pads in zip(ids, padding, strict=True)}
    if len(ends) != 1:
        return dict(inputs)
    end, first = ends.pop(), torch.tensor(list(first_rows.values()), device=ids.device)
    number = {image: n for n, image in enumerate(first_rows)}
    order = [[*range(p, p + end), *range(p), *range(p + end, ids.shape[1])] for p in padding]
    ids, mask = (rows.gather(1, torch.tensor(order, device=ids.device)) for rows in (ids, mask))
    distinct = {key: value[first] for key, value in others.items()}
    cache = model.model(
        input_ids=ids[first, :end], attention_mask=mask[first, :end], **distinct, use_cache=True
    ).past_key_values
    cache.batch_select_indices(torch.tensor([number[id(image)] for image in images], device=ids.device))
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


@dataclass(frozen=True)
class ConversationAnswer:
    """An answer, and its probability where it follows from those of the addresses; None for a freely generated one."""

    text: str
    probability: float | None = None


class Conversation:
    """Questions about one photo.

    Questions about the address (which street, is it on …, options) are answered by its probabilities, so that answers never
    contradict each other; all others by free generation, with the turns before them.
    """

    def __init__(self, localizer: "Localizer", image: Image.Image, prior: Prior | None = None) -> None:
        self._localizer, self._image, self._prior = localizer, image, prior
        self._turns: list[Turn] = []
        self._prefix: PrefixCacheEntry | None = None

    def ask(self, question: str, max_tokens: int = 64, temperature: float = 0.0, remember: bool = True) -> ConversationAnswer:
        """Answer a question; with `remember` it and its answer are part of the conversation."""
        text = [{"type": "text", "text": question}]
        turns = [*self._turns, {"role": "user", "content": text if self._turns else [{"type": "image"}, *text]}]
        localizer, gazetteer = self._localizer, self._localizer.gazetteer
        parsed = parse_question(question, gazetteer) if gazetteer and gazetteer.addresses else None
        if parsed:
            answer = ConversationAnswer(*parsed.answer(localizer.address_distributions([self._image], [self._prior])[0]))
        else:
            prompt = localizer.prompt(turns)
            prefill = localizer.prefill_prompt(prompt, [self._image], self._prefix)
            self._prefix = PrefixCacheEntry(prompt, prefill.cache, prefill.mask.shape[1], int(prefill.position[0]))
            answer = ConversationAnswer(complete_chat(localizer, prefill, Sampling(max_tokens, temperature))[0].text)
        if remember:
            self._turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        return answer
