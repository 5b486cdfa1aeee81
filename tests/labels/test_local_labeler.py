import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.answer_text import ParsedAnswer
from addressvlm.labels.labelers import Request, make_labeler, state_factory
from addressvlm.labels.local_labeler import LocalLabeler
from addressvlm.tools.toy_base import CHAT_TEMPLATE, train_tokenizer
from tests.support.label_texts import FACTS, GOOD
from tests.support.tiny import tiny_llava


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model that reads only text."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = train_tokenizer([GOOD], 300)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(model: Path, **settings: object) -> LabelsConfig:
    return LabelsConfig(labeler="local", model=str(model), **{"max_tokens": 16, "batch_size": 3, "max_attempts": 2, **settings})


def requests(count: int) -> list[Request]:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    return [Request(f"row{i}", buffer.getvalue(), replace(FACTS, cross_distance_m=10 * i)) for i in range(count)]


def texts(settings: LabelsConfig, count: int = 5) -> tuple[list[tuple[str, ...]], list[str], list[int]]:
    """What the model wrote for each row, who wrote its label, and the sizes of the batches."""
    labeler = make_labeler(settings)
    assert isinstance(labeler, LocalLabeler)
    written, batches = {}, []
    write = labeler._writer.write

    def recorded(conversations: list[list[dict[str, object]]], seed: int) -> list[str]:
        answers = write(conversations, seed)
        batches.append(len(answers))
        for conversation, answer in zip(conversations, answers, strict=True):
            written.setdefault(str(conversation[1]["content"]), []).append(answer)
        return answers

    labeler._writer.write = recorded  # type: ignore[method-assign]
    labels = labeler.label(requests(count))
    return [tuple(answers) for answers in written.values()], [label.source for label in labels], batches


def test_a_model_that_sees_labels_in_batches(llava: Path) -> None:
    written, sources, batches = texts(config(llava))
    assert sources == ["fallback:template"] * 5  # a random model writes nothing that passes
    assert batches == [3, 3, 3, 1]  # five rows, twice each
    assert all(len(answers) >= 2 for answers in written)
    assert "<image>" not in str(written)


def test_a_model_that_only_reads(llama: Path) -> None:
    written, sources, _ = texts(config(llama, send_image=False, prompt="grounded"))
    assert sources == ["fallback:template"] * 5
    assert any(answer for answers in written for answer in answers)


def test_each_conversation_shows_its_own_image_and_keeps_it_in_a_retry(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = make_labeler(config(llava, batch_size=2))
    assert isinstance(labeler, LocalLabeler)
    chat, inputs_seen = labeler._writer.chat, []  # type: ignore[attr-defined]
    inputs = chat.inputs

    def recorded(prompts: list[str], images: list[list[Image.Image]]) -> object:
        inputs_seen.extend(zip(prompts, images, strict=True))
        return inputs(prompts, images)

    monkeypatch.setattr(chat, "inputs", recorded)
    colours = {"Elm Road": (250, 0, 0), "Castle Hill": (0, 250, 0), "Green Lane": (0, 0, 250)}
    rows = []
    for street, colour in colours.items():
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
        rows.append(Request(street, buffer.getvalue(), replace(FACTS, street=street)))
    labels = labeler.label(rows)
    assert [street in label.text for street, label in zip(colours, labels, strict=True)] == [True] * 3
    assert len(inputs_seen) == 6
    for prompt, (image,) in inputs_seen:
        (street,) = [street for street in colours if street in prompt]
        assert image.getpixel((16, 16)) == colours[street]


def test_batching_changes_no_answer(llama: Path) -> None:
    settings = {"send_image": False, "prompt": "grounded", "max_attempts": 1}
    together, _, sizes = texts(config(llama, batch_size=5, **settings))
    alone, _, _ = texts(config(llama, batch_size=1, **settings))
    assert sizes == [5]
    assert together == alone


def test_sampled_answers_are_the_same_in_a_rerun(llama: Path) -> None:
    settings = config(llama, send_image=False, prompt="grounded", temperature=1.0)
    first, second = texts(settings)[0], texts(settings)[0]
    assert first == second
    assert any(answers[0] != answers[1] for answers in first)
    assert first != texts(config(llama, send_image=False, prompt="grounded"))[0]


def test_good_texts_are_taken(llama: Path) -> None:
    settings = config(llama, send_image=False, prompt="grounded")
    labeler = LocalLabeler(state_factory(settings), settings)
    answers = iter(["no", GOOD, GOOD])
    labeler._writer.write = lambda conversations, seed: [ParsedAnswer(next(answers)) for _ in conversations]  # type: ignore[method-assign]
    labels = labeler.label([replace(r, facts=FACTS) for r in requests(2)])
    assert [(label.text, label.source, label.attempts) for label in labels] == [
        (GOOD, "local:tiny-llama", 2), (GOOD, "local:tiny-llama", 1),
    ]  # fmt: skip


def test_a_model_that_cannot_be_used(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"reads only text: set labels\.send_image to false"):
        make_labeler(config(llama))
    with pytest.raises(InputError, match="no model folder"):
        make_labeler(config(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}', encoding="utf-8")
    with pytest.raises(InputError, match="can't be loaded"):
        make_labeler(config(tmp_path))
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(bare)
    with pytest.raises(InputError, match="can't be loaded"):
        make_labeler(config(bare, send_image=False, prompt="grounded"))


def test_an_unreadable_image_is_an_error(llava: Path) -> None:
    (row,) = requests(1)
    with pytest.raises(InputError, match="row0 can't be decoded"):
        make_labeler(config(llava)).label([replace(row, image=b"<html>")])
