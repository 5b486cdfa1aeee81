"""Everything that goes wrong leaves the service as the OpenAI error object, with the status that fits."""

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

QUIET = {"enable_access_log": False}  # of Serve: the front writes one of its own
logger = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An answer other than 200: status, a sentence, and the parameter or code that programs look at."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after_s: int = 1
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)  # all of them, or it could not be pickled
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s

    def body(self) -> dict[str, object]:
        """The OpenAI error object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy() -> ApiError:
    """What a caller is told whose question can't be taken in now."""
    return ApiError(503, "The service is busy: try again in a moment.", code="overloaded")


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The error as a response."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def user_message(error: Exception) -> ApiError:
    """Any exception as what a caller may know of it."""
    if isinstance(error, RayTaskError):  # raised in another replica's process
        error = error.cause
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, BackPressureError | DeploymentUnavailableError | RayActorError | TimeoutError):
        return busy()
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{HTTPStatus(error.status_code).phrase}: see /openapi.json for what is served.")
    logger.error("unexpected", exc_info=error)
    return ApiError(500, "The service failed on this request; the operator's log says why.", code="internal_error")


def refusals_told(method: Any) -> Any:
    """A deployment's method that returns what a caller did wrong as a value: raised, Serve would log it as a failure."""

    @functools.wraps(method)
    async def told(*args: Any) -> Any:
        try:
            return await method(*args)
        except (InputError, ApiError) as error:
            return error

    return told


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this shape."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return error_response(user_message(error), getattr(error, "headers", None))

    for kind in (ApiError, InputError, RayTaskError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
