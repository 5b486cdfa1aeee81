"""Chat token by token, and conversations that read their photo once."""

import math

import pytest
import torch

from addressvlm.answers.generate import Answer, AnswerText, Decoder, completion
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Prior, Sampling, user_turn
from tests.support.families import localizer_of, picture

CITY = Gazetteer([Address("Mill Street", "Harbour"), Address("Oak Avenue", "Old Town")])
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def localizer(request, tmp_path_factory):
    made = localizer_of(request.param, tmp_path_factory.mktemp("model"), CITY)
    with torch.no_grad():
        made.model.get_output_embeddings().weight.div_(60)  # so that draws differ
    return made


def pieces(localizer, **sampling):
    return list(localizer.stream(MESSAGES, [picture(1)], Sampling(**sampling)))


def test_pieces_are_the_whole_answer(localizer):
    whole = localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=12))[0]
    result = pieces(localizer, max_tokens=12)
    assert "".join(p.text for p in result).strip() == whole.text
    assert [p.finish for p in result[:-1]] == [None] * (len(result) - 1)
    assert result[-1].finish == whole.finish == ("length" if whole.tokens == 12 else "stop")
    assert result[-1].tokens == whole.tokens
    inputs = localizer.inputs([localizer.prompt(MESSAGES)], [[picture(1)]])
    assert whole.prompt_tokens == int(inputs["attention_mask"].sum())


def test_no_piece_ends_inside_a_character(localizer):
    for seed in range(5):
        result = pieces(localizer, max_tokens=40, temperature=3.0, seed=seed)
        assert all(not p.text.endswith("\ufffd") for p in result[:-1])


def test_a_stop_ends_the_answer_before_it(localizer):
    free = localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=30, temperature=2.0, seed=3))[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    result = pieces(localizer, max_tokens=30, temperature=2.0, seed=3, stop=(stop,))
    text = "".join(p.text for p in result)
    assert text.strip() == free[: free.index(stop)].strip()
    assert result[-1].finish == "stop"
    assert stop not in text


def test_n_answers_are_drawn_apart(localizer):
    sampling = Sampling(max_tokens=12, temperature=1.0, n=3, seed=1)
    first = localizer.chat(MESSAGES, [picture(1)], sampling)
    assert len(first) == 3
    assert first == localizer.chat(MESSAGES, [picture(1)], sampling)
    assert len({c.text for c in first}) > 1
    assert first != localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=12, temperature=1.0, n=3, seed=2))
    greedy = localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=12, n=2))
    assert greedy[0].text == greedy[1].text


def test_a_small_top_p_is_greedy(localizer):
    greedy = localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=8))[0]
    assert localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=8, temperature=2.0, top_p=1e-6))[0].text == greedy.text


def test_log_probabilities(localizer):
    result = localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=6, logprobs=3))[0]
    assert len(result.scores) == result.tokens
    for score in result.scores:
        assert len(score.top) == 3
        assert score.log_p == pytest.approx(score.top[0][1])  # greedy takes the likeliest
        assert sum(math.exp(p) for _, p in score.top) <= 1 + 1e-6
    assert localizer.chat(MESSAGES, [picture(1)], Sampling(max_tokens=6))[0].scores == ()


def test_stopping_to_listen_stops_the_model(localizer):
    passes = []
    hook = localizer.model.register_forward_hook(lambda module, args, out: passes.append(1))
    stream = localizer.stream(MESSAGES, [picture(1)], Sampling(max_tokens=50, temperature=2.0, seed=1))
    next(stream)
    stream.close()
    before = len(passes)
    hook.remove()
    assert before < 10


def vision_passes(localizer, work):
    """How often the vision encoder runs during some work."""
    tower = getattr(localizer.model.model, "vision_tower", None) or localizer.model.model.visual
    passes = []
    hook = tower.register_forward_hook(lambda module, args, out: passes.append(1))
    work()
    hook.remove()
    return len(passes)


def test_many_questions_look_once(localizer):
    photo = picture(50)
    questions = ["What do you see?", "And else?", "Which street is this?", "Is it on Oak Avenue?", "Why?"]

    def ask():
        conversation = localizer.conversation(photo)
        for question in questions:
            conversation.ask(question, max_tokens=4)
        localizer.localize(photo.copy())
        localizer.chat(MESSAGES, [photo.copy()], Sampling(max_tokens=2))

    assert vision_passes(localizer, ask) == 1


def test_answers_come_in_the_order_of_their_questions_whatever_is_read_first(localizer, monkeypatch):
    images, questions = [picture(n) for n in range(4)], ["What do you see?", "And else?", "Why?", "What is in front of you?"]
    answers = localizer.answer(images, questions, max_new_tokens=8)
    assert len(set(answers)) > 1
    assert answers != answers[::-1]
    prefill = localizer.prefill_questions

    def backwards(images, questions):
        return [([3 - number for number in rows], state) for rows, state in prefill(images[::-1], questions[::-1])]

    monkeypatch.setattr(localizer, "prefill_questions", backwards)
    assert localizer.answer(images, questions, max_new_tokens=8) == answers


def test_a_conversation_goes_on_from_what_was_said(localizer):
    conversation = localizer.conversation(picture(1))
    first = conversation.ask("What do you see?", max_tokens=6)
    second = conversation.ask("And else?", max_tokens=6)
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And else?"},
    ]
    inputs = localizer.inputs([localizer.prompt([m | {"content": _parts(m["content"])} for m in messages])], [[picture(1)]])
    ids = localizer.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=sorted(localizer.end_tokens))
    assert second.text == localizer.decode(ids[0, inputs["input_ids"].shape[1] :]).strip()
    assert first.probability is second.probability is None


