"""Scored and constrained answers of three families against plain forward passes."""

import itertools

import numpy as np
import pytest
import torch

from addressvlm.answers.calibration import softmax
from addressvlm.answers.constrained_decoding import beam_decode
from addressvlm.answers.sequence_scorer import Pruning, SequenceScorer
from addressvlm.answers.trie import Trie
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import user_turn
from tests.support.families import localizer_of, naive_log_likelihood, picture

ADDRESSES = [
    Address("Mill Street", "Harbour"),
    Address("Mill Street", "Old Town"),
    Address("Mill Street North", "Old Town"),
    Address("Oak Avenue", "Harbour"),
    Address("Straße des 17. Juni", "Tiergarten"),
    Address("京都通り", "中京区"),
]
TEXTS = [address.text() for address in ADDRESSES]
FORMATS = [TEXTS, sorted({a.street for a in ADDRESSES}), sorted({a.district for a in ADDRESSES}), ["Yes", "No"], ["Yes"]]
IMAGES = [picture(1), picture(2, (64, 64)), picture(3, (90, 40))]
QUESTION = "Where is this?"


@pytest.fixture(scope="module", params=["llava", "fastvlm", "qwen"])
def localizer(request, tmp_path_factory):
    return localizer_of(request.param, tmp_path_factory.mktemp("model"), Gazetteer(ADDRESSES))


def read(localizer, images=IMAGES):
    prompt = localizer.prompt([user_turn(QUESTION)])
    return localizer.prefill(localizer.inputs([prompt] * len(images), [[image] for image in images]))


@pytest.mark.parametrize("texts", FORMATS)
def test_scores_are_the_log_likelihoods_of_each_answer(localizer, texts):
    trie = localizer.trie(texts)
    result = SequenceScorer(localizer, trie).score(read(localizer))
    naive = torch.tensor([[naive_log_likelihood(localizer, i, QUESTION, text) for text in texts] for i in IMAGES])
    assert torch.allclose(result, naive.double(), rtol=1e-5, atol=1e-4)
    assert torch.allclose(SequenceScorer(localizer, trie, as_batch=True).score(read(localizer)), result, rtol=1e-5, atol=1e-4)


def test_the_tree_equals_one_answer_after_another(localizer, monkeypatch):
    weight = localizer.model.get_output_embeddings().weight
    with torch.no_grad():
        weight.div_(20)  # ordinary logits, so that an absolute bound says something
    try:
        trie, prefix = localizer.trie(TEXTS), read(localizer)
        together = SequenceScorer(localizer, trie).score(prefix)
        apart = torch.cat([SequenceScorer(localizer, localizer.trie([t]), as_batch=True).score(prefix) for t in TEXTS], dim=1)
        assert (together - apart).abs().max() < 1e-5
        monkeypatch.setattr("addressvlm.answers.sequence_scorer.NODES_AT_ONCE", {"eager": 9})
        assert (SequenceScorer(localizer, trie).score(prefix) - together).abs().max() < 1e-5
        monkeypatch.setattr("addressvlm.answers.sequence_scorer.LOGITS_AT_ONCE", 6)  # two nodes of each photo
        assert (SequenceScorer(localizer, trie).score(prefix) - together).abs().max() < 1e-5
        monkeypatch.setattr("addressvlm.answers.sequence_scorer.TOKENS_AT_ONCE", 2 * prefix.mask.shape[1])
        assert (SequenceScorer(localizer, trie, as_batch=True).score(prefix) - together).abs().max() < 1e-5
    finally:
        with torch.no_grad():
            weight.mul_(20)


def test_attention_that_takes_no_mask_scores_beside(localizer, monkeypatch):
    trie, prefix = localizer.trie(TEXTS), read(localizer)
    expected = SequenceScorer(localizer, trie).score(prefix)
    monkeypatch.setattr(
        "addressvlm.answers.sequence_scorer.keeps_all_tokens", lambda cache, length: length < prefix.mask.shape[1] + len(trie)
    )
    monkeypatch.setattr(SequenceScorer, "_feed", None)
    assert torch.allclose(SequenceScorer(localizer, trie).score(prefix), expected, atol=1e-3)


