"""Settings of the service: wrong ones are one sentence, and each deployment gets its own."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import serve as service
from addressvlm import InputError
from serve.settings import IMAGE_SETTINGS, MODEL_SETTINGS

pytestmark = pytest.mark.xdist_group("serve")


@pytest.mark.parametrize(
    ("arguments", "message"),
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
        ({"max_body_mb": "20", "request_memory_mb": "50"}, "give it at least 60"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        service.config(service.ServiceSettings.model_validate(arguments))
    assert "\n" not in str(caught.value)


def test_settings_of_other_deployments_do_not_restart_the_model() -> None:
    one = service.ServiceSettings(batch_size=4, image_domains="example.org")
    other = one.model_copy(update={"rate_limit": 5.0, "max_replicas": 9, "allowed_origins": ["https://example.org"]})
    for part in (MODEL_SETTINGS, IMAGE_SETTINGS):
        assert pickle.dumps(one.subset(part)) == pickle.dumps(other.subset(part))
    assert (one.subset(MODEL_SETTINGS).batch_size, one.subset(MODEL_SETTINGS).image_domains) == (4, [])
    assert one.subset(IMAGE_SETTINGS).image_domains == ["example.org"]


def test_a_missing_vllm_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="install it here, or give vllm_python="):
        service.config(service.ServiceSettings(model=str(tmp_path), engine="vllm"))


def test_a_service_that_requires_keys_does_not_start_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = service.ServiceSettings(model=str(tmp_path), require_keys=True)
    monkeypatch.delenv("ADDRESSVLM_API_KEYS", raising=False)
    with pytest.raises(InputError, match="require_keys is set and there is no key"):
        service.config(settings)
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", "a-key-of-sixteen-or-more")
    assert service.config(settings)


def test_serve_can_deploy_the_production_file() -> None:
    tree = yaml.safe_load((Path(service.__file__).parent / "production.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(tree).applications
    module, _, builder = application.import_path.partition(":")
    assert getattr(__import__(module), builder) is service.config
    settings = service.ServiceSettings.model_validate(application.args)
    assert (settings.min_replicas, settings.require_keys) == (2, True)


def test_requests_in_flight_are_those_that_may_queue_and_be_processed() -> None:
    some = service.ServiceSettings(max_queued_requests=5, max_replicas=3, max_ongoing_requests=10)
    assert some.max_in_flight == 35
    assert some.model_copy(update={"max_queued_requests": 0}).max_in_flight == 30
    assert some.model_copy(update={"max_queued_requests": -1}).max_in_flight == float("inf")


def test_lists_come_as_text_or_lists() -> None:
    for value in ("example.org, .example.net:8443,", ["example.org", ".example.net:8443"]):
        assert service.ServiceSettings(image_domains=value).image_domains == ["example.org", ".example.net:8443"]


def deployed(application: Any) -> dict[str, Any]:
    """The deployments of an application, by name."""
    deployment = application._bound_deployment
    parts = [part for part in deployment.init_args if isinstance(part, type(application))]
    return {deployment.name: deployment} | {name: one for part in parts for name, one in deployed(part).items()}


def test_each_deployment_scales_as_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADDRESSVLM_API_KEYS", raising=False)
    (tmp_path / "config.json").write_text("{}")
    settings = service.ServiceSettings(
        model=str(tmp_path), num_cpus=3, num_gpus=0.5, max_ongoing_requests=41, max_queued_requests=77, drain_s=33,
        min_replicas=2, max_replicas=5, target_ongoing_requests=9, upscale_delay_s=4, downscale_delay_s=44, image_cpus=0.25,
        image_processes=3, image_replicas=6, http_replicas=7, rate_limit=30, batch_size=11,
    )  # fmt: skip
    found = deployed(service.config(settings))
    scale = {
        name: (config.min_replicas, config.max_replicas, config.target_ongoing_requests)
        for name, one in found.items()
        if (config := one._deployment_config.autoscaling_config)
    }
    assert scale == {"Localizer": (2, 5, 9), "Images": (1, 6, 6), "HttpApi": (1, 7, 64)}
    for name in scale:
        config = found[name]._deployment_config.autoscaling_config
        assert (config.upscale_delay_s, config.downscale_delay_s) == (4, 44)
    model, images, limit = (found[name] for name in ("Localizer", "Images", "RateLimit"))
    assert (model.max_ongoing_requests, model.max_queued_requests) == (41, 77)
    assert (images.max_ongoing_requests, images.max_queued_requests) == (24, 77)
    assert {key: model.ray_actor_options[key] for key in ("num_cpus", "num_gpus")} == {"num_cpus": 3, "num_gpus": 0.5}
    assert images.ray_actor_options["num_cpus"] == 0.25
    assert [found[n]._deployment_config.graceful_shutdown_timeout_s for n in ("Localizer", "HttpApi")] == [33, 33]
    assert (limit.num_replicas, limit.init_args) == (1, (30,))  # one, or each would allow as many
    assert (model.init_args[0].batch_size, images.init_args[0].image_processes) == (11, 3)
    assert found["HttpApi"].init_args[3] == settings
    assert "RateLimit" not in deployed(service.config(settings.model_copy(update={"rate_limit": 0.0})))


def test_settings_that_may_be_equal() -> None:
    settings = service.ServiceSettings(min_replicas=3, max_replicas=3, max_body_mb=20, request_memory_mb=60)
    assert (settings.min_replicas, settings.request_memory_mb) == (3, 60)


def test_the_last_model_is_sought_where_runs_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESSVLM_STORAGE", "/elsewhere")
    assert service.ServiceSettings().storage == "/elsewhere"
    monkeypatch.delenv("ADDRESSVLM_STORAGE")
    assert service.ServiceSettings().storage == "runs"


def test_what_nobody_set_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running services change with these: nothing is fetched, no proxy believed, no foreign code run unless that is set."""
    monkeypatch.delenv("ADDRESSVLM_STORAGE", raising=False)
    assert service.ServiceSettings().model_dump() == {
        "model": None, "cities": [], "base": None, "storage": "runs", "engine": "transformers", "vllm_python": None,
        "vllm_options": [], "dtype": "auto", "trust_remote_code": False, "exact_answers": True,
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 8, "max_ongoing_requests": 32,
        "max_queued_requests": 128, "upscale_delay_s": 10, "downscale_delay_s": 300, "drain_s": 120, "num_cpus": 1,
        "num_gpus": 0, "cities_per_replica": 8, "photo_memory_mb": 256, "chat_memory_mb": 0, "batch_size": 8,
        "batch_wait_s": 0.01, "http_replicas": 2, "image_replicas": 2, "image_processes": 2, "image_cpus": 0,
        "max_body_mb": 20, "request_memory_mb": 1000, "max_megapixels": 50, "decode_s": 10, "max_tokens": 512,
        "request_s": 300, "require_keys": False, "rate_limit": 0, "forwarded": False, "image_domains": [],
        "private_addresses": False, "fetch_s": 10, "allowed_origins": [],
    }  # fmt: skip


def test_replicas_get_all_settings_that_they_use() -> None:
    """What a deployment reads of its settings is among those that are given to it."""
    folder = Path(service.__file__).parent
    for part, files in ((MODEL_SETTINGS, ("engine", "city_models", "model", "vllm_engine")), (IMAGE_SETTINGS, ("images",))):
        used = {name for file in files for name in re.findall(r"settings\.(\w+)", (folder / f"{file}.py").read_text())}
        assert used & service.ServiceSettings.model_fields.keys() <= {*part}
