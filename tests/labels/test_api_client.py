"""Requests to an endpoint: what ends the job, what is recorded, what is never shown."""

import logging
from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.labelers import Request, state_factory
from addressvlm.labels.request_scheduler import OpenAILabeler
from tests.support.label_requests import FACTS, GOOD, KEY, config_of, estimate, requests, run_labeler
from tests.support.openai_endpoint import Endpoint, Reply, refuses, says


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
        run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(20))
    assert len(endpoint.requests) == 4
    assert estimate(config_of(endpoint), tmp_path, requests(20)).answered == 3
    everything = str(caught.value) + caplog.text + "".join(p.read_text() for p in tmp_path.glob("*.json*"))
    assert KEY not in everything
    assert endpoint.keys[0] == f"Bearer {KEY}"


def test_the_key_never_gets_into_the_cache(endpoint: Endpoint, tmp_path: Path) -> None:
    replies = [says(f"{GOOD} {KEY}"), refuses(400, f"content policy {KEY}"), says(GOOD)]
    endpoint.reply = lambda n, body: replies[min(n, 3) - 1]
    run_labeler(config_of(endpoint, concurrency=1), tmp_path, requests(3))
    assert KEY not in "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_label_keeps_its_words(endpoint: Endpoint, tmp_path: Path) -> None:
    text = GOOD.replace("A row", "The standard bearer stands before a row")
    endpoint.reply = lambda n, body: says(text)
    assert run_labeler(config_of(endpoint), tmp_path, requests(1))[0][0].text == text


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    config = LabelsConfig(labeler="openai")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        OpenAILabeler(config, state_factory(config))
    with pytest.raises(ValueError, match="keys come from OPENAI_API_KEY alone"):
        LabelsConfig(base_url="https://me:secret@host/v1")


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
    labels, stats = run_labeler(config_of(endpoint, max_attempts=2), tmp_path, requests(2))
    assert {(label.source, label.attempts, label.problems) for label in labels.values()} == {
        ("fallback:template", 2, (problem, problem))
    }
    assert (stats.refused, stats.empty) == ((4, 0) if problem == "refused" else (0, 4))
    assert run_labeler(config_of(endpoint, max_attempts=2), tmp_path, requests(2))[1].asked == 0


def test_an_image_that_is_none_is_left_out(endpoint: Endpoint, tmp_path: Path) -> None:
    rows = [*requests(2), Request("bad", b"no picture", FACTS)]
    labels, stats = run_labeler(config_of(endpoint), tmp_path, rows)
    assert (sorted(labels), stats.unreadable, len(endpoint.requests)) == ([0, 1], 1, 2)
    with pytest.raises(InputError, match="image of row bad can't be decoded"):
        OpenAILabeler(config_of(endpoint), state_factory(config_of(endpoint))).label(rows)