def _parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def test_questions_about_the_address_agree_with_its_probabilities(localizer):
    best = localizer.localize(picture(1)).candidates[0]
    conversation = localizer.conversation(picture(1))
    assert conversation.ask("Which street is this?").text == best.street
    yes = conversation.ask(f"Is it on {best.street}?")
    assert (yes.text, yes.probability) == ("Yes", pytest.approx(best.probability))
    other = next(street for street in CITY.streets if street != best.street)
    assert conversation.ask(f"Was it taken on {other}?").text == "No"
    assert conversation.ask(f"Options: {other}; {best.street}.", remember=False).text == best.street
    elsewhere = localizer.conversation(picture(1), Prior(streets=(other,)))
    assert elsewhere.ask("Which street is this?").text == other


def test_what_is_not_to_be_remembered_changes_nothing(localizer):
    plain, other = localizer.conversation(picture(1)), localizer.conversation(picture(1))
    other.ask("Something else?", max_tokens=3, remember=False)
    assert plain.ask("What do you see?", max_tokens=6) == other.ask("What do you see?", max_tokens=6)


def test_the_same_question_again_has_the_same_answer(localizer):
    conversation = localizer.conversation(picture(1))
    first = conversation.ask("What do you see?", max_tokens=6, remember=False)
    assert conversation.ask("What do you see?", max_tokens=6, remember=False) == first
    assert conversation.ask("What", max_tokens=6, remember=False) == localizer.conversation(picture(1)).ask(
        "What", max_tokens=6
    )


def test_a_conversation_is_as_hot_as_is_asked_for(localizer):
    def texts(**sampling):
        torch.manual_seed(1)
        conversation = localizer.conversation(picture(1))
        return {conversation.ask("What do you see?", 6, remember=False, **sampling).text for _ in range(4)}

    (greedy,) = texts()
    assert len(texts(temperature=3.0) - {greedy}) > 1
    assert localizer.answer([picture(1)], ["What do you see?"], 6) == [greedy]


PROMPTS = ["What do you see?", "Tell me.", "Which streets are near here, and which of them is the longest?"]
SAMPLINGS = [
    Sampling(9), Sampling(3), Sampling(7, 0.9, seed=4), Sampling(9, 1.4, 0.7, seed=5), Sampling(5, 2.0, seed=4, logprobs=2),
    Sampling(8, 1e-38), Sampling(6, stop=("e",)),
]  # fmt: skip


def asked(localizer, number):
    prompt = localizer.prompt([user_turn(PROMPTS[number % 3])])
    ((_, state),) = localizer.prefill_prompts([localizer.prepare(prompt, [picture(number % 4, (40 + 10 * (number % 2), 30))])])
    return state, Answer(localizer, SAMPLINGS[number % len(SAMPLINGS)], int(state.mask.sum()))


def texts_of(decoder, joining):
    """The answers, in order; those of `joining[step]` join before that step."""
    texts, chunks, step = {}, {}, 0
    while step < len(joining) or len(decoder):
        tokens = []
        for state, answer in joining[step] if step < len(joining) else []:
            texts[answer], chunks[answer] = AnswerText(answer), []
            tokens += decoder.join(state, [answer])
        for answer, token in [*tokens, *decoder.step()]:
            if chunk := texts[answer].add(token):
                chunks[answer].append(chunk)
        step += 1
    return [completion(some) for some in chunks.values()]


@pytest.mark.parametrize("penalty", [None, 1.3])
def test_answers_that_join_and_leave_are_those_of_each_alone(localizer, monkeypatch, penalty):
    monkeypatch.setattr(localizer.model.generation_config, "repetition_penalty", penalty)
    alone = [texts_of(Decoder(), [[asked(localizer, number)]])[0] for number in range(12)]
    joined = [asked(localizer, number) for number in range(12)]
    together = texts_of(Decoder(), [joined[:3], [], joined[3:4], joined[4:9], [], [], [], joined[9:]])
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.finish, one.tokens, one.prompt_tokens) == (
            other.text, other.finish, other.tokens, other.prompt_tokens
        )  # fmt: skip
        assert [s.text for s in one.scores] == [s.text for s in other.scores]
        assert [s.log_p for s in one.scores] == pytest.approx([s.log_p for s in other.scores], abs=1e-4)
    assert len({one.text for one in alone}) > 6


def test_a_cancelled_answer_leaves_and_no_other_changes(localizer):
    (state, answer), (other_state, other) = asked(localizer, 0), asked(localizer, 2)
    expected = texts_of(Decoder(), [[asked(localizer, 2)]])
    decoder = Decoder()
    decoder.join(state, [answer])
    assert decoder.cached_tokens() == state.mask.shape[1] + 9 - 1
    answer.cancelled = True
    assert texts_of(decoder, [[(other_state, other)]]) == expected
    assert len(answer.ids) == 1
    assert len(decoder) == decoder.cached_tokens() == 0


def test_the_bound_of_cached_tokens_holds_to_the_end(localizer):
    decoder, joined = Decoder(), [asked(localizer, number) for number in range(5)]
    bound = decoder.cached_tokens([(answer.prompt_tokens, answer.sampling.max_tokens) for _, answer in joined])
    for state, answer in joined:
        decoder.join(state, [answer])
    while len(decoder):
        assert sum(batch.state.mask.numel() for batch in decoder._batches) <= decoder.cached_tokens() <= bound
        decoder.step()
