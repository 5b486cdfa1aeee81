"""Free generation, token by token: several continuations of one prompt at once, stops, log-probabilities, as a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import RepetitionPenaltyLogitsProcessor

from addressvlm.answers import question_parser
from addressvlm.answers.chat_model import ChatModel, PrefillCache, Turn, user_turn
from addressvlm.answers.prefix_cache import PrefixCacheEntry, full_prompt
from addressvlm.answers.priors import Prior
from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore


def stream_tokens(model: ChatModel, prefix: PrefillCache, sampling: Sampling) -> Iterator[TextChunk]:
    """The answers to the one prompt of a prefix, a piece whenever one has new text; stop iterating to stop the model.

    What might be the beginning of a stop text, or of a character of several tokens, is held back until it is decided.
    """
    answers = [_Answer(model, sampling, i, int(prefix.mask.sum())) for i in range(sampling.n)]
    for row_tokens, logits in _decode_steps(model, prefix, sampling, answers):
        log_p = torch.log_softmax(logits.float(), dim=-1) if sampling.logprobs is not None else None
        for row, (answer, token) in enumerate(zip(answers, row_tokens, strict=True)):
            if answer.finish is None:
                piece = answer.add(token, None if log_p is None else log_p[row])
                if piece:
                    yield piece


def complete_chat(model: ChatModel, prefix: PrefillCache, sampling: Sampling) -> list[Completion]:
    """The same answers when they are finished, n of them; blanks around them are cut off."""
    pieces: list[list[TextChunk]] = [[] for _ in range(sampling.n)]
    for piece in stream_tokens(model, prefix, sampling):
        pieces[piece.index].append(piece)
    return [
        Completion(
            "".join(p.text for p in of).strip(), of[-1].finish or "stop", tuple(s for p in of for s in p.scores),
            of[-1].prompt_tokens, of[-1].tokens,
        )
        for of in pieces
    ]  # fmt: skip


def _decode_steps(
    model: ChatModel, prefix: PrefillCache, sampling: Sampling, answers: list["_Answer"]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """A token for each answer and the logits it was drawn from (n, vocabulary), until all are finished."""
    device = prefix.mask.device
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device).manual_seed(sampling.seed)
    penalty = getattr(model.model.generation_config, "repetition_penalty", None)
    penalize = RepetitionPenaltyLogitsProcessor(penalty) if penalty and penalty != 1.0 else None
    rows = prefix.rows([0] * sampling.n)
    cache, mask, logits = rows.cache, rows.mask, rows.logits
    said = torch.zeros(sampling.n, 0, dtype=torch.long, device=device)
    while True:
        if penalize and said.shape[1]:
            logits = penalize(said, logits)
        chosen = _choose(logits, sampling, generator)
        yield chosen.tolist(), logits
        if all(answer.finish for answer in answers):
            return
        said = torch.cat([said, chosen[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        with torch.inference_mode():
            logits = model.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=rows.position[:, None] + said.shape[1] - 1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]


def _choose(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row, (rows,)."""
    if sampling.temperature <= 0:
        return logits.argmax(dim=-1)
    share = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = share.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        share = torch.zeros_like(share).scatter(1, order, ordered.masked_fill(before >= sampling.top_p, 0.0))
    return torch.multinomial(share, 1, generator=generator)[:, 0]


