"""Exact probabilities of all sequences in a trie; tokens that they share go through the model once.

The trie is cut into chunks of neighbouring sequences. What chunks share, their trunk, is fed once; then each chunk is fed in
one pass, in which a mask lets every node attend to the prompt and to the nodes on its own path. Logits are made of a few nodes
at a time, and the children's probabilities stay on the device until all are known. Families that forget early tokens, or
attend in another way, score the sequences as a batch instead.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from addressvlm.answers.chat_model import ChatModel, additive_mask
from addressvlm.answers.kv_cache import PrefillCache, fork_cache, keeps_all_tokens
from addressvlm.answers.trie import ROOT, Trie

NODES_AT_ONCE = {"eager": 512, "sdpa": 4096}  # tokens of a pass, over all photos; attention keeps a row of scores for each
LOGITS_AT_ONCE = 256  # tokens, over all photos, whose logits are in memory
TOKENS_AT_ONCE = 16_384  # cached prompt tokens over all sequences of a batch


@dataclass(frozen=True)
class _Pass:
    """Nodes of a trie that are fed together, as tensors on the model's device.

    Attributes:
        tokens, depths: of the nodes, long (nodes,).
        allowed: whether a node attends to the nodes of the trunk and of this pass, bool (nodes, trunk + nodes).
        parents, children: a pair for each child: its parent's index in this pass, the child's node; long (pairs,).
        entries: the nodes that follow the trunk or the root, int64 (entries,).
        members: the sequences below each of them.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    allowed: torch.Tensor
    parents: torch.Tensor
    children: torch.Tensor
    entries: np.ndarray
    members: list[np.ndarray]


@dataclass(frozen=True)
class Pruning:
    """What of a trie need not be scored: sequences that together have next to no probability.

    Attributes:
        temperature, log_weights: probabilities are those of scores / temperature + log_weights, (prompts, sequences).
        error: the largest share of probability of what is not scored.
    """

    temperature: float
    log_weights: np.ndarray
    error: float = 1e-6


