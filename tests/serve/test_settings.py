"""Settings of the service: wrong ones are one sentence, and each deployment gets its own."""

import pickle
from pathlib import Path

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