@dataclass
class _Answer:
    """One continuation as it grows."""

    model: ChatModel
    sampling: Sampling
    index: int
    prompt_tokens: int
    ids: list[int] = field(default_factory=list)
    given: str = ""
    finish: str | None = None
    scores: list[TokenScore] = field(default_factory=list)

    def add(self, token: int, log_p: torch.Tensor | None) -> TextChunk | None:
        """Take a token; the piece to give away, if any."""
        self.ids.append(token)
        if log_p is not None:
            self.scores.append(self._score(token, log_p))
        ended = token in self.model.ends
        text = self.model.text(self.ids[:-1] if ended else self.ids)
        cut = min((at for stop in self.sampling.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None or ended:
            self.finish = "stop"
        elif len(self.ids) >= self.sampling.max_tokens:
            self.finish = "length"
        ready = text[:cut] if self.finish else text[: len(text) - self._undecided(text)]
        new = ready[len(self.given) :]
        if not (new or self.finish):
            return None
        self.given += new
        scores, self.scores = tuple(self.scores), []
        return TextChunk(self.index, new, self.finish, scores, self.prompt_tokens, len(self.ids))

    def _undecided(self, text: str) -> int:
        """How many characters at the end may still change or turn out to be the beginning of a stop."""
        broken = len(text) - len(text.rstrip("\ufffd"))
        stops = (n for stop in self.sampling.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return max(broken, max(stops, default=0))

    def _score(self, token: int, log_p: torch.Tensor) -> TokenScore:
        best = torch.topk(log_p, min(self.sampling.logprobs or 0, len(log_p)))
        top = tuple((self._spelt(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenScore(self._spelt(token), float(log_p[token]), top)

    def _spelt(self, token: int) -> str:
        return self.model.tokenizer.decode([token])


@torch.inference_mode()
def generate_batch(
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
def prefill_batch(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> PrefillCache:
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
    return PrefillCache(read.past_key_values, mask, read.logits[:, -1], mask.sum(1))


def _inputs(model: ChatModel, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
    prompts = [model.prompt([user_turn(question)]) for question in questions]
    return share_image_features(model, model.inputs(prompts, [[image] for image in images]), images)


def share_image_features(model: ChatModel, inputs: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
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
    ids, mask = _pads_after_end(end, padding, ids), _pads_after_end(end, padding, mask)
    seen = {key: value[first] for key, value in others.items()}
    cache = model.model(input_ids=ids[first, :end], attention_mask=mask[first, :end], **seen, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([order[id(image)] for image in images], device=ids.device))
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


def _pads_after_end(end: int, padding: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Rows (B, T) whose padding on the left is put behind their first `end` tokens instead."""
    moved = [torch.cat([r[p : p + end], r[:p], r[p + end :]]) for r, p in zip(rows, padding, strict=True)]
    return torch.stack(moved)


if TYPE_CHECKING:
    from addressvlm.inference import Localizer


@dataclass(frozen=True)
class ConversationAnswer:
    """An answer, and its probability where it follows from those of the addresses; None for a freely generated one."""

    text: str
    probability: float | None = None


class Conversation:
    """Questions about one photo.

    Questions about the address (which street, is it on …, options) are answered by its probabilities, so that they never
    contradict each other; all others by the model's own words, with what was said before.
    """

    def __init__(self, localizer: "Localizer", image: Image.Image, prior: Prior | None = None) -> None:
        self._localizer, self._image, self._prior = localizer, image, prior
        self._turns: list[Turn] = []
        self._look: PrefixCacheEntry | None = None

    def ask(self, question: str, max_tokens: int = 64, temperature: float = 0.0, remember: bool = True) -> ConversationAnswer:
        """Answer a question; with `remember` it and its answer come before the next one."""
        first = not self._turns
        content = [{"type": "text", "text": question}]
        turns = [*self._turns, {"role": "user", "content": [{"type": "image"}, *content] if first else content}]
        city = self._localizer.gazetteer
        asked = question_parser.parse_question(question, city) if city and city.addresses else None
        if asked:
            reply = ConversationAnswer(*asked.answer(self._localizer.beliefs([self._image], [self._prior])[0]))
        else:
            reply = ConversationAnswer(self._generate(turns, Sampling(max_tokens, temperature)))
        if remember:
            self._turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": reply.text}]}]
        return reply

    def _generate(self, turns: list[Turn], sampling: Sampling) -> str:
        prompt = self._localizer.prompt(turns)
        prefix = self._localizer.read_one(prompt, [self._image], self._look)
        self._look = full_prompt(prompt, prefix)
        return complete_chat(self._localizer, prefix, sampling)[0].text