class SequenceScorer:
    """Scores the sequences of one trie; `as_batch` does it as a batch, slower, whatever the model's family."""

    def __init__(self, model: ChatModel, trie: Trie, as_batch: bool = False) -> None:
        self.model, self.trie = model, trie
        self.as_batch = as_batch or not model.takes_4d_masks
        self._tokens = torch.from_numpy(trie.tokens).to(model.device)
        self._children = [trie.children(node) for node in range(len(trie))]
        self._plans: dict[int, list[_Pass]] = {}  # largest number of nodes -> passes, the trunk's first

    def score(self, prefill: PrefillCache, pruning: Pruning | None = None) -> torch.Tensor:
        """ln p(sequence | prompt) of each sequence of the trie, its end included, float64 (prompts, sequences) on the CPU.

        With `pruning`, the likeliest chunks go first, until all others together are below its error; sequences of these share
        the probability of their beginning.
        """
        prompts, length = prefill.mask.shape
        if self.as_batch or not keeps_all_tokens(prefill.cache, length + len(self.trie)):
            return torch.stack([self._score_as_batch(prefill.rows([i])) for i in range(prompts)])
        log_p = torch.zeros(prompts, len(self.trie), device=prefill.mask.device)
        first = torch.tensor(self._children[ROOT], device=log_p.device)
        log_p[:, first] = torch.log_softmax(prefill.logits.float(), dim=-1)[:, self._tokens[first]]
        trunk, *chunks = self._passes(prompts)
        cache = self._feed(prefill, prefill.cache, trunk, log_p)
        if pruning and len(chunks) > 1:
            return self._score_likeliest(prefill, cache, chunks, log_p, pruning)
        for chunk in chunks:
            self._feed(prefill, cache, chunk, log_p)
        return self._path_sums(log_p)[:, self.trie.ends]

    def _path_sums(self, log_p: torch.Tensor) -> torch.Tensor:
        """ln p of the path to each node, float64 (prompts, nodes) on the CPU; below nodes that were not fed that of these."""
        result = log_p.double().cpu()
        for depth in range(2, int(self.trie.depths.max()) + 1):
            level = np.flatnonzero(self.trie.depths == depth)
            result[:, level] += result[:, self.trie.parents[level]]
        return result

    def _score_likeliest(
        self, prefill: PrefillCache, cache: Any, chunks: list[_Pass], log_p: torch.Tensor, pruning: Pruning
    ) -> torch.Tensor:
        paths, temperature, weights = self._path_sums(log_p).numpy(), pruning.temperature, pruning.log_weights
        bounds = np.empty((len(paths), len(chunks)))  # ln of the most that all sequences of a chunk can have together
        for number, chunk in enumerate(chunks):
            most = [
                paths[:, entry] / temperature
                + max(0.0, 1 - 1 / temperature) * math.log(len(members))
                + weights[:, members].max(axis=1)
                for entry, members in zip(chunk.entries.tolist(), chunk.members, strict=True)
            ]
            bounds[:, number] = np.logaddexp.reduce(most, axis=0)
        waiting = np.argsort(-bounds.max(axis=0), kind="stable").tolist()
        later = np.concatenate([chunk_members for chunk in chunks for chunk_members in chunk.members])
        scored = np.setdiff1d(np.arange(len(self.trie.ends)), later)
        while waiting:
            values = paths[:, self.trie.ends[scored]] / temperature + weights[:, scored]
            total = np.logaddexp.reduce(np.concatenate([values, np.full((len(values), 1), -np.inf)], axis=1), axis=1)
            if (np.logaddexp.reduce(bounds[:, waiting], axis=1) <= total + math.log(pruning.error)).all():
                break
            chunk = chunks[waiting.pop(0)]
            self._feed(prefill, cache, chunk, log_p)
            scored = np.concatenate([scored, *chunk.members])
            paths = self._path_sums(log_p).numpy()
        result = paths[:, self.trie.ends]
        for number in waiting:
            for entry, members in zip(chunks[number].entries.tolist(), chunks[number].members, strict=True):
                result[:, members] = paths[:, [entry]] - math.log(len(members))
        return torch.from_numpy(result)

    def can_prune(self, prompts: int) -> bool:
        """Whether the trie takes more than one chunk for so many prompts."""
        return not self.as_batch and len(self._passes(prompts)) > 2

    def _passes(self, prompts: int) -> list[_Pass]:
        """The trunk and the chunks for so many prompts."""
        attention = self.model.model.config.get_text_config()._attn_implementation
        max_nodes = 1 << (max(1, NODES_AT_ONCE[attention] // prompts).bit_length() - 1)  # few sizes, so few plans
        if max_nodes not in self._plans:
            self._plans[max_nodes] = self._plan(max_nodes)
        return self._plans[max_nodes]

    def _plan(self, max_nodes: int) -> list[_Pass]:
        """The passes: the trunk, which may be empty, and chunks of at most `max_nodes` nodes with their part of it."""
        chunks = [chunk.nodes for chunk in self.trie.chunks(max_nodes)]
        nodes, counts = np.unique(np.concatenate(chunks), return_counts=True)
        trunk = nodes[counts > 1]
        passes = [self._pass(trunk, np.array([], dtype=np.int64))]
        passes += [self._pass(np.setdiff1d(chunk, trunk), trunk) for chunk in chunks]
        return [passes[0], *(one for one in passes[1:] if len(one.tokens))]

    def _pass(self, nodes: np.ndarray, trunk: np.ndarray) -> _Pass:
        pairs = [(index, child) for index, node in enumerate(nodes.tolist()) for child in self._children[node]]
        allowed = self.trie.path_mask(np.concatenate([trunk, nodes]))[len(trunk) :]
        parents, children = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        entries = nodes[np.isin(self.trie.parents[nodes], [ROOT, *trunk])] if len(nodes) else nodes
        ends = self.trie.ends
        members = [np.flatnonzero((ends >= node) & (ends < self.trie.stops[node])) for node in entries.tolist()]
        tokens, depths, *rest = (
            torch.from_numpy(np.ascontiguousarray(array)).to(self.model.device)
            for array in (self.trie.tokens[nodes], self.trie.depths[nodes], allowed, parents, children)
        )
        return _Pass(tokens, depths, rest[0], rest[1], rest[2], entries, members)

    @torch.inference_mode()
    def _feed(self, prefill: PrefillCache, cache: Any, nodes: _Pass, log_p: torch.Tensor) -> Any:
        """Write ln p of the nodes' children into `log_p`; the grown cache."""
        rows, count = len(prefill.mask), len(nodes.tokens)
        if not count:
            return cache
        prompt = prefill.mask.bool()[:, None].expand(-1, count, -1)
        allowed = torch.cat([prompt, nodes.allowed.expand(rows, -1, -1)], dim=2)
        hidden, grown = self.model.body(
            input_ids=nodes.tokens.expand(rows, -1),
            attention_mask=additive_mask(allowed, self.model.model.dtype),
            position_ids=prefill.position[:, None] + nodes.depths - 1,
            past_key_values=fork_cache(cache),
            use_cache=True,
        )
        some = max(1, LOGITS_AT_ONCE // rows)
        starts = range(0, count, some)
        pairs = torch.searchsorted(nodes.parents, torch.tensor([*starts, count], device=nodes.parents.device)).tolist()
        for start, first, last in zip(starts, pairs, pairs[1:], strict=False):
            logits = self.model.head(hidden[:, start : start + some])
            parents, children = nodes.parents[first:last] - start, nodes.children[first:last]
            total = torch.logsumexp(logits, dim=2)
            log_p[:, children] = logits[:, parents, self._tokens[children]] - total[:, parents]
        return grown

    @torch.inference_mode()
    def _score_as_batch(self, prefill: PrefillCache) -> torch.Tensor:
        """The same for one prompt, (sequences,): batches of sequences, each with a copy of the prompt's cache."""
        sequences: Sequence[list[int]] = [self.trie.path(end) for end in self.trie.ends.tolist()]
        device = prefill.mask.device
        batch_size = max(1, min(64, TOKENS_AT_ONCE // prefill.mask.shape[1]))
        scores = torch.empty(len(sequences), dtype=torch.float64)
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(sequences), batch_size):
            batch = by_length[start : start + batch_size]
            rows, longest = len(batch), len(sequences[batch[-1]])  # B, T; logits are (B, T, vocabulary)
            tokens, real = torch.zeros((2, rows, longest), dtype=torch.long, device=device)
            for row, i in enumerate(batch):
                tokens[row, : len(sequences[i])] = torch.tensor(sequences[i])
                real[row, : len(sequences[i])] = 1
            logits: Any = prefill.logits[:, None].expand(rows, -1, -1)
            if longest > 1:
                rest = self.model.forward(
                    input_ids=tokens[:, :-1],
                    attention_mask=torch.cat([prefill.mask.expand(rows, -1), real[:, :-1]], dim=1),
                    position_ids=(prefill.position + torch.arange(longest - 1, device=device)).expand(rows, -1),
                    past_key_values=fork_cache(prefill.cache, rows=torch.zeros(rows, dtype=torch.long, device=device)),
                    use_cache=True,
                )
                logits = torch.cat([logits, rest.logits], dim=1)
            log_p = torch.log_softmax(logits.float(), dim=-1).gather(2, tokens[..., None])[..., 0]
            scores[batch] = (log_p.double() * real).sum(dim=1).cpu()
        return scores
