"""Greedy generation in a trie with a look ahead: once few answers are left, what is below goes through the model at once.

The result is that of choosing the likeliest token at each fork. An answer mostly costs two passes: the prompt's, after which
the first tokens are decided on, and one over all that can follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from addressvlm.answers.decoding import Decoded
from addressvlm.answers.model import ChatModel, Prefix, additive, fork
from addressvlm.answers.trie import ROOT, Trie

AHEAD = 32  # nodes below a fork that are fed together with it
NODES_AT_ONCE = 1024  # over all prompts; bounds the memory for logits


@dataclass
class _Way:
    """How far an answer has come: its row of the cache, the last node in it, the node where it is."""

    prompt: int
    row: int
    fed: int
    node: int
    log_p: float
    passes: int


@torch.inference_mode()
def decode_greedily(model: ChatModel, prefix: Prefix, tries: Sequence[Trie]) -> list[Decoded]:
    """The answer to each prompt, from the trie at the same position."""
    ahead = min(AHEAD, NODES_AT_ONCE // max(len(tries), 1))
    ways = [_Way(i, i, ROOT, ROOT, 0.0, 1) for i in range(len(tries))]
    for way in ways:
        _walk(way, tries[way.prompt], {ROOT: prefix.logits[way.row]})
    cache, mask, left = prefix.cache, prefix.mask, ways
    while left := [way for way in left if tries[way.prompt].children(way.node)]:
        rows = torch.tensor([way.row for way in left], device=mask.device)
        mask, cache = mask[rows], fork(cache, rows=rows)
        given = [_waiting(tries[way.prompt], way, ahead) for way in left]
        logits, mask = _feed(model, cache, mask, prefix, left, [tries[way.prompt] for way in left], given)
        for row, (way, nodes) in enumerate(zip(left, given, strict=True)):
            way.row, way.passes, way.fed = row, way.passes + 1, way.node
            _walk(way, tries[way.prompt], {node: logits[row, at] for at, node in enumerate(nodes)})
    return [Decoded(tries[way.prompt].sequence_at(way.node), way.log_p, way.passes) for way in ways]


def _walk(way: _Way, trie: Trie, logits: Mapping[int, torch.Tensor]) -> None:
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


def _waiting(trie: Trie, way: _Way, ahead: int) -> list[int]:
    """The nodes to feed: from what is in the cache to the fork, and if they are few all inner ones below it."""
    chain, node = [], way.node
    while node != way.fed:
        chain.append(node)
        node = int(trie.parents[node])
    below = [n for n in range(way.node + 1, int(trie.stops[way.node])) if trie.stops[n] > n + 1]
    return chain[::-1] + (below if len(below) <= ahead else [])


def _feed(
    model: ChatModel, cache: object, mask: torch.Tensor, prefix: Prefix, ways: Sequence[_Way], tries: Sequence[Trie],
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
        attention_mask=additive(torch.cat([earlier, sees.to(device)], dim=2), model.model.dtype),
        position_ids=position[:, None] + depths.to(device) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    real = torch.tensor([[at < len(nodes) for at in range(most)] for nodes in given], device=device)
    return fed.logits, torch.cat([mask, real.to(mask)], dim=1)
