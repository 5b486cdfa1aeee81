"""From an HTTP body to the request that the model gets: size limit, JSON or form, validation."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.types import Sampling
from serve.errors import ApiError
from serve.schemas import LocalizeFields, LocalizeRequest

BODY_TIMEOUT_S = 120
Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class LocalizeQuery:
    """The address of a photo.

    Attributes:
        city: its id.
        pixels: uint8 (height, width, 3).
        threshold: confidence above which the answer counts as known; None takes the model's own.
    """

    city: str
    pixels: np.ndarray
    top_k: int
    prior: Prior
    threshold: float | None


@dataclass(frozen=True)
class ChatQuery:
    """A conversation for the model to continue.

    Attributes:
        city: its id.
        messages: turns in which the parts {"type": "image"} stand for the images, in order.
        images: uint8 (height, width, 3) each.
    """

    city: str
    messages: list[dict[str, Any]]
    images: list[np.ndarray]
    sampling: Sampling


async def read_body(request: Request, max_mb: float) -> bytes:
    """Read the body; too large a one is refused before it is read to the end. ApiError: 408 too slow, 413 too large."""
    limit = int(max_mb * 1e6)
    too_large = ApiError(413, f"The request is larger than {max_mb:g} MB: send a smaller photo.", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise ApiError(408, f"The request took more than {BODY_TIMEOUT_S} s to arrive: send a smaller photo.") from None
    return bytes(body)


async def read_json(request: Request, max_mb: float) -> Any:
    """Read a JSON body. ApiError: as `read_body`, 400 not JSON, 415 another content type."""
    if _content_type(request) not in ("application/json", ""):
        raise ApiError(415, "Send the request as application/json.")
    return _parse_json(await read_body(request, max_mb), "The body")


async def read_localize(request: Request, max_mb: float) -> tuple[bytes | str, LocalizeFields]:
    """Read the encoded image and the options, from a form (`file`, the other fields as text) or from JSON (`image`).

    ApiError: as `read_body`, 400 a field is missing or wrong, 415 another content type.
    """
    if _content_type(request) == "application/json":
        fields = validate(LocalizeRequest, await read_json(request, max_mb))
        return fields.image, fields
    if _content_type(request) != "multipart/form-data":
        raise ApiError(415, "Send the photo as multipart/form-data (field 'file') or as application/json (key 'image').")
    body = await read_body(request, max_mb)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = dict(await MultiPartParser(request.headers, stream(), max_files=1, max_fields=8).parse())
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"The form can't be read: {getattr(error, 'message', 'it has no boundary')}.") from None
    file = form.pop("file", None)
    if not isinstance(file, UploadFile):
        raise ApiError(400, "The form has no file: send the photo in the field 'file'.", param="file")
    values = {name: _parse_field(name, value) for name, value in form.items() if value}
    return await file.read(), validate(LocalizeFields, values)


def validate(schema: type[Schema], payload: Any) -> Schema:
    """Check a parsed body against its schema. ApiError: 400 naming the first field that is wrong."""
    try:
        return schema.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if not first["loc"]:
        raise ApiError(400, "The body must be a JSON object, see /openapi.json.")
    param = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"{param}: there is no such field, known are {', '.join(schema.model_fields)}.", param=param)
    raise ApiError(400, f"{param}: {first['msg']}.", param=param)


def _parse_field(name: str, value: Any) -> Any:
    """A form field's text as the value JSON would have; text that is no number stays text, which validation refuses."""
    if not isinstance(value, str) or name == "city":
        return value
    if name == "prior":
        return _parse_json(value.encode(), f"The field '{name}'")
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _parse_json(text: bytes, name: str) -> Any:
    """Parse JSON safely: no NaN, no deep nesting, nothing that can't be encoded again."""
    try:
        parsed = json.loads(text, parse_constant=int)  # raises ValueError for NaN and Infinity
        if b"\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, f"{name} is not valid JSON.") from None
    return parsed


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