@torch.inference_mode()
def greedy(localizer, image, trie):
    """The answer that a model gives which may only choose among the children of the node where it is, token by token."""
    inputs = localizer.inputs([localizer.prompt([user_turn(QUESTION)])], [[image]])
    node, passes, answer = 0, 0, localizer.prompt([user_turn(QUESTION)])
    while children := trie.children(node):
        logits = localizer.model(**inputs).logits[0, -1]
        passes += len(children) > 1
        node = max(children, key=lambda child: float(logits[trie.tokens[child]]))
        inputs = localizer.inputs([answer + localizer.tokenizer.decode(trie.path(node))], [[image]])
        assert inputs["input_ids"][0, -1] == trie.tokens[node]
    return trie.sequence_at(node), max(passes, 1)


def test_greedy_takes_the_best_way_at_each_fork_and_skips_the_rest(localizer):
    texts = ["Mill Street, Harbour", "Mill Street, Old Town", "Oak Avenue, Harbour", "Oak Avenue, Old Town"]
    trie = localizer.trie(texts)
    result = localizer.answer_from(IMAGES, [QUESTION] * 3, [trie] * 3)
    assert [(d.index, d.passes) for d in result] == [greedy(localizer, image, trie) for image in IMAGES]
    assert all(d.passes == 2 < len(localizer.answer_tokens([user_turn(QUESTION)], texts[d.index])) for d in result)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("texts", [TEXTS[:2], ["Mill Street, Harbour", "Mill Street North, Harbour", "Mill Street, Old Town"]])
