"""Free generation: one decoding loop for streams, batches of questions, and conversations about a photo.

`Decoder` has all answers that are being written; each step gives every one of them one token, and answers join and leave
between two steps. What an answer says depends on nothing but its own prompt and sampling.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.chat_model import ChatModel, Turn
from addressvlm.answers.kv_cache import PrefillCache, fork_cache, keeps_all_tokens
from addressvlm.answers.question_parser import parse_question
from addressvlm.answers.types import Completion, Sampling, TextChunk, TokenScore

if TYPE_CHECKING:
    from addressvlm.inference import Localizer

GREEDY_BELOW = 1e-4  # a lower temperature takes the likeliest token
UNUSABLE = -1  # in place of a token: the logits are not finite


class Token(NamedTuple):
    """A token of an answer and, with `Sampling.logprobs`, its ln p and the likeliest tokens at its place with theirs."""

    id: int
    log_p: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Answer:
    """An answer in a `Decoder`.

    Attributes:
        index: among the answers to the same prompt.
        prompt_tokens: length of the prompt, images included.
        ids: tokens so far.
        cancelled: no more tokens are wanted; any thread may set it.
    """

    model: ChatModel
    sampling: Sampling
    prompt_tokens: int
    index: int = 0
    ids: list[int] = field(default_factory=list)
    cancelled: bool = False

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self._generator = None if seed is None else torch.Generator().manual_seed((seed * 1_000_003 + self.index) % 2**63)

    @property
    def live(self) -> bool:
        """Whether it goes on."""
        ended = bool(self.ids) and (self.ids[-1] in self.model.end_tokens or self.ids[-1] == UNUSABLE)
        return not (self.cancelled or ended or len(self.ids) >= self.sampling.max_tokens)

    def draw(self) -> float:
        """The next random number in [0, 1), of its own seed."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))


