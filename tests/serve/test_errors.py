"""Every error becomes the OpenAI error object with its status."""

import pickle

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from addressvlm import InputError
from serve.errors import ApiError, add_exception_handlers, error_response, to_api_error
from tests.support.running_service import check_error

pytestmark = pytest.mark.xdist_group("serve")


def test_unexpected_errors_show_no_internals() -> None:
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
        (DeploymentUnavailableError(DeploymentID("Localizer")), 503),
        (RayActorError(), 503),
        (RayTaskError("f", "trace", InputError("x")), 400),
        (RayTaskError("f", "trace", KeyError("x")), 500),
        (KeyError("x"), 500),
    ],
)
def test_the_error_decides_the_status(error: Exception, status: int) -> None:
    api_error = to_api_error(error)
    assert api_error.status == status
    answer = error_response(api_error)
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) == (status == 503)


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ApiError(429, "Wait.", "x", "y", 7)))
    assert (error.status, error.message, error.param, error.code, error.retry_after_s) == (429, "Wait.", "x", "y", 7)


def test_who_is_to_wait_is_told_how_long() -> None:
    for status, after in ((429, "7"), (503, "7"), (400, None)):
        assert error_response(ApiError(status, "Wait.", retry_after_s=7)).headers.get("retry-after") == after
    kinds = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
    for status, kind in kinds.items():
        assert ApiError(status, "x", "p", "c").body() == {"error": {"message": "x", "type": kind, "param": "p", "code": "c"}}