def test_answers_that_begin_alike_part_after_their_beginning(localizer, texts, beams):
    trie = localizer.trie(texts)
    assert trie.forced(0)
    sequences = [localizer.answer_tokens([user_turn("")], text) for text in texts]
    looked_ahead = localizer.answer_from(IMAGES, [QUESTION] * 3, [trie] * 3, beams)
    followed = beam_decode(localizer, read(localizer), [trie] * 3, beams)
    for image, *result in zip(IMAGES, looked_ahead, followed, strict=True):
        expected = [decided(localizer, image, trie, sequence) for sequence in sequences]
        best = greedy(localizer, image, trie)[0] if beams == 1 else max(range(len(texts)), key=expected.__getitem__)
        assert [d.index for d in result] == [best, best]
        assert [d.log_p for d in result] == pytest.approx([expected[best]] * 2, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("ahead", [0, 2, 32])
def test_a_look_ahead_changes_nothing_but_the_passes(localizer, monkeypatch, ahead):
    monkeypatch.setattr("addressvlm.answers.constrained_decoding.LOOKAHEAD", ahead)
    tries = [localizer.trie(texts) for texts in (TEXTS, FORMATS[1], ["Yes"], TEXTS[:2])]
    images = [*IMAGES, IMAGES[0]]
    result = localizer.answer_from(images, [QUESTION] * 4, tries)
    followed = beam_decode(localizer, read(localizer, images), tries)
    assert [d.index for d in result] == [d.index for d in followed]
    assert [d.log_p for d in result] == pytest.approx([d.log_p for d in followed], rel=1e-3, abs=1e-3)
    assert all(d.passes <= f.passes for d, f in zip(result, followed, strict=True))
    assert ahead < 32 or max(d.passes for d in result) <= 2
    assert result[2].passes == 1


def test_each_question_has_its_own_answers(localizer):
    choices = [["Yes", "No"], ["Mill Street", "Oak Avenue", "Mill Street North"], ["Harbour"]]
    questions = ["Is it on Mill Street?", "Which street?", "Which district is it?"]
    tries = [localizer.trie(c) for c in choices]
    together = localizer.answer_from(IMAGES, questions, tries, beams=2)
    alone = [localizer.answer_from([i], [q], [t], beams=2)[0] for i, q, t in zip(IMAGES, questions, tries, strict=True)]
    assert [d.index for d in together] == [d.index for d in alone]
    assert [d.log_p for d in together] == pytest.approx([d.log_p for d in alone], rel=1e-3)
    assert together[2].index == 0
    assert localizer.answer_from([], [], []) == []


@torch.inference_mode()
def decided(localizer, image, trie, sequence):
    """ln p of those tokens of a sequence at which answers part, from one plain pass."""
    inputs = localizer.inputs([localizer.prompt([user_turn(QUESTION)]) + localizer.tokenizer.decode(sequence)], [[image]])
    log_p = torch.log_softmax(localizer.model(**inputs).logits[0].float(), dim=-1)[-len(sequence) - 1 : -1]
    node, total = 0, 0.0
    for place, token in enumerate(sequence):
        children = trie.children(node)
        node = next(child for child in children if trie.tokens[child] == token)
        total += float(log_p[place, token]) * (len(children) > 1)
    return total


def test_questions_about_one_image_share_it(localizer):
    questions = [QUESTION, "Yes?", "Which street of the old town is this one here?", "No?"] * 2
    trie, images = localizer.trie(TEXTS), [IMAGES[0], IMAGES[1]] * 4
    together = localizer.answer_from(images, questions, [trie] * 8)
    alone = [localizer.answer_from([i], [q], [trie])[0] for i, q in zip(images, questions, strict=True)]
    assert [d.index for d in together] == [d.index for d in alone]
    assert [d.log_p for d in together] == pytest.approx([d.log_p for d in alone], rel=1e-3)


def test_enough_beams_find_the_best_decisions(localizer):
    letters = [localizer.tokenizer.convert_tokens_to_ids(letter) for letter in "QX"]
    sequences = [[*way, localizer.tokenizer.eos_token_id] for n in (1, 2, 3) for way in itertools.product(letters, repeat=n)]
    trie = Trie.build(sequences)
    result = localizer.answer_from(IMAGES, [QUESTION] * 3, [trie] * 3, beams=len(sequences))
    for image, decoded in zip(IMAGES, result, strict=True):
        expected = [decided(localizer, image, trie, sequence) for sequence in sequences]
        assert decoded.log_p == pytest.approx(max(expected), rel=1e-3, abs=1e-3)
        assert expected[decoded.index] == pytest.approx(max(expected), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("allowed", [slice(None), slice(3, 20), slice(30, 31)])
def test_what_is_not_scored_has_less_probability_than_the_bound(localizer, monkeypatch, temperature, allowed):
    monkeypatch.setattr("addressvlm.answers.sequence_scorer.NODES_AT_ONCE", {"eager": 12})
    letters = "QXYZ"
    trie = localizer.trie([a + b + c for a, b, c in itertools.product(letters, repeat=3)])
    scorer, state = SequenceScorer(localizer, trie), read(localizer)
    chunks = len(scorer._plan(4)) - 1
    weights = np.full((3, 64), -np.inf)
    weights[:, allowed] = np.random.default_rng(0).normal(size=weights[:, allowed].shape)
    exact = scorer.score(state).numpy() / temperature + weights
    fed, feed = [], SequenceScorer._feed
    monkeypatch.setattr(SequenceScorer, "_feed", lambda self, *args: fed.append(1) or feed(self, *args))
    for error in (1e-6, 1e-9, 1e-2, 0.3):
        fed.clear()
        pruning = Pruning(temperature, weights, *([error] if error != 1e-6 else []))  # which is the default
        pruned = scorer.score(state, pruning).numpy() / temperature + weights
        difference = np.abs(softmax(pruned) - softmax(exact)).sum(axis=1) / 2
        assert (difference <= error + 1e-6).all()
        assert np.isfinite(pruned).sum() == np.isfinite(exact).sum()
    assert len(fed) - 1 < chunks
