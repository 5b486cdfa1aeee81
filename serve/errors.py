"""Everything that goes wrong leaves the service as the OpenAI error object, with the status that fits."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.exceptions import RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from addressvlm import InputError

logger = logging.getLogger("ray.serve")


class ApiError(Exception):
    """An answer other than 200: status, a sentence, and the parameter or code that programs look at."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_response(error: ApiError) -> JSONResponse:
    """The OpenAI error object."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse({"error": body}, error.status, headers)


def in_words(error: Exception) -> ApiError:
    """Any exception as what a caller may know of it."""
    if isinstance(error, RayTaskError):  # raised in the model's process
        error = error.cause
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, (BackPressureError, DeploymentUnavailableError)):
        return ApiError(503, "The service is busy: try again in a moment.", code="overloaded")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, f"{HTTPStatus(error.status_code).phrase}: see /openapi.json for what is served.")
    logger.error("unexpected", exc_info=error)
    return ApiError(500, "The service failed on this request; the operator's log says why.", code="internal_error")


def install(app: FastAPI) -> None:
    """Make `app` answer every error in this shape."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return error_response(in_words(error))

    for kind in (ApiError, InputError, RayTaskError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
