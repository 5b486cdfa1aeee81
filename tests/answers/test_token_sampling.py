"""Free generation from a model that is a table of logits, so that all can be computed by hand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from addressvlm.answers import generate
from addressvlm.answers.chat_model import ChatModel
from addressvlm.answers.kv_cache import PrefillCache
from addressvlm.answers.types import Sampling

LETTERS = ".abcdef"  # the first one ends an answer
END = 0


@dataclass
class Forward:
    """What `ChatModel.model` is: to be called, with a generation config."""

    forward: Callable
    generation_config: SimpleNamespace

    def __call__(self, **kwargs):
        return self.forward(**kwargs)


class Cache:
    """Holds nothing."""

    layers = ()

    def batch_select_indices(self, rows):
        pass


class Table(ChatModel):
    """A model whose next token depends on the last one alone, by logits (letters, letters)."""

    def __init__(self, logits, repetition_penalty=None):
        self.logits, self.fed, self.end_tokens = logits, [], {END}
        self.tokenizer = SimpleNamespace(decode=self.decode)
        self.model, self.folder = Forward(self.table, SimpleNamespace(repetition_penalty=repetition_penalty)), "the table"
        self.adapters, self.adapter = None, ""

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)

    def table(self, input_ids, attention_mask, position_ids, past_key_values, **kwargs):
        self.fed.append((input_ids.tolist(), attention_mask.shape[1], position_ids.tolist()))
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=past_key_values)

    def read(self, last="a"):
        """A prompt of four tokens, the first of them padding, that ends with this letter."""
        mask = torch.tensor([[0, 1, 1, 1]])
        return PrefillCache(Cache(), mask, self.logits[[LETTERS.index(last)]], torch.tensor([3]))


def chain(text):
    """A model that says this text, whatever the temperature; no letter comes twice."""
    logits = torch.full((len(LETTERS), len(LETTERS)), -1000.0)
    for now, following in zip(text, [*text[1:], "."], strict=True):
        logits[LETTERS.index(now), LETTERS.index(following)] = 0.0
    return Table(logits)


def drawing():
    """A model that draws each letter, and the end now and then."""
    return Table(torch.randn((len(LETTERS), len(LETTERS)), generator=torch.Generator().manual_seed(3)))


def pieces(model, **sampling):
    return list(generate.stream_tokens(model, model.read(), Sampling(**sampling)))


def test_tokens_are_fed_one_after_the_other_at_their_positions():
    model = chain("abc")
    result = pieces(model, n=2)
    assert [(p.index, p.text, p.finish, p.prompt_tokens, p.tokens) for p in result] == [
        (0, "b", None, 3, 1), (1, "b", None, 3, 1), (0, "c", None, 3, 2), (1, "c", None, 3, 2),
        (0, "", "stop", 3, 3), (1, "", "stop", 3, 3),
    ]  # fmt: skip
    b, c = (LETTERS.index(letter) for letter in "bc")
    assert model.fed == [([[b], [b]], 4, [[3], [3]]), ([[c], [c]], 5, [[4], [4]])]


@pytest.mark.parametrize(
    ("sampling", "texts", "finish", "tokens"),
    [
        ({}, ["b", "c", "d", "e", "f", ""], "stop", 6),
        ({"max_tokens": 6}, ["b", "c", "d", "e", "f", ""], "stop", 6),
        ({"max_tokens": 5}, ["b", "c", "d", "e", "f"], "length", 5),
        ({"stop": ("e", "cd")}, ["b", ""], "stop", 3),  # the stop that comes first, not the first in the list
        ({"stop": ("cd", "e")}, ["b", ""], "stop", 3),
        ({"stop": ("cx",)}, ["b", "cd", "e", "f", ""], "stop", 6),  # waits until it can be no stop
        ({"stop": ("ffx", "fx")}, ["b", "c", "d", "e", "f"], "stop", 6),  # waits to the end
        ({"stop": ("cx",), "max_tokens": 2}, ["b", "c"], "length", 2),
        ({"stop": ("cde",)}, ["b", ""], "stop", 4),
        ({"stop": ("f",), "max_tokens": 5}, ["b", "c", "d", "e", ""], "stop", 5),
        ({"stop": ("bc", "b")}, [""], "stop", 1),
        ({"stop": ("cd", "bcd", "d")}, [""], "stop", 3),  # of those that end together the one that begins first
    ],
)
def test_where_an_answer_ends(sampling, texts, finish, tokens):
    result = pieces(chain("abcdef"), **sampling)
    assert [p.text for p in result] == texts
    assert [p.finish for p in result] == [*[None] * (len(texts) - 1), finish]
    assert result[-1].tokens == tokens
    (whole,) = generate.complete_chat(chain("abcdef"), chain("abcdef").read(), Sampling(**sampling))
    assert (whole.text, whole.finish, whole.tokens, whole.prompt_tokens) == ("".join(texts), finish, tokens, 3)


def test_a_penalty_of_what_was_said_counts_once_a_letter():
    logits = torch.full((len(LETTERS), len(LETTERS)), -9.0)
    logits[:, [LETTERS.index(letter) for letter in "abc"]] = torch.tensor([2.0, 1.5, 1.2])
    for penalty, expected in ((None, "aaaaa"), (1.0, "aaaaa"), (2.0, "abcaa")):
        model = Table(logits, penalty)
        assert "".join(p.text for p in pieces(model, max_tokens=5)) == expected


def test_each_answer_has_its_own_tokens_ends_and_log_probabilities():
    """Those of the model, whatever the temperature."""
    model, log_p = drawing(), torch.log_softmax(drawing().logits, dim=1)
    result = pieces(model, n=5, temperature=1.7, seed=4, max_tokens=9, logprobs=2)
    lengths = set()
    for index in range(5):
        of = [p for p in result if p.index == index]
        assert [p.finish is None for p in of] == [True] * (len(of) - 1) + [False]
        assert "".join(s.text for p in of for s in p.scores).rstrip(".") == "".join(p.text for p in of)
        last = "a"
        for score in (score for p in of for score in p.scores):
            row = log_p[LETTERS.index(last)]
            assert score.log_p == pytest.approx(float(row[LETTERS.index(score.text)]), abs=1e-5)
            best = row.argsort(descending=True)[:2].tolist()
            assert [text for text, _ in score.top] == [LETTERS[i] for i in best]
            assert [p for _, p in score.top] == pytest.approx([float(row[i]) for i in best], abs=1e-5)
            last = score.text
        lengths.add(of[-1].tokens)
        assert of[-1].finish == ("length" if last != "." else "stop")
    assert len(lengths) > 1  # one that has ended lets the others go on
    assert [s.top for p in pieces(chain("ab"), logprobs=0) for s in p.scores] == [(), ()]
    assert [p.scores for p in pieces(chain("ab"))] == [(), ()]


def test_a_seed_draws_the_same_again_and_leaves_torchs_own_state_alone():
    def texts(**sampling):
        return [c.text for c in generate.complete_chat(drawing(), drawing().read(), Sampling(8, 1.5, n=4, **sampling))]

    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = texts(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert texts(seed=1) == first != texts(seed=2)
    assert texts(seed=0) != texts(seed=1)
    torch.manual_seed(7)
    once = texts()
    assert once != texts()
    torch.manual_seed(7)
    assert texts() == once
    assert len(set(first)) > 1


def test_an_answer_is_greedy_and_whole_unless_something_else_is_asked_for():
    assert Sampling() == Sampling(max_tokens=256, temperature=0.0, top_p=1.0, n=1, stop=(), logprobs=None, seed=None)


def test_seeds_of_64_bits_draw_too():
    def texts(seed):
        return [c.text for c in generate.complete_chat(drawing(), drawing().read(), Sampling(8, 1.5, n=3, seed=seed))]

    seeds = (2**63 - 1, 2**63 - 2, -(2**63), 5)
    assert len({tuple(texts(seed)) for seed in seeds}) == len(seeds)
    assert texts(2**63 - 1) == texts(2**63 - 1)


def test_each_answer_of_a_batch_reports_as_many_alternatives_as_it_asked_for():
    model = drawing()
    samplings = [Sampling(3, logprobs=n) for n in (1, None, 3, 0, 20)]
    states = [(model.read(), [generate.Answer(model, sampling, 3)]) for sampling in samplings]
    counts = [set() for _ in samplings]
    for number, chunk in generate.stream_answers(states):
        counts[number] |= {len(score.top) for score in chunk.scores}
    assert counts == [{1}, set(), {3}, {0}, {len(LETTERS)}]


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 4.0]), st.sampled_from([0.2, 0.6, 1.0])), min_size=2, max_size=7))
def test_each_row_is_drawn_by_its_own_temperature_top_p_and_number(ways):
    generator = torch.Generator().manual_seed(len(ways))
    logits = torch.randn((len(ways), 9), generator=generator) * 3
    draws = torch.rand(len(ways), dtype=torch.float64, generator=generator)
    samplings = [Sampling(temperature=temperature, top_p=top_p) for temperature, top_p in ways]
    alone = [generate.sample_tokens(logits[[i]], samplings[i : i + 1], draws[[i]]).item() for i in range(len(ways))]
    assert generate.sample_tokens(logits, samplings, draws).tolist() == alone


def test_a_state_can_be_continued_from_again():
    """What answers add to the cache is their own."""
    model, state = drawing(), drawing().read()
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)

    def grow(input_ids, attention_mask, position_ids, past_key_values, **kwargs):
        new = torch.zeros(len(input_ids), 1, input_ids.shape[1], 2)
        past_key_values.update(new, new, 0)
        assert past_key_values.get_seq_length() == attention_mask.shape[1]
        return SimpleNamespace(logits=model.logits[input_ids], past_key_values=past_key_values)

    model.model.forward = grow
    answer = generate.Answer(model, Sampling(5), 3)
    chunks = list(generate.stream_answers([(replace(state, cache=cache), [answer])]))
    assert len(answer.ids) > 1
    assert chunks[-1][1].finish
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.5, 0.3, 0.2]),
        (0.5, 1.0, [0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38]),
        (2.0, 1.0, [math.sqrt(p) / sum(map(math.sqrt, (0.5, 0.3, 0.2))) for p in (0.5, 0.3, 0.2)]),
        (1.0, 0.81, [0.5, 0.3, 0.2]),
        (1.0, 0.79, [0.5 / 0.8, 0.3 / 0.8, 0.0]),
        (1.0, 0.51, [0.5 / 0.8, 0.3 / 0.8, 0.0]),
        (1.0, 0.49, [1.0, 0.0, 0.0]),
        (0.5, 0.6, [1.0, 0.0, 0.0]),  # the temperature goes first: 0.66 of the first
        (0.0, 1.0, [1.0, 0.0, 0.0]),
    ],
)
def test_how_often_a_token_is_drawn(temperature, top_p, expected):
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3])).expand(20_000, -1)
    draws = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = generate.sample_tokens(logits, [Sampling(temperature=temperature, top_p=top_p)] * 20_000, draws)
    shares = (torch.bincount(drawn, minlength=3) / 20_000)[[1, 2, 0]]
    assert shares.tolist() == pytest.approx(expected, abs=0.015)
    assert [share > 0 for share in shares.tolist()] == [share > 0 for share in expected]


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6),
    st.floats(0, 1e3),
    st.floats(1e-12, 1),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_a_drawn_token_is_one_that_can_be(logits, temperature, top_p, draw):
    tokens = generate.sample_tokens(
        torch.tensor([logits, logits]), [Sampling(temperature=temperature, top_p=top_p), Sampling()],
        torch.tensor([draw, draw], dtype=torch.float64),
    ).tolist()  # fmt: skip
    best = max(logits)
    assert logits[tokens[1]] == best
    assert 0 <= tokens[0] < len(logits)
    if temperature < generate.GREEDY_BELOW:
        assert logits[tokens[0]] == best
    else:
        assert (best - logits[tokens[0]]) / temperature < 110  # exp(-110) is 0 in float32


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_their_own_answer_with_an_error(wrong):
    model, other = Table(torch.full((len(LETTERS), len(LETTERS)), wrong)), chain("abc")
    with pytest.raises(RuntimeError, match="not finite"):
        pieces(model, temperature=0.5)
    logits = torch.stack([model.logits[0], other.logits[1]])
    drawn = generate.sample_tokens(logits, [Sampling(temperature=1.0)] * 2, torch.zeros(2, dtype=torch.float64))
    assert drawn.tolist() == [generate.UNUSABLE, LETTERS.index("b")]
