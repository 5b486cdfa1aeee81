"""The tree of a city's answers holds them all and nothing else, whatever their names are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.answers.trie import ROOT, Trie
from addressvlm.tools.toy_base import END, train_tokenizer
from tests.support.tiny import TEXT

TOKENIZER = train_tokenizer(TEXT, 330)
STOP = TOKENIZER.convert_tokens_to_ids(END)
NAMES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=20, unique=True)
TOKENS = st.lists(st.lists(st.integers(0, 4), max_size=6).map(lambda ids: [*ids, 9]), min_size=1, max_size=30)


def spelt(name):
    return [*TOKENIZER(name, add_special_tokens=False)["input_ids"], STOP]


def completions(trie, node=ROOT):
    """All answers, by walking all ways down."""
    following = trie.children(node)
    return [trie.path(node)] if not following else [path for child in following for path in completions(trie, child)]


@given(TOKENS)
@settings(deadline=None)
def test_every_answer_is_in_it_and_nothing_else(sequences):
    trie = Trie.build(sequences)
    assert [trie.path(end) for end in trie.ends.tolist()] == sequences
    paths = [tuple(path) for path in completions(trie)]
    assert len(paths) == len(set(paths))
    assert set(paths) == set(map(tuple, sequences))
    assert all(sequences[trie.sequence_at(end)] == trie.path(end) for end in trie.ends.tolist())


@given(TOKENS)
@settings(deadline=None)
def test_what_answers_share_is_there_once(sequences):
    trie = Trie.build(sequences)
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(trie) == len(beginnings) + 1
    assert {tuple(trie.path(node)) for node in range(1, len(trie))} == beginnings
    for node in range(len(trie)):
        assert [trie.parents[child] for child in trie.children(node)] == [node] * len(trie.children(node))
        run = trie.forced(node)
        assert all(len(trie.children(n)) == 1 for n in [node, *run][:-1])
        assert len(trie.children(run[-1] if run else node)) != 1


@given(TOKENS)
@settings(deadline=None)
def test_beginnings_are_as_long_as_it_takes_to_tell_answers_apart(sequences):
    beginnings = Trie.build(sequences).unique_prefixes()
    for sequence, end in zip(sequences, beginnings.ends.tolist(), strict=True):
        prefix, others = beginnings.path(end), [other for other in sequences if other != sequence]
        assert prefix == sequence[: len(prefix)]
        assert all(other[: len(prefix)] != prefix for other in others)
        assert len(prefix) == 1 or any(other[: len(prefix) - 1] == prefix[:-1] for other in others)


@given(TOKENS, st.integers(1, 12))
@settings(deadline=None)
def test_parts_cover_it(sequences, most):
    trie = Trie.build(sequences)
    parts = list(trie.chunks(most))
    assert np.concatenate([part.ends for part in parts]).tolist() == sorted(set(trie.ends.tolist()))
    for part in parts:
        assert len(part.nodes) <= most or len(part.ends) == 1
        inside = {ROOT, *part.nodes.tolist()}
        assert all(trie.parents[node] in inside for node in [*part.nodes, *part.ends])


@given(NAMES)
@settings(deadline=None, max_examples=30)
def test_names_in_any_script(names):
    trie = Trie.build([spelt(name) for name in names])
    decoded = {TOKENIZER.decode(path[:-1]) for path in completions(trie)}
    assert decoded == set(names)


def test_a_name_that_begins_another_one():
    trie = Trie.build([spelt("Mill"), spelt("Mill Street"), spelt("Mill Street North")])
    assert {TOKENIZER.decode(path[:-1]) for path in completions(trie)} == {"Mill", "Mill Street", "Mill Street North"}
    fork = trie.forced(ROOT)[-1]
    assert STOP in [trie.tokens[child] for child in trie.children(fork)]


def test_equal_sequences_share_their_end():
    trie = Trie.build([[1, 9], [2, 9], [1, 9]])
    assert trie.ends[0] == trie.ends[2] != trie.ends[1]
    assert trie.sequence_at(int(trie.ends[2])) == 0


def test_what_can_be_no_trie():
    with pytest.raises(InputError, match="no answer to choose from"):
        Trie.build([])
    with pytest.raises(ValueError, match="has no end of its own"):
        Trie.build([[1, 2], [1]])
    with pytest.raises(ValueError, match="has no end of its own"):
        Trie.build([[]])


def test_ten_thousand_addresses():
    sequences = [[i % 7, 100 + i % 50, 1000 + i, 5, 6, 9] for i in range(10_000)]
    trie = Trie.build(sequences)
    assert sum(len(part.ends) for part in trie.chunks(256)) == 10_000
    assert trie.tokens.dtype == np.int64
