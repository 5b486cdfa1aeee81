"""Generation that can only say an answer of the trie: the model decides where answers part, the rest is not decoded.

After each decision the tokens that must follow are fed together with it, in one forward pass. An answer costs as many
passes as there are forks on its way, the prompt's own pass included, and one more where all answers begin alike.
`greedy.py` looks further ahead where it can.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from addressvlm.answers.chat_model import ChatModel, PrefillCache, additive_mask, fork_cache
from addressvlm.answers.trie import ROOT, Trie


@dataclass(frozen=True)
class DecodedAnswer:
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
class _Beam:
    """How far one hypothesis has come: a row of the cache, and tokens that are not in it yet."""

    prompt: int
    row: int
    node: int
    log_p: float
    passes: int
    waiting: list[int] = field(default_factory=list)


@torch.inference_mode()
def beam_decode(model: ChatModel, prefix: PrefillCache, tries: Sequence[Trie], beams: int = 1) -> list[DecodedAnswer]:
    """The answer to each prompt, from the trie at the same position; greedy, or the best that `beams` hypotheses find."""
    done: list[list[tuple[_Beam, int]]] = [[] for _ in tries]
    ways = [_Beam(i, i, ROOT, 0.0, 1) for i in range(len(tries))]
    logits, cache, mask = prefix.logits, prefix.cache, prefix.mask
    while ways:
        ways = _best_beams(tries, ways, torch.log_softmax(logits.float(), dim=-1), done, beams)
        if ways:
            chosen = torch.tensor([way.row for way in ways], device=mask.device)
            cache, mask = fork_cache(cache, rows=chosen), mask[chosen]
            after = prefix.position[[way.prompt for way in ways]] + torch.tensor(
                [int(tries[way.prompt].depths[way.node]) for way in ways], device=mask.device
            )
            logits, mask = _feed_beams(model, cache, mask, [way.waiting for way in ways], after)
            for row, way in enumerate(ways):
                way.row, way.passes = row, way.passes + 1
    best = [max(found, key=lambda pair: pair[0].log_p) for found in done]
    return [DecodedAnswer(tries[i].sequence_at(end), way.log_p, way.passes) for i, (way, end) in enumerate(best)]


def _best_beams(
    tries: Sequence[Trie], ways: list[_Beam], log_p: torch.Tensor, done: list[list[tuple[_Beam, int]]], beams: int
) -> list[_Beam]:
    """All ways on from these, the best `beams` a prompt; those that reach an end go to `done`, with it."""
    found: list[list[tuple[_Beam, int]]] = [[] for _ in tries]
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
                (_Beam(way.prompt, way.row, run[-1], score, way.passes, trie.tokens[run].tolist()), run[-1])
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


def _feed_beams(
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


AHEAD = 32  # nodes below a fork that are fed together with it
NODES_AT_ONCE = 1024  # over all prompts; bounds the memory for logits


@dataclass
class _GreedyPath:
    """How far an answer has come: its row of the cache, the last node in it, the node where it is."""

    prompt: int
    row: int
    fed: int
    node: int
    log_p: float
    passes: int


@torch.inference_mode()
def greedy_decode(model: ChatModel, prefix: PrefillCache, tries: Sequence[Trie]) -> list[DecodedAnswer]:
    """The answer to each prompt, from the trie at the same position."""
    ahead = min(AHEAD, NODES_AT_ONCE // max(len(tries), 1))
    ways = [_GreedyPath(i, i, ROOT, ROOT, 0.0, 1) for i in range(len(tries))]
    for way in ways:
        _follow_trie(way, tries[way.prompt], {ROOT: prefix.logits[way.row]})
    cache, mask, left = prefix.cache, prefix.mask, ways
    while left := [way for way in left if tries[way.prompt].children(way.node)]:
        rows = torch.tensor([way.row for way in left], device=mask.device)
        mask, cache = mask[rows], fork_cache(cache, rows=rows)
        given = [_nodes_ahead(tries[way.prompt], way, ahead) for way in left]
        logits, mask = _feed_paths(model, cache, mask, prefix, left, [tries[way.prompt] for way in left], given)
        for row, (way, nodes) in enumerate(zip(left, given, strict=True)):
            way.row, way.passes, way.fed = row, way.passes + 1, way.node
            _follow_trie(way, tries[way.prompt], {node: logits[row, at] for at, node in enumerate(nodes)})
    return [DecodedAnswer(tries[way.prompt].sequence_at(way.node), way.log_p, way.passes) for way in ways]


def _follow_trie(way: _GreedyPath, trie: Trie, logits: Mapping[int, torch.Tensor]) -> None:
    """Go down as far as it is decided: past what must follow, and at forks whose logits there are."""
    while children := trie.children(way.node):
        if len(children) == 1:
            way.node = children[0]
        elif way.node in logits:
            log_p = torch.log_softmax(logits[way.node].float(), dim=-1)[trie.tokens[children]]
            best = int(log_p.argmax())
            way.node, way.log_p = children[best], way.log_p + float(log_p[best])
        else:
            return


def _nodes_ahead(trie: Trie, way: _GreedyPath, ahead: int) -> list[int]:
    """The nodes to feed: from what is in the cache to the fork, and if they are few all inner ones below it."""
    chain, node = [], way.node
    while node != way.fed:
        chain.append(node)
        node = int(trie.parents[node])
    below = [n for n in range(way.node + 1, int(trie.stops[way.node])) if trie.stops[n] > n + 1]
    return chain[::-1] + (below if len(below) <= ahead else [])


def _feed_paths(
    model: ChatModel, cache: object, mask: torch.Tensor, prefix: PrefillCache, ways: Sequence[_GreedyPath], tries: Sequence[Trie],
    given: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Logits after each node (rows, nodes, vocabulary), and the mask of the grown cache; padded on the right."""
    rows, most = len(given), max(map(len, given))
    tokens, depths = torch.zeros((2, rows, most), dtype=torch.long)
    sees = torch.eye(most, dtype=torch.bool).repeat(rows, 1, 1)
    for row, (trie, nodes) in enumerate(zip(tries, given, strict=True)):
        tokens[row, : len(nodes)] = torch.from_numpy(trie.tokens[nodes])
        depths[row, : len(nodes)] = torch.from_numpy(trie.depths[nodes])
        place = {node: at for at, node in enumerate(nodes)}
        for node, at in place.items():
            before = place.get(int(trie.parents[node]))
            if before is not None:
                sees[row, at] |= sees[row, before]
    device = mask.device
    earlier = mask.bool()[:, None].expand(-1, most, -1)
    position = prefix.position[[way.prompt for way in ways]]
    fed = model.model(
        input_ids=tokens.to(device),
        attention_mask=additive_mask(torch.cat([earlier, sees.to(device)], dim=2), model.model.dtype),
        position_ids=position[:, None] + depths.to(device) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    real = torch.tensor([[at < len(nodes) for at in range(most)] for nodes in given], device=device)
    return fed.logits, torch.cat([mask, real.to(mask)], dim=1)
