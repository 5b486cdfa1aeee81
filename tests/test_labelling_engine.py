"""Rows are paid for once, within limits: python -m pytest tests/test_labelling_engine.py"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.config_labels import LabelsConfig
from addressvlm.labels import Request, beginning, engine
from addressvlm.labels.ledger import ROOM, Ledger, WritableLedger, writing
from addressvlm.labels.limits import Pace
from addressvlm.labels.openai_labeler import OpenAILabeler
from addressvlm.labels.replay import ReplayLabeler, asked_of
from tests.endpoint import Endpoint, Reply, refuses, says
from tests.labelling import BAD, FACTS, GOOD, config_of, left, requests, settle
from tests.test_ledger import disk_of

pytestmark = pytest.mark.usefixtures("hurry")


# Paid once


def test_only_what_is_missing_is_asked(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    labels, _ = settle(config, tmp_path, requests(20))
    assert {(label.text, label.source, label.attempts) for label in labels.values()} == {(GOOD, "openai:m", 1)}
    assert settle(config, tmp_path, requests(20))[1].asked == 0
    again, tally = settle(config, tmp_path, requests(30))
    assert (tally.asked, len(endpoint.asked)) == (10, 30)
    assert {n: again[n] for n in labels} == labels
    changed = [*requests(28), Request("row28", requests(1)[0].image + b"another", FACTS), requests(30)[29]]
    assert settle(config, tmp_path, changed)[1].asked == 1
    assert ReplayLabeler(beginning(config), Ledger(tmp_path)).label(requests(30)) == [again[n] for n in range(30)]
    with pytest.raises(InputError, match="lacks the answer for row row30"):
        ReplayLabeler(beginning(config), Ledger(tmp_path)).label(requests(31))


def test_answers_to_another_prompt_or_model_are_not_used(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint)
    settle(config, tmp_path / "ledger", requests(5))
    file = tmp_path / "mine.md"
    shipped = Path(engine.__file__).parent / "prompts" / "alignment.md"
    file.write_text(shipped.read_text().replace("35 to 80 words", "30 to 90 words"))
    for change in (
        {"prompt": str(file)},
        {"model": "n"},
        {"temperature": 0.5},
        {"image_quality": 60},
        {"base_url": "http://h/v1"},
    ):
        other = config.model_copy(update=change)
        assert (left(other, tmp_path / "ledger", requests(5)).settled, left(other, tmp_path / "ledger", requests(5)).left) == (
            0,
            5,
        )
    text = left(config.model_copy(update={"model": "n"}), tmp_path / "ledger", requests(6)).text()
    assert "6 rows: 0 are answered in the ledger, 6 will be asked" in text
    assert "5 answers in the ledger are to other prompts or from other models" in text
    assert left(config.model_copy(update={"concurrency": 9, "retries": 0}), tmp_path / "ledger", requests(5)).left == 0


def test_models_of_one_name_in_two_folders_are_two_and_a_server_of_ours_may_move(tmp_path: Path) -> None:
    row = requests(1)[0]

    def digest(**settings: str) -> tuple[str, str]:
        asked = asked_of(beginning(LabelsConfig(labeler="vllm", **settings))(row))  # type: ignore[arg-type]
        return asked.model, asked.digest

    first, second = digest(model="/a/small"), digest(model="/b/small")
    assert first[0] == second[0] == "vllm:small"
    assert first[1] != second[1]
    assert digest(model="/a/small", base_url="http://127.0.0.1:9/v1") == first
    assert digest(model="owner/small")[0] == "vllm:owner/small"


def test_an_error_of_reading_ends_the_job_as_its_sentence(endpoint: Endpoint, tmp_path: Path) -> None:
    def rows() -> Iterator[Request]:
        yield from requests(40)
        raise InputError("the table can't be read")

    config = config_of(endpoint)
    with pytest.raises(InputError, match=r"^the table can't be read$"), writing(tmp_path) as ledger:
        OpenAILabeler(config, beginning(config), ledger).settle(rows(), 41)


def test_rows_of_one_id_are_asked_once(endpoint: Endpoint, tmp_path: Path) -> None:
    labels, tally = settle(config_of(endpoint, concurrency=8), tmp_path, requests(1) * 9)
    assert (len(labels), tally.asked, len(endpoint.asked)) == (9, 1, 1)


def test_bad_texts_are_asked_again_and_replayed(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD if len(body["messages"]) > 2 else BAD)
    labels, _ = settle(config_of(endpoint), tmp_path, requests(2))
    assert [(label.text, label.attempts) for label in labels.values()] == [(GOOD, 2)] * 2
    assert any("does not name the street Mill Street" in str(body["messages"][3:]) for body in endpoint.asked)
    assert settle(config_of(endpoint), tmp_path, requests(2))[0] == labels
    assert len(endpoint.asked) == 4
    one_of_two = next(tmp_path.glob("*.jsonl"))
    one_of_two.write_text("".join(line for line in one_of_two.read_text().splitlines(True) if '"number": 1' in line))
    assert left(config_of(endpoint), tmp_path, requests(2)).begun == 2
    assert settle(config_of(endpoint), tmp_path, requests(2))[1].asked == 2


# Money and room


def used(text: str, sent: int, written: int) -> Reply:
    status, headers, body = says(text)
    assert isinstance(body, dict)
    return status, headers, {**body, "usage": {"prompt_tokens": sent, "completion_tokens": written}}


@pytest.mark.parametrize("limit", [{"budget_tokens": 20_000}, {"budget_usd": 0.02}])
def test_a_budget_stops_the_job_and_a_larger_one_goes_on(endpoint: Endpoint, tmp_path: Path, limit: dict[str, float]) -> None:
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0, "image_rule": "fixed", "image_base": 600}
    endpoint.reply = lambda n, body: used(GOOD, 900, 100)
    config = config_of(endpoint, concurrency=8, max_tokens=100, **prices, **limit)
    with pytest.raises(InputError, match=r"budget leaves no room .*labels\.budget_.*raise it and run the same command again"):
        settle(config, tmp_path, requests(40))
    assert len(endpoint.asked) == 20  # a thousand tokens each, and not one more although eight are in flight
    with pytest.raises(InputError, match="20,000 of" if "budget_tokens" in limit else "0.02 of"):
        settle(config, tmp_path, requests(40))
    assert len(endpoint.asked) == 20
    more = config.model_copy(update={key: 3 * value for key, value in limit.items()})
    settle(more, tmp_path, requests(40))
    ledger = Ledger(tmp_path)
    assert (len(endpoint.asked), ledger.tokens, round(ledger.usd, 6)) == (40, 40_000, 0.04)


def test_an_endpoint_that_does_not_count_is_estimated(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, image_rule="fixed", image_base=600)
    _, tally = settle(config, tmp_path, requests(3))
    assert 3 * 700 < tally.tokens_in < 3 * 1200
    assert tally.tokens_out == 3 * -(-len(GOOD) // 4)


def test_a_full_disk_ends_the_job_and_nothing_paid_is_lost(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WritableLedger, "has_room", lambda ledger, answers: ledger._end + 300 * answers <= ledger._allocated)
    with disk_of(ROOM), pytest.raises(InputError, match=r"disk of .* is full"):
        settle(config_of(endpoint, concurrency=900, attempts=1), tmp_path, requests(250) * 12)
    found = Ledger(tmp_path)
    assert sum(found.answers.values()) == len(endpoint.asked) > 0


def test_every_request_takes_its_turn(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[float] = []
    monkeypatch.setattr(Pace, "slot", lambda pace, tokens: (turns.append(tokens), 0.0)[1])
    endpoint.reply = lambda n, body: refuses(500, "oops") if n % 4 == 0 else used(GOOD, 900, 100)
    config = config_of(endpoint, requests_per_minute=1e6, max_tokens=50, concurrency=1, image_rule="fixed", image_base=600)
    _, tally = settle(config, tmp_path, requests(12))
    assert len(turns) == tally.asked == 12 + tally.again["500"]
    assert 700 < turns[0] < 1200  # an estimate at first, later what answers took
    assert set(turns[1:]) == {900 + 50}
