"""What an endpoint does wrong, and what comes of it"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels import request_scheduler
from addressvlm.labels.labelers import CachedLabeler, Request, state_factory
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import ResponseCache
from addressvlm.storage.http_client import retry_after
from tests.support.label_requests import FACTS, GOOD, KEY, config_of, left, requests, settle
from tests.support.openai_endpoint import Endpoint, Reply, cuts, drops, refuses, says

pytestmark = pytest.mark.usefixtures("hurry")


def after(first: Callable[[], Reply], times: int = 1) -> Callable[[int, dict[str, Any]], Reply]:
    """A few bad replies, then good ones."""
    return lambda n, body: first() if n <= times else says(GOOD)


# What goes wrong for now


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (lambda: refuses(429, "slow down", Retry_After="0"), "429"),
        (lambda: refuses(500, "oops"), "500"),
        (lambda: refuses(408, "took long"), "408"),
        (lambda: refuses(409, "locked"), "409"),
        (lambda: refuses(425, "early"), "425"),
        (lambda: refuses(503, "busy"), "503"),
        (drops, "connection"),
        (lambda: cuts(says(GOOD)), "connection"),
        (lambda: (200, {}, "<html>Bad gateway</html>"), "no JSON"),
        (lambda: (200, {}, json.dumps(says(GOOD)[2])[:50]), "no JSON"),
        (lambda: (200, {}, {"error": {"message": "model overloaded", "code": None}}), "500"),
        (lambda: (200, {}, {"error": {"message": "slow down", "code": 429}}), "429"),
    ],
)
def test_what_fails_for_now_is_tried_again(endpoint: Endpoint, tmp_path: Path, reply: Callable[[], Reply], kind: str) -> None:
    endpoint.reply = after(reply, times=2)
    labels, tally = settle(config_of(endpoint, concurrency=1), tmp_path, requests(2))
    assert {label.source for label in labels.values()} == {"openai:m"}
    assert (tally.asked, tally.again) == (4, Counter({kind: 2}))
    assert labels[0].attempts == 1  # the model was asked once


def test_a_slow_answer_is_given_up(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint._server.drip_s = 0.01
    with pytest.raises(InputError, match=r"keeps failing \(no answer within 0.2 s\)"):
        settle(config_of(endpoint, timeout_s=0.2, retries=0), tmp_path, requests(1))


def test_waits_as_long_as_the_endpoint_says() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"x-ms-retry-after-ms": "40"}) == 0.04
    assert 85 < (retry_after({"retry-after": date}) or 0) <= 90
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert [retry_after({"retry-after": "soon"}), retry_after({})] == [None, None]


def waits_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the engine waits between tries, with its usual constants; nobody really waits."""
    told: list[float] = []

    async def at_once(waiter: Any, seconds: float) -> None:
        waiter.close()
        told.append(seconds)
        raise TimeoutError

    monkeypatch.setattr(request_scheduler, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(request_scheduler, "MAX_WAIT_S", 3.0)
    monkeypatch.setattr(request_scheduler.asyncio, "wait_for", at_once)
    return told


@pytest.mark.parametrize(
    ("headers", "asked_s"), [({"Retry_After": "7"}, 7.0), ({"Retry_After_Ms": "1500"}, 1.5), ({"Retry_After": "0"}, 0.0)]
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_next_try_waits_as_long_as_the_endpoint_says_and_a_little_more(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str], asked_s: float
) -> None:
    told = waits_of(monkeypatch)
    endpoint.reply = after(lambda: refuses(status, "slow down", **headers), times=3)
    settle(config_of(endpoint), tmp_path, requests(1))
    assert len(told) == 3
    assert all(asked_s <= seconds <= asked_s + 0.5 * step for seconds, step in zip(told, (0.5, 1.0, 2.0), strict=True)), told


def test_where_the_endpoint_does_not_say_how_long_the_wait_doubles_up_to_a_limit(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = waits_of(monkeypatch)
    endpoint.reply = after(lambda: refuses(500, "oops"), times=5)
    settle(config_of(endpoint), tmp_path, requests(1))
    assert all(0.5 * most <= seconds <= most for seconds, most in zip(told, (0.5, 1, 2, 3, 3), strict=True)), told


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (429, 9)])
def test_a_busy_endpoint_is_tried_longer_than_one_that_fails(
    endpoint: Endpoint, tmp_path: Path, status: int, tries: int
) -> None:
    (bad,) = requests(1)
    marked = state_factory(config_of(endpoint))(bad).messages()[1]["content"][0]["image_url"]["url"]
    endpoint.reply = lambda n, body: refuses(status, "no") if marked in str(body) else says(GOOD)
    labels, tally = settle(config_of(endpoint, retries=2), tmp_path, requests(3))
    assert (labels[0].source, tally.again[str(status)]) == ("fallback:template", 2 * tries)


