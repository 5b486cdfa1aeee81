"""The service does what its OpenAPI document says, tested by schemathesis. Routes without Ray, over HTTP.

More examples, and all of schemathesis' own cases:
    SCHEMATHESIS_EXAMPLES=1000 python -m pytest tests/serve/test_schemas.py
"""

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis.config import SchemathesisConfig

from serve.metrics import ServiceMetrics
from serve.routes import Routes
from serve.settings import ServiceSettings
from tests.support.in_process_service import application

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
    app = application(tmp_path_factory.mktemp("schema"), max_body_mb=2, max_megapixels=4, max_tokens=4)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    print(f"schemathesis: {tried.total()} requests, by status {dict(sorted(tried.items()))}")


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_service_does_as_documented(case: schemathesis.Case, url: str) -> None:
    response = case.call(base_url=url, timeout=60)
    tried[response.status_code] += 1
    case.validate_response(response)


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
