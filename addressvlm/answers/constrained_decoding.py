"""Constrained decoding: only answers of a trie can be generated. The model decides at forks, forced tokens are not decoded.

Two algorithms give the same answer. `beam_decode` takes one fork at a time: after each decision the tokens that must follow
are fed with it, so an answer costs as many forward passes as there are forks on its path, the prompt's own pass included,
and one more where all answers begin alike. `greedy_decode` also feeds all nodes below a fork if they are few, and so
needs fewer passes; it needs attention that takes a mask of its own for every token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from addressvlm.answers.chat_model import ChatModel, additive_mask
from addressvlm.answers.kv_cache import PrefillCache, fork_cache
from addressvlm.answers.trie import ROOT, Trie

LOOKAHEAD = 32  # nodes below a fork that are fed together with it
NODES_AT_ONCE = 1024  # over all prompts; bounds the memory for logits


@dataclass(frozen=True)
class DecodedAnswer:
    """An answer of a trie.

    Attributes:
        index: of the sequence.
        log_p: of the tokens at forks, each over the whole vocabulary.
        passes: forward passes, the prompt's included.
    """

    index: int
    log_p: float
    passes: int


@dataclass
class _Path:
    """A partial answer."""

    prompt: int
    row: int  # of the cache
    node: int = ROOT
    log_p: float = 0.0
    passes: int = 1
    cached: int = ROOT  # the last node in the cache
    pending: list[int] = field(default_factory=list)  # tokens that are not in the cache yet


@torch.inference_mode()
def beam_decode(model: ChatModel, prefill: PrefillCache, tries: Sequence[Trie], beams: int = 1) -> list[DecodedAnswer]:
    """The answer to each prompt, from the trie at the same position: greedy, or the best of `beams` hypotheses."""
    finished: list[list[_Path]] = [[] for _ in tries]
    active = [_Path(i, i) for i in range(len(tries))]
    state = prefill
    while active:
        log_p = torch.log_softmax(state.logits.float(), dim=-1)
        candidates: list[list[_Path]] = [[] for _ in tries]
        for path in active:
            candidates[path.prompt] += _continuations(path, tries[path.prompt], log_p[path.row])
        active = []
        for prompt, paths in enumerate(candidates):
            if not paths:
                continue
            best = sorted([*paths, *finished[prompt]], key=lambda path: -path.log_p)[:beams]
            finished[prompt] = [path for path in best if not tries[prompt].children(path.node)]
            active += [path for path in best if tries[prompt].children(path.node)]
        if active:
            state = model.extend(state.rows([path.row for path in active]), [path.pending for path in active])
            for row, path in enumerate(active):
                path.row, path.passes = row, path.passes + 1
    best_paths = [max(paths, key=lambda path: path.log_p) for paths in finished]
    return [DecodedAnswer(t.sequence_at(path.node), path.log_p, path.passes) for t, path in zip(tries, best_paths, strict=True)]


def _continuations(path: _Path, trie: Trie, log_p: torch.Tensor) -> list[_Path]:
    """A path after its next decision, by ln p of the next token (vocabulary,)."""
    forced = trie.forced(path.node)
    fork = forced[-1] if forced else path.node
    children = trie.children(fork)
    if not children:
        return [replace(path, node=fork)]
    if forced:  # the fork's logits come after the tokens that all answers begin with
        return [replace(path, node=fork, pending=trie.tokens[forced].tolist())]
    paths = []
    for child in children:
        run = [child, *trie.forced(child)]
        score = path.log_p + float(log_p[trie.tokens[child]])
        paths.append(replace(path, node=run[-1], log_p=score, pending=trie.tokens[run].tolist()))
    return paths


@torch.inference_mode()
def greedy_decode(model: ChatModel, prefill: PrefillCache, tries: Sequence[Trie]) -> list[DecodedAnswer]:
    """The answer to each prompt, from the trie at the same position: the likeliest token at each fork."""
    lookahead = min(LOOKAHEAD, NODES_AT_ONCE // max(len(tries), 1))
    paths = [_Path(i, i) for i in range(len(tries))]
    for path in paths:
        _descend(path, tries[path.prompt], {ROOT: prefill.logits[path.row]})
    cache, mask, active = prefill.cache, prefill.mask, paths
    while active := [path for path in active if tries[path.prompt].children(path.node)]:
        rows = torch.tensor([path.row for path in active], device=mask.device)
        mask, cache = mask[rows], fork_cache(cache, rows=rows)
        nodes = []  # for each path, from the cache to its fork and, where they are few, all inner ones below the fork
        for path in active:
            trie = tries[path.prompt]
            run = trie.nodes_to(path.node)[trie.depths[path.cached] :]
            below = [n for n in range(path.node + 1, int(trie.stops[path.node])) if trie.stops[n] > n + 1]
            nodes.append(run + (below if len(below) <= lookahead else []))
        position = prefill.position[[path.prompt for path in active]]
        logits, mask = _feed_nodes(model, cache, mask, position, [tries[path.prompt] for path in active], nodes)
        for row, (path, row_nodes) in enumerate(zip(active, nodes, strict=True)):
            path.row, path.passes, path.cached = row, path.passes + 1, path.node
            _descend(path, tries[path.prompt], {node: logits[row, i] for i, node in enumerate(row_nodes)})
    return [DecodedAnswer(tries[path.prompt].sequence_at(path.node), path.log_p, path.passes) for path in paths]


def _descend(path: _Path, trie: Trie, logits: Mapping[int, torch.Tensor]) -> None:
    """Go down past forced nodes, and past forks whose logits are known."""
    while children := trie.children(path.node):
        if len(children) == 1:
            path.node = children[0]
        elif path.node in logits:
            log_p = torch.log_softmax(logits[path.node].float(), dim=-1)[trie.tokens[children]]
            best = int(log_p.argmax())
            path.node, path.log_p = children[best], path.log_p + float(log_p[best])
        else:
            return


def _feed_nodes(
    model: ChatModel, cache: object, mask: torch.Tensor, position: torch.Tensor, tries: Sequence[Trie],
    nodes: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Logits after each node (rows, nodes, vocabulary), and the mask of the grown cache, nodes padded on the right.

    `position` is that of the token after each prompt, (rows,).
    """
    rows, longest, device = len(nodes), max(map(len, nodes)), mask.device
    tokens, depths, real = torch.zeros((3, rows, longest), dtype=torch.long)
    allowed = torch.eye(longest, dtype=torch.bool).repeat(rows, 1, 1)
    for row, (trie, row_nodes) in enumerate(zip(tries, nodes, strict=True)):
        n = len(row_nodes)
        tokens[row, :n] = torch.from_numpy(trie.tokens[row_nodes])
        depths[row, :n] = torch.from_numpy(trie.depths[row_nodes])
        allowed[row, :n, :n] = torch.from_numpy(trie.path_mask(row_nodes))
        real[row, :n] = 1
    prompt = mask.bool()[:, None].expand(-1, longest, -1)
    output = model.forward(
        input_ids=tokens.to(device),
        attention_mask=additive_mask(torch.cat([prompt, allowed.to(device)], dim=2), model.model.dtype),
        position_ids=position[:, None] + depths.to(device) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    return output.logits, torch.cat([mask, real.to(mask)], dim=1)
