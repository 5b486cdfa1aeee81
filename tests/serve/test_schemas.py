"""The service does what its OpenAPI document says, tested by schemathesis. Routes without Ray, over HTTP.

More examples, and all of schemathesis' own cases:
    SCHEMATHESIS_EXAMPLES=1000 python -m pytest tests/serve/test_schemas.py
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from addressvlm.storage.tables import PHOTOS, write_table
from serve.api_docs import URL, render
from serve.metrics import ServiceMetrics
from serve.routes import Routes
from serve.settings import ServiceSettings
from tests.support.in_process_service import application, served
from tests.support.running_service import photo

pytestmark = pytest.mark.xdist_group("serve")
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "5"))
FITTING = ["2xx", "400", "404", "413"]  # what fits the schema may still be no photo, or no model that is served
CONFIG: dict[str, Any] = {
    "checks": {"positive_data_acceptance": {"expected-statuses": FITTING}},
    "phases": {"coverage": {"enabled": EXAMPLES > 100}},
}
routes = Routes(ServiceSettings(), [], None, ServiceMetrics())  # type: ignore[arg-type]
document = routes.app().openapi()
schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict(CONFIG))
tried: Counter[int] = Counter()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("schema")
    rows = [{"id": "1", "place": "1", "street": "Mill Street", "image": {"bytes": photo(), "path": None}}]
    write_table(root / "toytown" / "photos", "test", rows, PHOTOS)
    with served(application(root, max_body_mb=2, max_megapixels=4, max_tokens=4)) as address:
        yield address
    print(f"schemathesis: {tried.total()} requests, by status {dict(sorted(tried.items()))}")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_service_does_as_documented(case: schemathesis.Case, url: str) -> None:
    response = case.call(base_url=url, timeout=60)
    tried[response.status_code] += 1
    case.validate_response(response)


EXAMPLES_OF_ROUTES = [
    (path, sample["lang"], sample["source"])
    for path, methods in document["paths"].items()
    for operation in methods.values()
    for sample in operation["x-codeSamples"]
]


@pytest.mark.parametrize(("path", "language", "source"), EXAMPLES_OF_ROUTES)
def test_the_examples_of_the_documentation_run(path: str, language: str, source: str, url: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    command = [sys.executable, "-c"] if language == "Python" else ["bash", "-c"]
    done = subprocess.run([*command, source.replace(URL, url)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout or (tmp_path / "sample.jpg").exists()
    assert '"error"' not in done.stdout, path


def test_the_documentation_is_a_page_without_scripts(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    outside = set(re.findall(r"(?:src|href)=.(https?://[^\"']+)", page.text))
    assert outside == set()
    for path, methods in document["paths"].items():
        assert all(f"<code>{method.upper()}</code> {path}<" in page.text for method in methods)


def test_the_document_has_every_route_its_schemas_and_its_errors() -> None:
    operations = {
        (path, *methods): set(*(o["responses"] for o in methods.values())) for path, methods in document["paths"].items()
    }
    read = {"200", "429", "500", "503"}
    post = read | {"400", "404", "408", "413", "415"}
    assert operations == {
        ("/v1/localize", "post"): post | {"501"},
        ("/v1/chat/completions", "post"): post,
        ("/v1/models", "get"): read,
        ("/v1/models/{model}", "get"): read | {"404"},
        ("/v1/cities", "get"): read,
        ("/v1/samples", "get"): read | {"400", "404"},
        ("/v1/samples/{number}", "get"): read | {"400", "404"},
        ("/v1/map", "get"): read | {"400", "404"},
        ("/healthz", "get"): {"200", "500", "503"},
        ("/metrics", "get"): {"200", "500"},
    }
    references = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert references <= document["components"]["schemas"].keys()
    assert {"LocalizeRequest", "LocalizeForm", "LocalizeAnswer", "ChatRequest", "ChatCompletion", "Error"} <= references


def test_with_keys_all_but_health_needs_one() -> None:
    paths = routes.app(["hash of a key"]).openapi()["paths"]
    operations = {path: operation for path, methods in paths.items() for operation in methods.values()}
    assert {path for path, operation in operations.items() if operation.get("security") == [{"key": []}]} == {*operations} - {
        "/healthz"
    }
    assert {path for path, operation in operations.items() if "401" in operation["responses"]} == {*operations} - {"/healthz"}


def test_the_documentation_says_what_values_fields_may_have() -> None:
    page = render(document)
    for field, kind in {
        "top_k": "integer, 1 to 50", "threshold": "number, 0 to 1", "prior.circle.lat": "number, -90 to 90",
        "prior.circle.radius_m": "number, 1 to 1000000.0", "prior.districts": "list of string", "n": "integer, 1 to 8",
        "messages.role": "system or developer or user or assistant", "stop": "string or list of string",
        "temperature": "number, 0 to 2", "max_tokens": "integer, 1 to …", "stream_options.include_usage": "boolean",
        "messages.content.image_url.url": "string", "messages.content.type": "text or image_url",
    }.items():  # fmt: skip
        assert re.search(rf"<code>{re.escape(field)}</code>(?: \(required\))?<td>{re.escape(kind)}<td>", page), field
    required = set(re.findall(r"<code>([^<]+)</code> \(required\)", page))
    assert required == {"image", "file", "model", "messages"}
