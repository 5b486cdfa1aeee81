"""Generation that can only say an answer of the trie: the model decides where answers part, the rest is not decoded.

After each decision the tokens that must follow are fed together with it, in one forward pass. An answer costs as many
passes as there are forks on its way, the prompt's own pass included, and one more where all answers begin alike.
`greedy.py` looks further ahead where it can.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from addressvlm.answers.model import ChatModel, Prefix, fork
from addressvlm.answers.trie import ROOT, Trie


@dataclass(frozen=True)
class Decoded:
    """An answer of a trie.

    Attributes:
        number: of the sequence.
        log_p: of the tokens that were decided on, each over the whole vocabulary.
        passes: forward passes that it took, the prompt's included.
    """

    number: int
    log_p: float
    passes: int


@dataclass
class _Way:
    """How far one hypothesis has come: a row of the cache, and tokens that are not in it yet."""

    prompt: int
    row: int
    node: int
    log_p: float
    passes: int
    waiting: list[int] = field(default_factory=list)


@torch.inference_mode()
def decode(model: ChatModel, prefix: Prefix, tries: Sequence[Trie], beams: int = 1) -> list[Decoded]:
    """The answer to each prompt, from the trie at the same position; greedy, or the best that `beams` hypotheses find."""
    done: list[list[tuple[_Way, int]]] = [[] for _ in tries]
    ways = [_Way(i, i, ROOT, 0.0, 1) for i in range(len(tries))]
    logits, cache, mask = prefix.logits, prefix.cache, prefix.mask
    while ways:
        ways = _kept(tries, ways, torch.log_softmax(logits.float(), dim=-1), done, beams)
        if ways:
            chosen = torch.tensor([way.row for way in ways], device=mask.device)
            cache, mask = fork(cache, rows=chosen), mask[chosen]
            after = prefix.position[[way.prompt for way in ways]] + torch.tensor(
                [int(tries[way.prompt].depths[way.node]) for way in ways], device=mask.device
            )
            logits, mask = _feed(model, cache, mask, [way.waiting for way in ways], after)
            for row, way in enumerate(ways):
                way.row, way.passes = row, way.passes + 1
    best = [max(found, key=lambda pair: pair[0].log_p) for found in done]
    return [Decoded(tries[i].sequence_at(end), way.log_p, way.passes) for i, (way, end) in enumerate(best)]


def _kept(
    tries: Sequence[Trie], ways: list[_Way], log_p: torch.Tensor, done: list[list[tuple[_Way, int]]], beams: int
) -> list[_Way]:
    """All ways on from these, the best `beams` a prompt; those that reach an end go to `done`, with it."""
    found: list[list[tuple[_Way, int]]] = [[] for _ in tries]
    for way in ways:
        trie = tries[way.prompt]
        forced = trie.forced(way.node)
        fork_at = forced[-1] if forced else way.node
        if forced and trie.children(fork_at):  # the fork's logits come after the tokens that all answers begin with
            found[way.prompt].append((replace(way, node=fork_at, waiting=trie.tokens[forced].tolist()), fork_at))
            continue
        for child in trie.children(fork_at):
            score = way.log_p + float(log_p[way.row, trie.tokens[child]])
            run = [child, *trie.forced(child)]
            found[way.prompt].append(
                (_Way(way.prompt, way.row, run[-1], score, way.passes, trie.tokens[run].tolist()), run[-1])
            )
        if not trie.children(fork_at):
            found[way.prompt].append((way, fork_at))
    kept = []
    for prompt, here in enumerate(found):
        if not here:
            continue
        here += done[prompt]
        here.sort(key=lambda pair: -pair[0].log_p)
        ended = [pair for pair in here[:beams] if not tries[prompt].children(pair[1])]
        done[prompt] = ended
        kept += [way for way, node in here[:beams] if tries[prompt].children(node)]
    return kept


def _feed(
    model: ChatModel, cache: object, mask: torch.Tensor, runs: Sequence[Sequence[int]], after: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after each run (rows, vocabulary), and the mask of the cache that has grown by the runs, padded on the left.

    `after` is the position that follows each run, (rows,).
    """
    longest = max(map(len, runs))
    tokens = torch.zeros(len(runs), longest, dtype=torch.long)
    real = torch.zeros_like(tokens)
    for row, run in enumerate(runs):
        tokens[row, longest - len(run) :] = torch.tensor(run)
        real[row, longest - len(run) :] = 1
    grown = torch.cat([mask, real.to(mask)], dim=1)
    fed = model.model(
        input_ids=tokens.to(mask.device),
        attention_mask=grown,
        position_ids=after[:, None] - torch.arange(longest, 0, -1, device=mask.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return fed.logits[:, -1], grown
