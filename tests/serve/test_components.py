"""What the service is made of, without Ray: settings, errors, vLLM, batches, counts."""

import asyncio
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from openai import AsyncOpenAI
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

import serve as service
from addressvlm import InputError
from addressvlm.answers.types import Sampling
from addressvlm.image_decode_worker import decode_image
from serve.chat import strip_stream
from serve.cities import model_folder
from serve.errors import ApiError, add_exception_handlers, error_response, to_api_error
from serve.images import decode_base64
from serve.metrics import ServiceMetrics, render_metrics
from serve.model import Batcher
from serve.requests import ChatQuery
from serve.settings import IMAGE_SETTINGS, MODEL_SETTINGS
from serve.vllm_engine import VllmModel, answer_logprobs, openai_request
from tests.support.running_service import check_error

pytestmark = pytest.mark.xdist_group("serve")


def run(work: object) -> object:
    return asyncio.run(work)  # type: ignore[arg-type]


# ---- settings and errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"modle": "x"}, "nearest known is 'model'"),
        ({"min_replicas": "many"}, "'min_replicas' is 'many'"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas"),
        ({"max_ongoing_requests": "4", "target_ongoing_requests": "4"}, "never scales up"),
        ({"model": "/no/such/folder"}, "no model folder /no/such/folder"),
        ({"model": str(Path(__file__).parent)}, "no config.json"),
        ({"model": "x", "cities": "y"}, "both model and cities"),
        ({"cities": "x", "engine": "vllm"}, "engine=vllm serves merged models"),
        ({"engine": "triton"}, "'engine' is 'triton'"),
        ({"image_domains": "10.0.0.1"}, "image_domains has '10.0.0.1'"),
        ({"image_domains": "https://example.org"}, "give names such as"),
        ({"allowed_origins": "*"}, "allowed_origins has"),
        ({"rate_limit": "-1"}, "'rate_limit' is '-1'"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        service.config(service.ServiceSettings.model_validate(arguments))
    assert "\n" not in str(caught.value)


def test_settings_of_others_start_no_model_anew() -> None:
    one = service.ServiceSettings(batch_size=4, image_domains="example.org")
    other = one.model_copy(update={"rate_limit": 5.0, "max_replicas": 9, "allowed_origins": ["https://example.org"]})
    for part in (MODEL_SETTINGS, IMAGE_SETTINGS):
        assert pickle.dumps(one.subset(part)) == pickle.dumps(other.subset(part))
    assert (one.subset(MODEL_SETTINGS).batch_size, one.subset(MODEL_SETTINGS).image_domains) == (4, [])
    assert one.subset(IMAGE_SETTINGS).image_domains == ["example.org"]


def test_vllm_is_asked_for_in_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="install it here, or give vllm_python="):
        service.config(service.ServiceSettings(model=str(tmp_path), engine="vllm"))


def test_the_production_file_is_one_that_serve_deploys() -> None:
    tree = yaml.safe_load((Path(service.__file__).parent / "production.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(tree).applications
    module, _, builder = application.import_path.partition(":")
    assert getattr(__import__(module), builder) is service.config
    assert service.ServiceSettings.model_validate(application.args).min_replicas == 2


def test_as_many_questions_are_taken_in_as_may_wait_and_be_worked_on() -> None:
    some = service.ServiceSettings(max_queued_requests=5, max_replicas=3, max_ongoing_requests=10)
    assert some.max_in_flight == 35
    assert some.model_copy(update={"max_queued_requests": 0}).max_in_flight == 30
    assert some.model_copy(update={"max_queued_requests": -1}).max_in_flight == float("inf")


def test_the_newest_of_two_last_models_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here, jobs = tmp_path / "here", tmp_path / "addressvlm" / "runs"
    for number, runs in enumerate((here, jobs)):
        (runs / "merged").mkdir(parents=True)
        (runs / "merged" / "config.json").write_text("{}")
        (runs / "last-model").write_text(str(runs / "merged"))
        os.utime(runs / "last-model", (number, number))
    asked = service.ServiceSettings(storage=str(here))
    assert model_folder(asked) == jobs / "merged"
    os.utime(here / "last-model", (2, 2))
    assert model_folder(asked) == here / "merged"


def test_lists_come_as_text_or_lists() -> None:
    for given_as in ("example.org, .example.net:8443,", ["example.org", ".example.net:8443"]):
        assert service.ServiceSettings(image_domains=given_as).image_domains == ["example.org", ".example.net:8443"]


def test_the_last_trained_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"ray job submit ray_jobs/train\.py"):
        model_folder(service.ServiceSettings())
    merged = tmp_path / "addressvlm" / "runs" / "demo" / "models" / "addressvlm" / "merged"
    merged.mkdir(parents=True)
    (tmp_path / "addressvlm" / "runs" / "last-model").write_text(f"{merged}\n")
    with pytest.raises(InputError, match=r"no config\.json"):
        model_folder(service.ServiceSettings())
    (merged / "config.json").write_text(json.dumps({}))
    assert model_folder(service.ServiceSettings()) == merged
    assert model_folder(service.ServiceSettings(model=str(merged.parent))) == merged


def test_defects_show_nothing_of_the_inside() -> None:
    app = FastAPI()
    add_exception_handlers(app)

    @app.get("/")
    def broken() -> None:
        raise RuntimeError("secret")

    response = TestClient(app, raise_server_exceptions=False).get("/")
    check_error(response, 500, "operator's log")
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("x"), 400),
        (ApiError(404, "x"), 404),
        (TimeoutError(), 503),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 503),
        (RayTaskError("f", "trace", InputError("x")), 400),
        (RayTaskError("f", "trace", KeyError("x")), 500),
        (KeyError("x"), 500),
    ],
)
def test_what_went_wrong_decides_the_status(error: Exception, status: int) -> None:
    told = to_api_error(error)
    assert told.status == status
    answer = error_response(told)
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 503)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ApiError(429, "Wait.", "x", "y", 7)))
    assert (error.status, error.message, error.param, error.code, error.retry_after_s) == (429, "Wait.", "x", "y", 7)


