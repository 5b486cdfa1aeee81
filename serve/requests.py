"""From an HTTP body to the request that the model gets: size limit, JSON or form, validation."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from addressvlm.answers.address_distribution import Prior
from addressvlm.answers.types import Sampling
from serve.errors import ApiError, overloaded
from serve.schemas import LocalizeFields, LocalizeRequest
from serve.settings import BODY_COPIES

GRACE_S = 10  # for the first bytes of a body
MIN_BYTES_PER_S = 8_000  # afterwards, on average
BODY_TIMEOUT_S = 120
MAX_VALUES = 200_000  # of a JSON body: small ones take a hundred bytes of memory each
MAX_ARRIVING = 256  # bodies at the same time; with `ServiceSettings.max_in_flight` below HttpApi's `max_ongoing_requests`
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


class Memory:
    """Bytes that the requests of one HTTP replica hold together, at most `limit`."""

    def __init__(self, limit: float) -> None:
        self.limit, self.used = limit, 0


class Share:
    """What one request holds of a `Memory`."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.held = memory, 0

    def take(self, size: int) -> None:
        """Hold so many more bytes. ApiError: 503 there is no room for them."""
        if self.memory.used + size > self.memory.limit:
            raise overloaded()
        self.memory.used += size
        self.held += size

    def release(self) -> None:
        """Give all of them back."""
        self.memory.used -= self.held
        self.held = 0


class BodyReader:
    """Reads the bodies of requests, several at a time: at most `max_mb` each, and none that arrives too slowly.

    A body has GRACE_S seconds, and one more for each MIN_BYTES_PER_S bytes that came. Where MAX_ARRIVING are on their way,
    another one ends the one that has least time left, so that slow ones keep out nobody.
    """

    def __init__(self, max_mb: float) -> None:
        self.max_mb = max_mb
        self.arriving: set[asyncio.Timeout] = set()

    async def read(self, headers: Headers, receive: Receive, share: Share) -> bytes:
        """The whole body. ApiError: 408 too slow, 413 too large, 503 no room for it. ClientDisconnect: the caller left."""
        limit = int(self.max_mb * 1e6)
        too_large = ApiError(413, f"The request is larger than {self.max_mb:g} MB: send a smaller photo.", code="too_large")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_large
        arriving = [timeout for timeout in self.arriving if not timeout.expired()]
        if len(arriving) >= MAX_ARRIVING:
            min(arriving, key=lambda timeout: timeout.when() or 0).reschedule(0)
        start, body = asyncio.get_running_loop().time(), bytearray()
        try:
            async with asyncio.timeout(GRACE_S) as timeout:
                self.arriving.add(timeout)
                try:
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientDisconnect
                        chunk = message.get("body", b"")
                        if len(body) + len(chunk) > limit:
                            raise too_large
                        share.take(BODY_COPIES * len(chunk))
                        body += chunk
                        if not message.get("more_body", False):
                            return bytes(body)
                        timeout.reschedule(start + min(GRACE_S + len(body) / MIN_BYTES_PER_S, BODY_TIMEOUT_S))
                finally:
                    self.arriving.discard(timeout)
        except TimeoutError:
            raise ApiError(408, "The request arrives too slowly: send a smaller photo, or use a faster connection.") from None


async def read_json(request: Request) -> Any:
    """Read a JSON body. ApiError: 400 not JSON, 415 another content type."""
    if _content_type(request) not in ("application/json", ""):
        raise ApiError(415, "Send the request as application/json.")
    return parse_json(await request.body(), "The body")


async def read_localize(request: Request) -> tuple[bytes | str, LocalizeFields]:
    """Read the encoded image and the options, from a form (`file`, the other fields as text) or from JSON (`image`).

    ApiError: 400 a field is missing or wrong, 415 another content type.
    """
    if _content_type(request) == "application/json":
        fields = validate(LocalizeRequest, await read_json(request))
        return fields.image, fields
    if _content_type(request) != "multipart/form-data":
        raise ApiError(415, "Send the photo as multipart/form-data (field 'file') or as application/json (key 'image').")
    body = await request.body()

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


def parse_json(text: bytes, name: str) -> Any:
    """Parse JSON safely: no NaN, no deep nesting, not more values than fit in memory, nothing that can't be encoded again."""
    if sum(map(text.count, b",[{")) > MAX_VALUES:
        raise ApiError(400, f"{name} has more than {MAX_VALUES} commas and brackets: send fewer values.")
    try:
        parsed = json.loads(text, parse_constant=int)  # raises ValueError for NaN and Infinity
        if b"\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, f"{name} is not valid JSON.") from None
    return parsed


def _parse_field(name: str, value: Any) -> Any:
    """A form field's text as the value JSON would have; text that is no number stays text, which validation refuses."""
    if not isinstance(value, str) or name == "city":
        return value
    if name == "prior":
        return parse_json(value.encode(), f"The field '{name}'")
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
