"""The OpenAPI document, from the same models that check what comes in."""

import base64
from functools import cache
from io import BytesIO
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from serve.chat import ALIAS, ChatRequest
from serve.schemas import LocalizeFields, LocalizeRequest


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorBody(_Answer):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(_Answer):
    """The OpenAI error object."""

    error: ErrorBody


class AddressAnswer(_Answer):
    """An address."""

    street: str
    district: str


class CandidateAnswer(AddressAnswer):
    """A possible address, a point on its street, and the street's shape as GeoJSON geometry."""

    probability: float
    lat: float | None
    lon: float | None
    geometry: dict[str, Any] | None


class LocalizeAnswer(_Answer):
    """Where a photo was taken; `address` is null where the confidence is not above the threshold."""

    known: bool
    confidence: float
    threshold: float
    address: AddressAnswer | None
    candidates: list[CandidateAnswer]
    city: str
    model: str
    request_id: str


class CityAnswer(_Answer):
    """A city that is served."""

    id: str
    name: str
    model: str
    streets: int
    districts: int
    addresses: int


class CityList(_Answer):
    """All cities that are served."""

    object: Literal["list"]
    data: list[CityAnswer]


class ModelAnswer(_Answer):
    """A model that can be chatted with."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Answer):
    """All of them."""

    object: Literal["list"]
    data: list[ModelAnswer]


class Health(_Answer):
    """How many model replicas run."""

    status: Literal["ok"]
    replicas: int


class Usage(_Answer):
    """Tokens of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatMessage(_Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(_Answer):
    """One of the answers."""

    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None


class ChatCompletion(_Answer):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


INPUTS: list[type[BaseModel]] = [LocalizeFields, LocalizeRequest, ChatRequest]
OUTPUTS: list[type[BaseModel]] = [Error, LocalizeAnswer, CityList, ModelList, Health, ChatCompletion]
BUSY = {
    "408": "It took too long to arrive",
    "400": "Something in the request is wrong",
    "413": "Too large",
    "415": "Another content type",
    "404": "No such city or model",
}


@cache
def example_photo() -> str:
    """A small grey photo as a data URL."""
    out = BytesIO()
    Image.new("RGB", (32, 24), "grey").save(out, "JPEG", quality=30)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@cache
def openapi_document(keys: bool) -> dict[str, Any]:
    """The document; `keys` says whether the service asks for them."""
    asked: dict[str, Any] = {"security": [{"key": []}]} if keys else {}
    city = {"name": "city", "in": "query", "required": False, "schema": {"type": "string"}}
    post, many = {**BUSY, **_refused(keys)}, _refused(keys)
    ranked = {**post, "501": "Too many addresses for the engine that is served"}
    found = {"404": "No such city, or it has no map", "400": "No city named, and there are several"}
    paths: dict[str, dict[str, Any]] = {
        "/v1/localize": {"post": {"requestBody": _localize_body(), "responses": _responses("LocalizeAnswer", ranked), **asked}},
        "/v1/chat/completions": {"post": {"requestBody": _chat_body(), "responses": _chat_responses(post), **asked}},
        "/v1/models": {"get": {"responses": _responses("ModelList", many), **asked}},
        "/v1/cities": {"get": {"responses": _responses("CityList", many), **asked}},
        "/v1/map": {"get": {"parameters": [city], "responses": _map_responses({**found, **many}), **asked}},
        "/healthz": {
            "get": {"responses": _responses("Health", {"500": "The service failed", "503": "No model replica is running"})}
        },
        "/metrics": {"get": {"responses": _metrics_responses(keys), **asked}},
    }
    for path, item in paths.items():
        for method, operation in item.items():
            operation["operationId"] = f"{method}{path.replace('/', '_')}"
    both = [(model, "validation") for model in INPUTS] + [(model, "serialization") for model in OUTPUTS]
    _, schemas = models_json_schema(both, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    components: dict[str, Any] = {"schemas": schemas["$defs"] | {"LocalizeForm": _form_schema(schemas["$defs"])}}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "AddressVLM", "version": "1", "description": "Photo in, street address out."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _refused(keys: bool) -> dict[str, str]:
    refused = {"429": "More requests than allowed", "500": "The service failed", "503": "Busy: try again"}
    return refused | ({"401": "No valid key"} if keys else {})


def _json(name: str, example: Any = None) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{name}"}}
    return {"application/json": content | ({"example": example} if example else {})}


def _responses(name: str, errors: dict[str, str]) -> dict[str, Any]:
    told = {status: {"description": words, "content": _json("Error")} for status, words in errors.items()}
    return {"200": {"description": "OK", "content": _json(name)}, **told}


def _chat_responses(errors: dict[str, str]) -> dict[str, Any]:
    responses = _responses("ChatCompletion", errors)
    event = {"type": "object", "properties": {"data": {"type": "string", "description": "a chat.completion.chunk, or [DONE]"}}}
    responses["200"]["content"]["text/event-stream"] = {"schema": event}
    return responses


def _map_responses(errors: dict[str, str]) -> dict[str, Any]:
    responses = _responses("Error", errors)
    responses["200"]["content"] = {"application/geo+json": {"schema": {"type": "object"}}}
    return responses


def _metrics_responses(keys: bool) -> dict[str, Any]:
    responses = _responses("Error", {"500": "The service failed"} | ({"401": "No valid key"} if keys else {}))
    responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return responses


def _localize_body() -> dict[str, Any]:
    content = _json("LocalizeRequest", {"image": example_photo(), "top_k": 3})
    content["multipart/form-data"] = {"schema": {"$ref": "#/components/schemas/LocalizeForm"}}
    return {"required": True, "content": content}


def _chat_body() -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": example_photo()}}, {"type": "text", "text": "Which street is this?"}]
    example = {"model": ALIAS, "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    return {"required": True, "content": _json("ChatRequest", example)}


def _form_schema(schemas: dict[str, Any]) -> dict[str, Any]:
    """The form: the same fields, the prior as JSON text, and the file."""
    fields = {name: dict(schema) for name, schema in schemas["LocalizeFields"]["properties"].items()}
    fields["prior"] = {"type": "string", "description": "the prior as JSON"}
    file = {"type": "string", "format": "binary", "description": "JPEG, PNG or WebP"}
    return {"type": "object", "required": ["file"], "properties": {"file": file, **fields}, "additionalProperties": False}