def failing(config: LabelsConfig, bad: list[Request]) -> Callable[[int, dict[str, Any]], Reply]:
    marked = {state_factory(config)(row).messages()[1]["content"][0]["image_url"]["url"] for row in bad}
    return lambda n, body: refuses(500, "no") if body["messages"][1]["content"][0]["image_url"]["url"] in marked else says(GOOD)


def test_an_answer_in_between_shows_that_the_endpoint_works(endpoint: Endpoint, tmp_path: Path) -> None:
    config = config_of(endpoint, concurrency=1, retries=0)
    endpoint.reply = failing(config, requests(40)[:30:2])  # 15 rows, each tried in vain twice: more than MAX_FAILED_IN_A_ROW
    labels, tally = settle(config, tmp_path, requests(40))
    assert (len(labels), tally.failed, tally.answered) == (40, 15, 25)


def test_not_more_rows_than_fit_into_memory_wait_for_the_last_round(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_scheduler, "MAX_POSTPONED", 3)
    config = config_of(endpoint, concurrency=1, retries=0)
    endpoint.reply = failing(config, requests(8)[::2][:3])
    assert settle(config, tmp_path / "three", requests(8))[1].failed == 3
    endpoint.reply = failing(config, requests(8)[::2])
    with pytest.raises(InputError, match="keeps failing"):
        settle(config, tmp_path / "four", requests(8))


def test_a_row_that_the_endpoint_fails_for_falls_back_when_others_are_answered(endpoint: Endpoint, tmp_path: Path) -> None:
    poison = next(iter(requests(1)))
    marked = state_factory(config_of(endpoint))(poison).messages()[1]["content"][0]["image_url"]["url"]
    endpoint.reply = lambda n, body: refuses(500, "no") if marked in str(body) else says(GOOD)
    labels, tally = settle(config_of(endpoint, retries=1), tmp_path, requests(6))
    assert [labels[n].source for n in range(6)] == ["fallback:template"] + ["openai:m"] * 5
    assert (labels[0].problems, tally.failed, tally.again["500"]) == (("no answer",), 1, 4)  # two tries, and two at the end
    assert settle(config_of(endpoint), tmp_path, requests(6))[1].asked == 0
    endpoint.reply = lambda n, body: says(GOOD)
    assert settle(config_of(endpoint), tmp_path, requests(6), retry_failed=True)[0][0].source == "openai:m"
    assert CachedLabeler(state_factory(config_of(endpoint)), ResponseCache(tmp_path)).label(requests(1))[0].text == GOOD


def test_an_endpoint_that_keeps_failing_ends_the_job_and_answers_are_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: says(GOOD) if n <= 10 else refuses(503, "overloaded")
    with pytest.raises(InputError, match=r"keeps failing \(503: overloaded\): rerun later to resume; all answers"):
        settle(config_of(endpoint, retries=0), tmp_path, requests(60))
    assert len(endpoint.asked) < 40
    assert left(config_of(endpoint), tmp_path, requests(60)).answered == 10
    endpoint.reply = lambda n, body: says(GOOD)
    assert settle(config_of(endpoint), tmp_path, requests(60))[1].asked == 50


