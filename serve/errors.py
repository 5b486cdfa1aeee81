"""Every error leaves the service as the OpenAI error object, with the status that fits."""

import functools
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from addressvlm import InputError

LOGGING_CONFIG = {"enable_access_log": False}  # Ray Serve's own; the HTTP front writes an access log itself
logger = logging.getLogger("ray.serve")


class ApiError(Exception):
    """A response other than 200: status, a sentence, and the parameter and code for programs."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)  # all arguments, or it can't be pickled
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s

    def body(self) -> dict[str, object]:
        """The OpenAI error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def overloaded() -> ApiError:
    """The error for a request that can't be taken now."""
    return ApiError(503, "The service is busy: try again in a moment.", code="overloaded")


def to_api_error(error: Exception) -> ApiError:
    """Any exception as the error that the caller may see; unexpected ones are logged."""
    if isinstance(error, RayTaskError):  # raised in another replica's process
        error = error.cause
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, BackPressureError | DeploymentUnavailableError | RayActorError | TimeoutError):
        return overloaded()
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{HTTPStatus(error.status_code).phrase}: see /openapi.json for what is served.")
    logger.error("unexpected", exc_info=error)
    return ApiError(500, "The service failed on this request; the operator's log says why.", code="internal_error")


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error as an HTTP response."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def add_exception_handlers(app: FastAPI) -> None:
    """Make `app` answer every exception with the OpenAI error object."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return error_response(to_api_error(error), getattr(error, "headers", None))

    for kind in (ApiError, InputError, RayTaskError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)


def return_user_errors(method: Any) -> Any:
    """Decorate a deployment's method to return the caller's errors: Ray Serve logs a raised one as a failure."""

    @functools.wraps(method)
    async def wrapper(*args: Any) -> Any:
        try:
            return await method(*args)
        except (InputError, ApiError) as error:
            return error

    return wrapper
