"""Exact probabilities of all sequences in a trie: what they share goes through the model once.

All nodes of a part of the trie are fed in one pass; a mask lets each see the prompt and the nodes before it on its own way
only. Families that forget early tokens, or attend in another way, score one answer beside the other instead.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from addressvlm.answers.chat_model import ChatModel, PrefillCache, additive_mask, cache_grew, fork_cache
from addressvlm.answers.trie import ROOT, Part, Trie

NODES_AT_ONCE = 512  # tokens of a pass, over all photos; bounds the memory for logits
TOKENS_AT_ONCE = 16_384  # cached prompt tokens over all answers scored side by side


class SequenceScorer:
    """Scores the answers of one trie.

    Attributes:
        beside: score one answer beside the other, whatever the model's family; slower.
    """

    def __init__(self, model: ChatModel, trie: Trie, beside: bool = False) -> None:
        self.model, self.trie = model, trie
        self.beside = beside or not model.takes_masks

    def score(self, prefix: PrefillCache) -> torch.Tensor:
        """ln p(answer | prompt) of each sequence of the trie, its end included, float64 (prompts, sequences) on the CPU."""
        length = prefix.mask.shape[1]
        if self.beside or not cache_grew(prefix.cache, length + len(self.trie)):
            return torch.stack([self._beside(prefix.row(i)) for i in range(len(prefix.mask))])
        log_p = torch.zeros(len(prefix.mask), len(self.trie), dtype=torch.float64)
        self._put(log_p, [ROOT], prefix.logits[:, None])
        most = max(1, NODES_AT_ONCE // len(prefix.mask))
        for part in self._parts(most):
            if len(part.nodes):
                self._put(log_p, part.nodes.tolist(), self._logits(prefix, part))
        for depth in range(2, int(self.trie.depths.max()) + 1):
            level = np.flatnonzero(self.trie.depths == depth)
            log_p[:, level] += log_p[:, self.trie.parents[level]]
        return log_p[:, self.trie.ends]

    @torch.inference_mode()
    def _logits(self, prefix: PrefillCache, part: Part) -> torch.Tensor:
        """Logits after each node of a part, (prompts, nodes, vocabulary)."""
        rows, nodes, device = len(prefix.mask), len(part.nodes), prefix.mask.device
        ways = _ways(self.trie, part).to(device)
        sees = torch.cat([prefix.mask.bool()[:, None].expand(-1, nodes, -1), ways.expand(rows, -1, -1)], dim=2)
        depths = torch.from_numpy(self.trie.depths[part.nodes]).to(device)
        return self.model.model(
            input_ids=torch.from_numpy(self.trie.tokens[part.nodes]).to(device).expand(rows, -1),
            attention_mask=additive_mask(sees, self.model.model.dtype),
            position_ids=prefix.position[:, None] + depths - 1,
            past_key_values=fork_cache(prefix.cache),
            use_cache=True,
        ).logits

    def _put(self, log_p: torch.Tensor, nodes: list[int], logits: torch.Tensor) -> None:
        """ln p of the tokens right after these nodes into their places, from the logits (prompts, nodes, vocabulary)."""
        children = [(at, child) for at, node in enumerate(nodes) for child in self._children[node]]
        after = torch.tensor([at for at, _ in children], device=logits.device)
        found = [child for _, child in children]
        tokens = torch.from_numpy(self.trie.tokens[found]).to(logits.device)
        logits = logits.float()
        total = torch.logsumexp(logits, dim=2)
        log_p[:, found] = (logits[:, after, tokens] - total[:, after]).double().cpu()

    def _parts(self, most: int) -> list[Part]:
        if most not in self._cut:
            self._cut[most] = list(self.trie.parts(most))
        return self._cut[most]

    @cached_property
    def _cut(self) -> dict[int, list[Part]]:
        return {}

    @cached_property
    def _children(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(len(self.trie))]
        for node in range(1, len(self.trie)):
            found[self.trie.parents[node]].append(node)
        return found

    @torch.inference_mode()
    def _beside(self, prefix: PrefillCache) -> torch.Tensor:
        """The same for one prompt, its answers side by side in batches, each with a copy of the prompt's cache."""
        ways = [self.trie.path(end) for end in self.trie.ends.tolist()]
        at_once = max(1, min(64, TOKENS_AT_ONCE // prefix.mask.shape[1]))
        scores = torch.empty(len(ways), dtype=torch.float64)
        by_length = sorted(range(len(ways)), key=lambda i: len(ways[i]))
        for start in range(0, len(ways), at_once):
            chosen = by_length[start : start + at_once]
            scores[chosen] = self._batch(prefix, [ways[i] for i in chosen])
        return scores

    def _batch(self, prefix: PrefillCache, ways: list[list[int]]) -> torch.Tensor:
        rows, longest = len(ways), max(map(len, ways))  # B, T; logits are (B, T, vocabulary)
        tokens, real = torch.zeros((2, rows, longest), dtype=torch.long, device=prefix.mask.device)
        for row, ids in enumerate(ways):
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = 1
        logits: Any = prefix.logits[:, None].expand(rows, -1, -1)
        if longest > 1:
            rest = self.model.model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([prefix.mask.expand(rows, -1), real[:, :-1]], dim=1),
                position_ids=(prefix.position + torch.arange(longest - 1, device=tokens.device)).expand(rows, -1),
                past_key_values=fork_cache(prefix.cache, rows=torch.zeros(rows, dtype=torch.long, device=tokens.device)),
                use_cache=True,
            )
            logits = torch.cat([logits, rest.logits], dim=1)
        log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[..., None])[..., 0]
        return (log_p.double() * real).sum(dim=1).cpu()


def _ways(trie: Trie, part: Part) -> torch.Tensor:
    """Which nodes of a part lie on the way to each of them, itself included, bool (nodes, nodes)."""
    place = {node: at for at, node in enumerate(part.nodes.tolist())}
    ways = np.eye(len(place), dtype=bool)
    for node, at in place.items():
        parent = int(trie.parents[node])
        if parent != ROOT:
            ways[at] |= ways[place[parent]]
    return torch.from_numpy(ways)