# ---- vLLM's answers


def test_an_addresss_score_is_that_of_its_tokens_up_to_the_end() -> None:
    def told(token: int, log_p: float) -> dict[str, dict[str, float]]:
        return {str(token): {"logprob": log_p}, "999": {"logprob": -1.0}}

    log_p = [None, told(2, -9), told(7, -0.5), told(8, -0.25), told(3, -0.125), told(4, -9)]
    assert answer_logprobs([1, 2], [1, 2, 7, 8, 3, 4], log_p, {3}) == [-0.5, -0.25, -0.125]
    assert answer_logprobs([1, 2], [1, 2, 7, 8, 3, 4], log_p, set()) == [-0.5, -0.25, -0.125, -9]
    assert answer_logprobs([1, 5], [1, 2, 7, 8, 3, 4], log_p, {3}) == [-9, -0.5, -0.25, -0.125]  # the boundary is another token


def test_what_vllm_is_asked() -> None:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    pixels = np.zeros((20, 30, 3), np.uint8)
    photos = [pixels, pixels + 9]
    asked = openai_request(ChatQuery("x", [turn, turn], photos, Sampling(9, 0.5, 0.25, 2, ["."], logprobs=0, seed=0)))
    for message, shown in zip(asked.pop("messages"), photos, strict=True):
        image, text = message["content"]
        assert decode_image(decode_base64(image["image_url"]["url"]), 50).rgb == shown.tobytes()
        assert text == turn["content"][1]
    assert asked == {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "n": 2, "stop": ["."], "seed": 0,
        "logprobs": True, "top_logprobs": 0,
    }  # fmt: skip
    plain = openai_request(ChatQuery("x", [turn], [pixels], Sampling(9)))
    assert {key: plain.get(key) for key in ("temperature", "stop", "seed", "logprobs", "top_logprobs")} == {
        "temperature": 0.0, "stop": None, "seed": None, "logprobs": False, "top_logprobs": None
    }  # fmt: skip


def test_a_vllm_server_that_is_gone_is_no_defect() -> None:
    model = VllmModel.__new__(VllmModel)
    model.name, model.client = "x", AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)
    with pytest.raises(ApiError) as caught:
        run(model._create(messages=[{"role": "user", "content": "?"}]))
    assert caught.value.status == 503


# ---- batches, counts, streams


def test_what_waits_while_the_model_works_goes_together() -> None:
    async def ask() -> tuple[list[int], list[list[int]]]:
        free, batches = asyncio.Event(), []

        async def work(items: list[int]) -> list[int | Exception]:
            batches.append(items)
            await free.wait()
            return [ValueError("three") if item == 3 else -item for item in items]

        batcher = Batcher(work, size=4, wait_s=0)
        tasks = [asyncio.create_task(batcher.submit(0))]
        while not batches:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(batcher.submit(item)) for item in range(1, 8)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        free.set()
        return await asyncio.gather(*tasks, return_exceptions=True), batches

    answers, batches = run(ask())  # type: ignore[misc]
    assert batches == [[0], [1, 2, 3, 4], [6, 7]]
    assert [a for a in answers if isinstance(a, int)] == [0, -1, -2, -4, -6, -7]
    assert str(answers[3]) == "three"


def test_a_batch_that_fails_fails_each_of_it_and_not_the_next() -> None:
    async def ask() -> list[object]:
        async def work(items: list[int]) -> list[int]:
            return [1 // item for item in items]

        batcher = Batcher(work, size=2, wait_s=1)
        first = await asyncio.gather(batcher.submit(0), batcher.submit(1), return_exceptions=True)
        return [*first, *await asyncio.gather(batcher.submit(1), batcher.submit(1))]

    answers = run(ask())
    assert [type(answer) for answer in answers] == [ZeroDivisionError, ZeroDivisionError, int, int]  # type: ignore[attr-defined]


def test_counts_of_several_replicas_stand_side_by_side() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    one, two = ServiceMetrics(), ServiceMetrics()
    one.count("addressvlm_requests", "GET", "/healthz", "200")
    two.count("addressvlm_requests", "GET", "/healthz", "200", by=2)
    two.observe("addressvlm_confidence", 0.75, "toytown")
    text = render_metrics({"a": pickle.loads(pickle.dumps(one.collect())), "b": two.collect()}).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["replica"]: s.value for s in found["addressvlm_requests"].samples} == {"a": 1, "b": 2}
    buckets = {s.labels["le"]: s.value for s in found["addressvlm_confidence"].samples if s.name.endswith("bucket")}
    assert (buckets["0.7"], buckets["0.8"], buckets["+Inf"]) == (0, 1, 1)


@given(st.lists(st.text(alphabet="ab \n", max_size=4)))
def test_pieces_without_blanks_around_are_the_stripped_text(pieces: list[str]) -> None:
    said, held = "", ""
    for piece in pieces:
        text, held = strip_stream(held, piece, not said)
        said += text
    assert said == "".join(pieces).strip()
