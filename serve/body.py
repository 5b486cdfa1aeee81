"""Request bodies: read no more than allowed, then as JSON or as a form."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve.errors import ApiError
from serve.images import bytes_of

MAX_TOP_K = 50
DEFAULT_TOP_K = 5


async def read_body(request: Request, max_mb: float) -> bytes:
    """The body, refused as soon as it is known to be too large.

    Raises:
        ApiError: 413.
    """
    limit = int(max_mb * 1e6)
    refusal = ApiError(413, f"The request is larger than {max_mb:g} MB: send a smaller photo.", code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise refusal
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise refusal
        chunks.append(chunk)
    return b"".join(chunks)


async def read_json(request: Request, max_mb: float) -> Any:
    """The body as JSON.

    Raises:
        ApiError: 400 not JSON, 413 too large.
    """
    try:
        return json.loads(await read_body(request, max_mb))
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.") from None


async def read_localize(request: Request, max_mb: float) -> tuple[bytes, int]:
    """Encoded image and number of candidates, from a form's `file` and `top_k` or from JSON's `image` and `top_k`.

    Raises:
        ApiError: 400 a field is missing or wrong, 413 too large, 415 another content type.
        InputError: the image is a web address or not base64.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        payload = await read_json(request, max_mb)
        if not isinstance(payload, dict) or not isinstance(payload.get("image"), str):
            raise ApiError(400, 'Send {"image": "<base64 or data URL>"}, and "top_k" if wanted.', param="image")
        return bytes_of(payload["image"]), _top_k(payload.get("top_k"))
    if kind == "multipart/form-data":
        fields = await _form(request, max_mb)
        if not isinstance(fields.get("file"), UploadFile):
            raise ApiError(400, "The form has no file: send the photo in the field 'file'.", param="file")
        return await fields["file"].read(), _top_k(fields.get("top_k"))
    raise ApiError(415, "Send the photo as multipart/form-data (field 'file') or as application/json (key 'image').")


async def _form(request: Request, max_mb: float) -> dict[str, Any]:
    body = await read_body(request, max_mb)

    async def once() -> AsyncIterator[bytes]:
        yield body

    try:
        return dict(await MultiPartParser(request.headers, once(), max_files=1, max_fields=8).parse())
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"The form can't be read: {getattr(error, 'message', 'it has no boundary')}.") from None


def _top_k(value: Any) -> int:
    try:
        number = DEFAULT_TOP_K if value is None else int(value)
    except (TypeError, ValueError):
        number = 0
    if isinstance(value, (bool, float)) or not 1 <= number <= MAX_TOP_K:
        raise ApiError(400, f"top_k must be a whole number from 1 to {MAX_TOP_K}.", param="top_k")
    return number
