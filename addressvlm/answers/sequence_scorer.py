"""Exact probabilities of all sequences in a trie; tokens that they share go through the model once.

All nodes of a chunk of the trie are fed in one pass; a mask lets each attend to the prompt and to the nodes on its own path.
Families that forget early tokens, or attend in another way, score the sequences as a batch instead.
"""

from typing import Any

import numpy as np
import torch

from addressvlm.answers.chat_model import ChatModel, PrefillCache, additive_mask, fork_cache, keeps_all_tokens
from addressvlm.answers.trie import ROOT, Chunk, Trie

NODES_AT_ONCE = 512  # tokens of a pass, over all photos; bounds the memory for logits
TOKENS_AT_ONCE = 16_384  # cached prompt tokens over all sequences of a batch


class SequenceScorer:
    """Scores the sequences of one trie; `as_batch` does it as a batch, slower, whatever the model's family."""

    def __init__(self, model: ChatModel, trie: Trie, as_batch: bool = False) -> None:
        self.model, self.trie = model, trie
        self.as_batch = as_batch or not model.takes_4d_masks
        self._children = [trie.children(node) for node in range(len(trie))]
        self._chunks: dict[int, list[Chunk]] = {}  # largest number of nodes -> the trie in chunks

    def score(self, prefill: PrefillCache) -> torch.Tensor:
        """ln p(sequence | prompt) of each sequence of the trie, its end included, float64 (prompts, sequences) on the CPU."""
        prompts, length = prefill.mask.shape
        if self.as_batch or not keeps_all_tokens(prefill.cache, length + len(self.trie)):
            return torch.stack([self._score_as_batch(prefill.rows([i])) for i in range(prompts)])
        log_p = torch.zeros(prompts, len(self.trie), dtype=torch.float64)
        self._set_children(log_p, [ROOT], prefill.logits[:, None])
        max_nodes = max(1, NODES_AT_ONCE // prompts)
        if max_nodes not in self._chunks:
            self._chunks[max_nodes] = list(self.trie.chunks(max_nodes))
        for chunk in self._chunks[max_nodes]:
            if len(chunk.nodes):
                self._set_children(log_p, chunk.nodes.tolist(), self._logits(prefill, chunk))
        for depth in range(2, int(self.trie.depths.max()) + 1):
            level = np.flatnonzero(self.trie.depths == depth)
            log_p[:, level] += log_p[:, self.trie.parents[level]]
        return log_p[:, self.trie.ends]

    @torch.inference_mode()
    def _logits(self, prefill: PrefillCache, chunk: Chunk) -> torch.Tensor:
        """Logits after each node of a chunk, (prompts, nodes, vocabulary)."""
        rows, nodes, device = len(prefill.mask), len(chunk.nodes), prefill.mask.device
        paths = torch.from_numpy(self.trie.path_mask(chunk.nodes)).to(device)
        allowed = torch.cat([prefill.mask.bool()[:, None].expand(-1, nodes, -1), paths.expand(rows, -1, -1)], dim=2)
        depths = torch.from_numpy(self.trie.depths[chunk.nodes]).to(device)
        return self.model.model(
            input_ids=torch.from_numpy(self.trie.tokens[chunk.nodes]).to(device).expand(rows, -1),
            attention_mask=additive_mask(allowed, self.model.model.dtype),
            position_ids=prefill.position[:, None] + depths - 1,
            past_key_values=fork_cache(prefill.cache),
            use_cache=True,
        ).logits

    def _set_children(self, log_p: torch.Tensor, nodes: list[int], logits: torch.Tensor) -> None:
        """Write ln p of the nodes' children into `log_p`, from the logits after the nodes (prompts, nodes, vocabulary)."""
        pairs = [(index, child) for index, node in enumerate(nodes) for child in self._children[node]]
        parents = torch.tensor([index for index, _ in pairs], device=logits.device)
        children = [child for _, child in pairs]
        tokens = torch.from_numpy(self.trie.tokens[children]).to(logits.device)
        logits = logits.float()
        total = torch.logsumexp(logits, dim=2)
        log_p[:, children] = (logits[:, parents, tokens] - total[:, parents]).double().cpu()

    @torch.inference_mode()
    def _score_as_batch(self, prefill: PrefillCache) -> torch.Tensor:
        """The same for one prompt, (sequences,): batches of sequences, each with a copy of the prompt's cache."""
        sequences, device = [self.trie.path(end) for end in self.trie.ends.tolist()], prefill.mask.device
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
                rest = self.model.model(
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
