"""The answers that a city allows, as a tree of tokens in flat arrays.

Every answer is a sequence of tokens that ends with one of the model's end tokens, so that an address which begins another
one (`Mill Street` and `Mill Street North`) parts from it at its end. Nodes are numbered so that what lies below a node
follows it directly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from addressvlm.errors import InputError

ROOT = 0


class Part(NamedTuple):
    """Some of the answers with all that they share.

    Attributes:
        nodes: the inner nodes of their paths, in order, the root left out.
        ends: their last nodes.
    """

    nodes: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Trie:
    """A tree of token sequences; node 0 is the root, before any token.

    Attributes:
        tokens: token of each node, int64 (nodes,); -1 at the root.
        parents: node before it, int64 (nodes,); -1 at the root.
        depths: how many tokens lead to it, int64 (nodes,).
        stops: one more than the last node below each node, int64 (nodes,).
        ends: last node of each sequence given, int64 (sequences,); equal sequences share theirs.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    stops: np.ndarray
    ends: np.ndarray

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> "Trie":
        """The tree of these sequences.

        Raises:
            InputError: there are none.
            ValueError: one is empty, or is the beginning of another: it has no end of its own.
        """
        if not sequences:
            raise InputError("there is no answer to choose from: give a gazetteer with addresses, or at least one option.")
        ordered = sorted((tuple(sequence), number) for number, sequence in enumerate(sequences))
        tokens, parents, depths, ends = [-1], [-1], [0], np.empty(len(sequences), dtype=np.int64)
        path, before = [ROOT], tuple[int, ...]()
        for sequence, number in ordered:
            shared = next((i for i, (a, b) in enumerate(zip(before, sequence, strict=False)) if a != b), len(before))
            if not sequence or (before and sequence != before and shared == len(before)):
                raise ValueError(f"{list(before)} has no end of its own before {list(sequence)}: end every sequence alike.")
            del path[shared + 1 :]
            for token in sequence[shared:]:
                tokens.append(token)
                parents.append(path[-1])
                depths.append(len(path))
                path.append(len(tokens) - 1)
            ends[number] = path[-1]
            before = sequence
        stops = np.arange(1, len(tokens) + 1)
        for node in range(len(tokens) - 1, 0, -1):
            stops[parents[node]] = max(stops[parents[node]], stops[node])
        return cls(np.array(tokens), np.array(parents), np.array(depths), stops, ends)

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """The nodes right after a node, in order of their tokens; none at the end of an answer."""
        found, child = [], node + 1
        while child < self.stops[node]:
            found.append(child)
            child = int(self.stops[child])
        return found

    def forced(self, node: int) -> list[int]:
        """The nodes that must follow, up to the next fork or the end."""
        run: list[int] = []
        following = self.children(node)
        while len(following) == 1:
            run += following
            following = self.children(run[-1])
        return run

    def beginnings(self) -> "Trie":
        """The tree of as much of each sequence as tells it from all others: what must follow by itself is left out."""
        told_apart = []
        for end in self.ends.tolist():
            while self.parents[end] != ROOT and len(self.children(int(self.parents[end]))) == 1:
                end = int(self.parents[end])
            told_apart.append(self.path(end))
        return Trie.build(told_apart)

    def path(self, node: int) -> list[int]:
        """The tokens from the root to a node."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]

    def sequence_at(self, end: int) -> int:
        """The number of the first sequence that ends at a node."""
        return int(np.flatnonzero(self.ends == end)[0])

    def parts(self, most: int) -> Iterator[Part]:
        """The tree cut into runs of answers of at most `most` inner nodes each (one answer may have more)."""
        leaves = np.unique(self.ends)
        first, nodes = 0, list(self._inner(int(leaves[0])))
        for number, (left, right) in enumerate(pairwise(leaves.tolist()), start=1):
            new = [node for node in self._inner(right) if node > left]
            if len(nodes) + len(new) > most:
                yield Part(np.array(nodes, dtype=np.int64), leaves[first:number])
                first, nodes = number, list(self._inner(right))
            else:
                nodes += new
        yield Part(np.array(nodes, dtype=np.int64), leaves[first:])

    def _inner(self, end: int) -> list[int]:
        """The nodes on the way to an end, without the root and the end."""
        way, node = [], int(self.parents[end])
        while node != ROOT:
            way.append(node)
            node = int(self.parents[node])
        return way[::-1]
