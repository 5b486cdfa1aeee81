"""Free generation, token by token: several continuations of one prompt at once, stops, log-probabilities, as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from addressvlm.answers.model import ChatModel, Prefix
from addressvlm.answers.texts import Completion, Piece, Sampling, TokenScore


def stream(model: ChatModel, prefix: Prefix, sampling: Sampling) -> Iterator[Piece]:
    """The answers to the one prompt of a prefix, a piece whenever one has new text; stop iterating to stop the model.

    What might be the beginning of a stop text, or of a character of several tokens, is held back until it is decided.
    """
    answers = [_Answer(model, sampling, i, int(prefix.mask.sum())) for i in range(sampling.n)]
    for row_tokens, logits in _steps(model, prefix, sampling, answers):
        log_p = torch.log_softmax(logits.float(), dim=-1) if sampling.logprobs is not None else None
        for row, (answer, token) in enumerate(zip(answers, row_tokens, strict=True)):
            if answer.finish is None:
                piece = answer.add(token, None if log_p is None else log_p[row])
                if piece:
                    yield piece


def complete(model: ChatModel, prefix: Prefix, sampling: Sampling) -> list[Completion]:
    """The same answers when they are finished, n of them; blanks around them are cut off."""
    pieces: list[list[Piece]] = [[] for _ in range(sampling.n)]
    for piece in stream(model, prefix, sampling):
        pieces[piece.index].append(piece)
    return [
        Completion(
            "".join(p.text for p in of).strip(), of[-1].finish or "stop", tuple(s for p in of for s in p.scores),
            of[-1].prompt_tokens, of[-1].tokens,
        )
        for of in pieces
    ]  # fmt: skip


def _steps(
    model: ChatModel, prefix: Prefix, sampling: Sampling, answers: list["_Answer"]
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

    def add(self, token: int, log_p: torch.Tensor | None) -> Piece | None:
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
        return Piece(self.index, new, self.finish, scores, self.prompt_tokens, len(self.ids))

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
