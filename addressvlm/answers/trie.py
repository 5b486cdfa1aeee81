"""The answers that a city allows, as a prefix tree of tokens in flat arrays.

Every answer is a sequence of tokens that ends with one of the model's end tokens, so that an address which is the beginning
of another one (`Mill Street` and `Mill Street North`) differs from it at its end. Nodes are numbered depth first: the nodes
below a node directly follow it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from addressvlm.errors import InputError

ROOT = 0


class Chunk(NamedTuple):
    """Some neighbouring sequences."""

    nodes: np.ndarray  # the inner nodes of their paths, in order, without the root
    ends: np.ndarray  # their last nodes


@dataclass(frozen=True)
class Trie:
    """A tree of token sequences; node 0 is the root, before any token.

    Attributes:
        tokens: token of each node, int64 (nodes,); -1 at the root.
        parents: node before it, int64 (nodes,); -1 at the root.
        depths: how many tokens lead to it, int64 (nodes,).
        stops: one more than the last node below each node, int64 (nodes,).
        ends: last node of each sequence, in the order of `build`, int64 (sequences,); equal sequences share theirs.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    stops: np.ndarray
    ends: np.ndarray

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> "Trie":
        """The trie of these sequences.

        Raises:
            InputError: there are none.
            ValueError: one is empty, or is the beginning of another: it has no end of its own.
        """
        if not sequences:
            raise InputError("there is no answer to choose from: give a gazetteer with addresses, or at least one option.")
        ordered = sorted((tuple(sequence), index) for index, sequence in enumerate(sequences))
        tokens, parents, depths, ends = [-1], [-1], [0], np.empty(len(sequences), dtype=np.int64)
        path, previous = [ROOT], tuple[int, ...]()
        for sequence, index in ordered:
            shared = next((i for i, (a, b) in enumerate(zip(previous, sequence, strict=False)) if a != b), len(previous))
            if not sequence or (previous and sequence != previous and shared == len(previous)):
                raise ValueError(f"{list(previous)} has no end of its own before {list(sequence)}: end all with an end token.")
            del path[shared + 1 :]
            for token in sequence[shared:]:
                tokens.append(token)
                parents.append(path[-1])
                depths.append(len(path))
                path.append(len(tokens) - 1)
            ends[index] = path[-1]
            previous = sequence
        stops = np.arange(1, len(tokens) + 1)
        for node in range(len(tokens) - 1, 0, -1):
            stops[parents[node]] = max(stops[parents[node]], stops[node])
        return cls(np.array(tokens), np.array(parents), np.array(depths), stops, ends)

    def __len__(self) -> int:
        """Number of nodes, the root included."""
        return len(self.tokens)

    def children(self, node: int) -> list[int]:
        """The nodes right after a node, in order of their tokens; none at the end of a sequence."""
        children, child = [], node + 1
        while child < self.stops[node]:
            children.append(child)
            child = int(self.stops[child])
        return children

    def forced(self, node: int) -> list[int]:
        """The nodes that must follow, up to the next fork or the end."""
        forced: list[int] = []
        while len(children := self.children(forced[-1] if forced else node)) == 1:
            forced += children
        return forced

    def unique_prefixes(self) -> "Trie":
        """The trie of the shortest unique prefix of each sequence: forced tokens at its end are left out."""
        prefixes = []
        for end in self.ends.tolist():
            while self.parents[end] != ROOT and len(self.children(int(self.parents[end]))) == 1:
                end = int(self.parents[end])
            prefixes.append(self.path(end))
        return Trie.build(prefixes)

    def path(self, node: int) -> list[int]:
        """The tokens from the root to a node."""
        return self.tokens[self.nodes_to(node)].tolist()

    def nodes_to(self, node: int) -> list[int]:
        """The nodes from the root, which is left out, to a node."""
        nodes = []
        while node > ROOT:
            nodes.append(node)
            node = int(self.parents[node])
        return nodes[::-1]

    def path_mask(self, nodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which of some nodes, parents first, lie on the path to each of them, itself included, bool (nodes, nodes)."""
        index = {int(node): i for i, node in enumerate(nodes)}
        mask = np.eye(len(index), dtype=bool)
        for node, i in index.items():
            parent = index.get(int(self.parents[node]))
            if parent is not None:
                mask[i] |= mask[parent]
        return mask

    def sequence_at(self, end: int) -> int:
        """The index of the first sequence that ends at a node."""
        return int(np.flatnonzero(self.ends == end)[0])

    def chunks(self, max_nodes: int) -> Iterator[Chunk]:
        """All sequences, in chunks of at most `max_nodes` inner nodes each (one sequence may have more)."""
        leaves = np.unique(self.ends)
        first, nodes = 0, self.nodes_to(int(leaves[0]))[:-1]
        for number, (left, right) in enumerate(pairwise(leaves.tolist()), start=1):
            path = self.nodes_to(right)[:-1]
            new = [node for node in path if node > left]
            if len(nodes) + len(new) > max_nodes:
                yield Chunk(np.array(nodes, dtype=np.int64), leaves[first:number])
                first, nodes = number, path
            else:
                nodes += new
        yield Chunk(np.array(nodes, dtype=np.int64), leaves[first:])