class Decoder:
    """All answers that are being written, by models that share a base."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []

    def __len__(self) -> int:
        """Number of answers."""
        return sum(len(batch.answers) for batch in self._batches)

    def cached_tokens(self, joining: Sequence[tuple[int, int]] = ()) -> int:
        """Upper bound of the tokens in the key-value cache until all have ended, padding included.

        Args:
            joining: the prompt's length and `max_tokens` of answers that may join.
        """
        answers = [answer for batch in self._batches for answer in batch.answers]
        lengths = [*(batch.state.mask.shape[1] for batch in self._batches), *(length for length, _ in joining)]
        left = [*(a.sampling.max_tokens - len(a.ids) for a in answers), *(tokens for _, tokens in joining)]
        return (len(answers) + len(joining)) * (max(lengths, default=0) + max(left, default=0))

    def join(self, state: PrefillCache, answers: Sequence[Answer]) -> list[tuple[Answer, Token]]:
        """Begin answers that continue from the rows of `state`, in this order; returns their first tokens."""
        joined = _Batch(replace(state, cache=fork_cache(state.cache)), list(answers))
        tokens = joined.sample()
        batch = next((batch for batch in self._batches if batch.can_merge(joined)), None)
        if batch:
            batch.merge(joined)
        else:
            self._batches.append(joined)
        return tokens

    def step(self) -> list[tuple[Answer, Token]]:
        """The next token of each answer that goes on; none if all have ended."""
        for batch in self._batches:
            batch.remove_ended()
        self._batches = [batch for batch in self._batches if batch.answers]
        return [token for batch in self._batches for token in batch.step()]


@dataclass
class _Batch:
    """Answers that go through the model together; the last token of each is not in the cache yet."""

    state: PrefillCache
    answers: list[Answer]

    def can_merge(self, other: "_Batch") -> bool:
        both = (self, other)
        length = max(b.state.mask.shape[1] + max(a.sampling.max_tokens - len(a.ids) for a in b.answers) for b in both)
        same_base = self.answers[0].model.model is other.answers[0].model.model
        return same_base and all(keeps_all_tokens(batch.state.cache, length) for batch in both)

    def merge(self, other: "_Batch") -> None:
        self.state = PrefillCache.concat([self.state, other.state])
        self.answers += other.answers

    def remove_ended(self) -> None:
        rows = [row for row, answer in enumerate(self.answers) if answer.live]
        if 0 < len(rows) < len(self.answers):
            self.state = self.state.rows(rows)
        self.answers = [self.answers[row] for row in rows]

    def step(self) -> list[tuple[Answer, Token]]:
        models = [answer.model for answer in self.answers]
        self.state = models[0].extend(self.state, [[answer.ids[-1]] for answer in self.answers], models, in_place=True)
        return self.sample()

    @torch.inference_mode()
    def sample(self) -> list[tuple[Answer, Token]]:
        """One token for each answer, from the logits of the state."""
        logits = self.state.logits
        penalty = getattr(self.answers[0].model.model.generation_config, "repetition_penalty", None) or 1.0
        if penalty != 1.0:
            logits = _penalize(logits, [answer.ids for answer in self.answers], penalty)
        samplings = [answer.sampling for answer in self.answers]
        draws = [answer.draw() if answer.sampling.temperature >= GREEDY_BELOW else 0.0 for answer in self.answers]
        drawn = sample_tokens(logits, samplings, torch.tensor(draws, dtype=torch.float64, device=logits.device))
        tokens = [Token(id) for id in drawn.tolist()]
        scored = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        if scored:
            most = min(max(samplings[row].logprobs or 0 for row in scored), logits.shape[1])
            log_p = torch.log_softmax(logits[scored].float(), dim=-1)
            own = log_p.gather(1, drawn[scored, None].clamp(min=0))[:, 0].tolist()
            top = log_p.topk(most, dim=-1)
            for row, p, best, best_p in zip(scored, own, top.indices.tolist(), top.values.tolist(), strict=True):
                tops = tuple(zip(best, best_p, strict=True))[: samplings[row].logprobs or 0]
                tokens[row] = Token(tokens[row].id, p, tops)
        for answer, token in zip(self.answers, tokens, strict=True):
            answer.ids.append(token.id)
        return list(zip(self.answers, tokens, strict=True))


def _penalize(logits: torch.Tensor, answers: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """The repetition penalty (Keskar et al. 2019), for tokens of the answer alone: names in the question may be repeated."""
    logits = logits.clone()
    for row, ids in enumerate(answers):
        used = torch.tensor(sorted(set(ids)), dtype=torch.long, device=logits.device)
        values = logits[row, used]
        logits[row, used] = torch.where(values < 0, values * penalty, values / penalty)
    return logits


def sample_tokens(logits: torch.Tensor, samplings: Sequence[Sampling], draws: torch.Tensor) -> torch.Tensor:
    """One token a row, (rows,), from logits (rows, vocabulary); UNUSABLE where they are not finite.

    Args:
        draws: random numbers in [0, 1) that decide, float64 (rows,).
    """
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    for top_p_below_1 in (False, True):
        rows = [i for i, s in enumerate(samplings) if s.temperature >= GREEDY_BELOW and (s.top_p < 1) == top_p_below_1]
        if not rows:
            continue
        temperatures = torch.tensor([samplings[i].temperature for i in rows], device=logits.device)[:, None]
        p = torch.softmax((logits[rows] - best[rows, None]) / temperatures, dim=-1).double()
        order = None
        if top_p_below_1:
            shares = torch.tensor([samplings[i].top_p for i in rows], dtype=torch.float64, device=logits.device)[:, None]
            p, order = p.sort(dim=-1, descending=True, stable=True)
            before = p.cumsum(dim=-1) - p
            p = p.masked_fill((before >= shares) & (before > 0), 0.0)
        cumulative = p.cumsum(dim=-1)
        picked = torch.searchsorted(cumulative, draws[rows, None] * cumulative[:, -1:], right=True)
        picked = picked.clamp(max=logits.shape[1] - 1)
        tokens[rows] = (picked if order is None else order.gather(1, picked))[:, 0]
    return torch.where(best.isfinite(), tokens, UNUSABLE)


class AnswerText:
    """The text of an answer as its tokens come.

    Text that may be the beginning of a stop text, or of a character of several tokens, waits until that is decided.

    Attributes:
        finish: `stop` or `length` once it has ended.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.finish: str | None = None
        self._ids: list[int] = []
        self._sent = ""
        self._scores: list[TokenScore] = []

    def add(self, token: Token) -> TextChunk | None:
        """Append a token; the next chunk, if there is any. Tokens after the end change nothing.

        Raises:
            RuntimeError: the model's logits were not finite.
        """
        model, sampling = self.answer.model, self.answer.sampling
        if self.finish:
            return None
        if token.id == UNUSABLE:
            raise RuntimeError(f"{model.folder} gives logits that are not finite: its weights are damaged, or overflow.")
        self._ids.append(token.id)
        if token.log_p is not None:
            decode = model.tokenizer.decode
            top = tuple((decode([i]), p) for i, p in token.top)
            self._scores.append(TokenScore(decode([token.id]), token.log_p, top))
        ended = token.id in model.end_tokens
        text = model.decode(self._ids[:-1] if ended else self._ids)
        cut = min((at for stop in sampling.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None or ended:
            self.finish = "stop"
            self.answer.cancelled = True
        elif len(self._ids) >= sampling.max_tokens:
            self.finish = "length"
        # at the end, a character whose bytes are not all here, or what may be the beginning of a stop text
        partial = [n for stop in sampling.stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        undecided = max(len(text) - len(text.rstrip("\ufffd")), *partial, 0)
        ready = text[:cut] if self.finish else text[: len(text) - undecided]
        new = ready[len(self._sent) :]
        if not (new or self.finish):
            return None
        self._sent += new
        scores, self._scores = tuple(self._scores), []
        return TextChunk(self.answer.index, new, self.finish, scores, self.answer.prompt_tokens, len(self._ids))


def completion(chunks: Sequence[TextChunk]) -> Completion:
    """The answer of these chunks, without surrounding blanks."""
    scores = tuple(score for chunk in chunks for score in chunk.scores)
    text, last = "".join(chunk.text for chunk in chunks).strip(), chunks[-1]
    return Completion(text, last.finish or "stop", scores, last.prompt_tokens, last.tokens)


def completions(chunks: Iterable[tuple[int, TextChunk]], count: int) -> list[Completion]:
    """The finished answers, from chunks with the number of the answer that each is of."""
    by_answer: list[list[TextChunk]] = [[] for _ in range(count)]
    for number, chunk in chunks:
        by_answer[number].append(chunk)
    return list(map(completion, by_answer))


def stream_answers(states: Sequence[tuple[PrefillCache, Sequence[Answer]]]) -> Iterator[tuple[int, TextChunk]]:
    """Chunks of answers, each with the number of its answer among all; stop iterating to stop the model.

    Args:
        states: each with the answers that continue from its rows.

    Raises:
        RuntimeError: the model's logits are not finite.
    """
    decoder = Decoder()
    answers = [answer for _, some in states for answer in some]
    texts = {answer: (number, AnswerText(answer)) for number, answer in enumerate(answers)}
    tokens = [token for state, some in states for token in decoder.join(state, some)]
    while tokens:
        for answer, token in tokens:
            number, text = texts[answer]
            if chunk := text.add(token):
                yield number, chunk
        tokens = decoder.step()


def stream_tokens(model: ChatModel, prefill: PrefillCache, sampling: Sampling) -> Iterator[TextChunk]:
    """The continuations of one prompt, a chunk whenever one has new text; stop iterating to stop the model."""
    length = int(prefill.mask.sum())
    answers = [Answer(model, sampling, length, index) for index in range(sampling.n)]
    return (chunk for _, chunk in stream_answers([(prefill.rows([0] * sampling.n), answers)]))


def complete_chat(model: ChatModel, prefill: PrefillCache, sampling: Sampling) -> list[Completion]:
    """The finished continuations of one prompt, `sampling.n` of them."""
    return completions(((chunk.index, chunk) for chunk in stream_tokens(model, prefill, sampling)), sampling.n)


def generate_batch(
    model: "Localizer", images: Sequence[Image.Image], questions: Sequence[str], max_tokens: int, temperature: float
) -> list[Completion]:
    """One answer to each question about the image at the same position."""
    sampling = Sampling(max_tokens, temperature)
    states, order = [], []  # the number of the question that each answer is to
    for rows, state in model.prefill_questions(images, questions):
        some = [Answer(model, sampling, length) for length in state.mask.sum(1).tolist()]
        states.append((state, some))
        order += rows
    return completions(((order[number], chunk) for number, chunk in stream_answers(states)), len(questions))


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
        self._previous: tuple[str, PrefillCache] | None = None  # the last prompt and the state after it

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
            beginning, state = self._previous or ("", None)
            if state and prompt.startswith(beginning) and prompt != beginning:
                rest = localizer.tokenizer(prompt[len(beginning) :], add_special_tokens=False)["input_ids"]
                prefill = localizer.extend(state, [rest])
            else:
                ((_, prefill),) = localizer.prefill_prompts([localizer.prepare(prompt, [self._image])])
            if keeps_all_tokens(prefill.cache, prefill.mask.shape[1]):
                self._previous = prompt, prefill
            answer = ConversationAnswer(complete_chat(localizer, prefill, Sampling(max_tokens, temperature))[0].text)
        if remember:
            self._turns = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
        return answer
