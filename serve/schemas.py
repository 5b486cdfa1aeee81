"""Request bodies: read no more than allowed, then as JSON or as a form, then checked field by field."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from addressvlm.answers.priors import Circle, Prior
from addressvlm.answers.types import Sampling
from serve.errors import ApiError

BODY_S = 120  # in which a body must have come
MAX_TOP_K = 50
MAX_NAMES = 1000  # streets or districts of one prior
Name = Annotated[str, Field(min_length=1, max_length=200)]
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CircleFields(_Strict):
    """A rough position."""

    lat: float = Field(ge=-90, le=90)
    lon: float = Field(ge=-180, le=180)
    radius_m: float = Field(ge=1, le=1e6)
    soft: bool = Field(False, description="rule nothing out, weigh streets by their distance")


class PriorFields(_Strict):
    """What is known beforehand; its parts hold together."""

    districts: list[Name] = Field([], max_length=MAX_NAMES)
    streets: list[Name] = Field([], max_length=MAX_NAMES)
    circle: CircleFields | None = None
    weights: dict[Name, Annotated[float, Field(ge=0)]] = Field({}, max_length=MAX_NAMES, description="street -> weight")

    def prior(self) -> Prior:
        """The same for the model."""
        circle = Circle(**self.circle.model_dump()) if self.circle else None
        return Prior(tuple(self.districts), tuple(self.streets), circle, self.weights or None)


class LocalizeFields(_Strict):
    """A question for the address of a photo, beside the photo itself."""

    city: str | None = Field(None, max_length=200, description="id of a city; needed where there are several")
    prior: PriorFields | None = None
    top_k: int | None = Field(None, ge=1, le=MAX_TOP_K, description="how many candidates; 5 if not given")
    threshold: float | None = Field(None, ge=0, le=1, description="confidence above which an address is told as known")


class LocalizeRequest(LocalizeFields):
    """The question as JSON."""

    image: str = Field(description="base64, a data URL, or a web address of a host that this service allows")


async def read_body(request: Request, max_mb: float) -> bytes:
    """The body, refused as soon as it is known to be too large.

    Raises:
        ApiError: 408 it comes too slowly, 413.
    """
    limit = int(max_mb * 1e6)
    refusal = ApiError(413, f"The request is larger than {max_mb:g} MB: send a smaller photo.", code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise refusal
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise refusal
                body += chunk
    except TimeoutError:
        raise ApiError(408, f"The request took more than {BODY_S} s to arrive: send a smaller photo.") from None
    return bytes(body)


async def read_json(request: Request, max_mb: float) -> Any:
    """The body as JSON.

    Raises:
        ApiError: 400 not JSON, 413 too large, 415 said to be something else.
    """
    if _kind(request) not in ("application/json", ""):
        raise ApiError(415, "Send the request as application/json.")
    return _parsed(await read_body(request, max_mb), "The body")


async def read_localize(request: Request, max_mb: float) -> tuple[bytes | str, LocalizeFields]:
    """Encoded image and what is asked, from a form (`file` and the other fields as text) or from JSON (`image`).

    Raises:
        ApiError: 400 a field is missing or wrong, 413 too large, 415 another content type.
    """
    if _kind(request) == "application/json":
        asked = checked(LocalizeRequest, await read_json(request, max_mb))
        return asked.image, asked
    if _kind(request) == "multipart/form-data":
        fields = await _form(request, max_mb)
        file = fields.pop("file", None)
        if not isinstance(file, UploadFile):
            raise ApiError(400, "The form has no file: send the photo in the field 'file'.", param="file")
        return await file.read(), checked(
            LocalizeFields, {name: _field(name, value) for name, value in fields.items() if value}
        )
    raise ApiError(415, "Send the photo as multipart/form-data (field 'file') or as application/json (key 'image').")


def checked(model: type[Model], payload: Any) -> Model:
    """The payload as what it should be.

    Raises:
        ApiError: 400 naming the first field that is wrong.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    if not first["loc"]:
        raise ApiError(400, "The body must be a JSON object, see /openapi.json.")
    param = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"{param}: there is no such field, known are {', '.join(model.model_fields)}.", param=param)
    raise ApiError(400, f"{param}: {first['msg']}.", param=param)


async def _form(request: Request, max_mb: float) -> dict[str, Any]:
    body = await read_body(request, max_mb)

    async def once() -> AsyncIterator[bytes]:
        yield body

    try:
        return dict(await MultiPartParser(request.headers, once(), max_files=1, max_fields=8).parse())
    except (MultiPartException, KeyError, ValueError) as error:
        raise ApiError(400, f"The form can't be read: {getattr(error, 'message', 'it has no boundary')}.") from None


def _field(name: str, value: Any) -> Any:
    """A form's text as what JSON would have; what can't be read stays text and is refused as such."""
    if not isinstance(value, str) or name == "city":
        return value
    return _parsed(value.encode(), f"The field '{name}'") if name == "prior" else _number(value)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parsed(text: bytes, what: str) -> Any:
    """JSON that is no trap: no NaN, not too deep, and nothing that could not be written again."""
    try:
        parsed = json.loads(text, parse_constant=_refuse)
        if b"\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, f"{what} is not valid JSON.") from None
    return parsed


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


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
    """A conversation, as the model is to go on with it.

    Attributes:
        city: its id.
        messages: turns whose parts {"type": "image"} stand for the images, in order.
        images: uint8 (height, width, 3) each.
    """

    city: str
    messages: list[dict[str, Any]]
    images: list[np.ndarray]
    sampling: Sampling