def test_an_endpoint_that_never_answers_gives_no_templates(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda n, body: drops()
    with pytest.raises(InputError, match="keeps failing"):
        settle(config_of(endpoint, retries=0), tmp_path, requests(3))
    gone = config_of(endpoint, retries=0).model_copy(update={"base_url": "http://127.0.0.1:9/v1"})
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/v1/ keeps failing \(the connection failed"):
        settle(gone, tmp_path, requests(3))


# What ends the job at once


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (refuses(401, f"Incorrect API key provided: {KEY}. Get one."), r"401: Incorrect API key provided: …\. Get one\."),
        (refuses(403, f"header Bearer {KEY}x is not allowed"), "403: header … is not allowed"),
        (refuses(400, "no such parameter"), "400: no such parameter"),
        (refuses(404, "The model `m` does not exist"), "404: The model `m` does not exist.*check .*labels.model"),
        ((404, {}, "<html><title>Not found</title><p>Nothing here</html>"), "404: Not found Nothing here"),
        ((200, {}, {"error": {"message": "invalid model", "code": 404}}), "404: invalid model"),
        (refuses(413, "Payload too large"), "image as too large .413: Payload too large.: lower labels.image_pixels"),
        (refuses(400, "image exceeds the maximum of 5 MB"), "image as too large .400.*lower labels.image_pixels"),
        ((429, {}, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}), "no credit left"),
        (refuses(429, "come back", Retry_After="4000"), "asks to wait 4,000 s"),
    ],
)
def test_what_ends_the_job_at_once(
    endpoint: Endpoint, tmp_path: Path, reply: Reply, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    endpoint.reply = lambda n, body: says(GOOD) if n <= 3 else reply
    with pytest.raises(InputError, match=sentence) as caught:
        settle(config_of(endpoint, concurrency=1), tmp_path, requests(20))
    assert len(endpoint.asked) == 4
    assert left(config_of(endpoint), tmp_path, requests(20)).answered == 3
    everything = str(caught.value) + caplog.text + "".join(p.read_text() for p in tmp_path.glob("*.json*"))
    assert KEY not in everything
    assert endpoint.keys[0] == f"Bearer {KEY}"


def test_the_key_never_gets_into_the_ledger(endpoint: Endpoint, tmp_path: Path) -> None:
    replies = [says(f"{GOOD} {KEY}"), refuses(400, f"content policy {KEY}"), says(GOOD)]
    endpoint.reply = lambda n, body: replies[min(n, 3) - 1]
    settle(config_of(endpoint, concurrency=1), tmp_path, requests(3))
    assert KEY not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_label_keeps_its_words(endpoint: Endpoint, tmp_path: Path) -> None:
    said = GOOD.replace("A row", "The standard bearer stands before a row")
    endpoint.reply = lambda n, body: says(said)
    assert settle(config_of(endpoint), tmp_path, requests(1))[0][0].text == said


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    config = LabelsConfig(labeler="openai")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        OpenAILabeler(config, state_factory(config))
    with pytest.raises(ValueError, match="keys come from OPENAI_API_KEY alone"):
        LabelsConfig(base_url="https://me:secret@host/v1")


# Answers that are none


def filtered() -> Reply:
    reply = says("The street")
    reply[2]["choices"][0]["finish_reason"] = "content_filter"  # type: ignore[index]
    return reply


def refusal() -> Reply:
    reply = says("")
    reply[2]["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "I can't help with that."}  # type: ignore[index]
    return reply


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (filtered(), "refused"),
        (refusal(), "refused"),
        (refuses(400, "The response was filtered due to the content management policy"), "refused"),
        (refuses(400, "Could not process image"), "refused"),
        (says("  "), "empty"),
        ((200, {}, {"choices": []}), "empty"),
    ],
)
def test_refusals_and_empty_answers_are_recorded(endpoint: Endpoint, tmp_path: Path, reply: Reply, problem: str) -> None:
    endpoint.reply = lambda n, body: reply
    labels, tally = settle(config_of(endpoint, max_attempts=2), tmp_path, requests(2))
    assert {(label.source, label.attempts, label.problems) for label in labels.values()} == {
        ("fallback:template", 2, (problem, problem))
    }
    assert (tally.refused, tally.empty) == ((4, 0) if problem == "refused" else (0, 4))
    assert settle(config_of(endpoint, max_attempts=2), tmp_path, requests(2))[1].asked == 0


def test_an_image_that_is_none_is_left_out(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = [*requests(2), Request("bad", b"no picture", FACTS)]
    labels, tally = settle(config_of(endpoint), tmp_path, rows)
    assert (sorted(labels), tally.unreadable, len(endpoint.asked)) == ([0, 1], 1, 2)
    with pytest.raises(InputError, match="image of row bad can't be decoded"):
        OpenAILabeler(config_of(endpoint), state_factory(config_of(endpoint))).label(rows)
