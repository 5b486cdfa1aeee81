"""The HTTP front: its routes check a request, call the model and shape its answer.

Try it:
    curl -F file=@photo.jpg http://localhost:8000/v1/localize
"""

import asyncio
import logging
import mimetypes
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.routing import Route

from addressvlm.answers.address_distribution import Localization
from addressvlm.answers.calibration import NEVER, Calibration
from serve.api_docs import examples, render
from serve.backend import Backend
from serve.chat import MODEL_ALIAS, ChatResponse, conversation, parse_chat
from serve.cities import City, CityData, pick_city
from serve.errors import LOGGING_CONFIG, ApiError, add_exception_handlers
from serve.metrics import MetricsReplica, ServiceMetrics, render_metrics
from serve.middleware import AccessMiddleware
from serve.requests import ChatQuery, LocalizeQuery, read_json, read_localize
from serve.schemas import (
    ChatCompletion,
    ChatRequest,
    CityList,
    Error,
    Health,
    LocalizeAnswer,
    LocalizeFields,
    LocalizeForm,
    LocalizeRequest,
    ModelAnswer,
    ModelList,
    PriorFields,
    SampleAnswer,
    SampleList,
)
from serve.settings import ServiceSettings

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}
TOP_K = 5
HEALTH_S = 1.0  # the controller is asked at most this often

# ---- what FastAPI can't derive for /openapi.json: error responses, and bodies that are read by hand to bound their size
ERRORS = {
    400: "Something in the request is wrong",
    401: "No valid key",
    404: "No such city or model, or it has no gazetteer",
    408: "It took too long to arrive",
    413: "Too large",
    415: "Another content type",
    429: "More requests than allowed",
    500: "The service failed",
    501: "Too many addresses for the engine that is served",
    503: "Busy, or no model replica runs: try again",
}
READ_ERRORS = (429, 500, 503)
POST_ERRORS = (400, 404, 408, 413, 415, *READ_ERRORS)
GREY = (  # a photo of 32 x 24 pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAYCAIAAAAUMWhjAAAAJUlEQVR42u3NQQEAAAQEMCS/6Erw2wqsk9SnqWcCgUAgEAgENxaFKgGwmzD9ZgAA"
    "AABJRU5ErkJggg=="
)
CHAT_PARTS = [{"type": "image_url", "image_url": {"url": GREY}}, {"type": "text", "text": "Which street is this?"}]
CHAT_EXAMPLE = {"model": MODEL_ALIAS, "messages": [{"role": "user", "content": CHAT_PARTS}], "max_tokens": 8}
CITY_PARAMETER = {"name": "city", "in": "query", "required": False, "schema": {"type": "string"}}
EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "a chat.completion.chunk, or [DONE]"}}}
SCHEMA_PATH = "#/components/schemas/{model}"
REQUESTS = (LocalizeFields, LocalizeRequest, LocalizeForm, ChatRequest)


def _responses(statuses: Sequence[int], media_type: str = "", schema: Any = None) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, and its 200 response if that is of another type than JSON."""
    responses: dict[int | str, dict[str, Any]] = {s: {"model": Error, "description": ERRORS[s]} for s in statuses}
    return responses | ({200: {"content": {media_type: {"schema": schema}}}} if media_type else {})


def _request_body(example: dict[str, Any], **schemas: type[BaseModel]) -> dict[str, Any]:
    """A request body as JSON (`json=`, with the example) and as a form (`form=`)."""
    types = {"json": "application/json", "form": "multipart/form-data"}
    content = {types[key]: {"schema": {"$ref": SCHEMA_PATH.format(model=s.__name__)}} for key, s in schemas.items()}
    content["application/json"]["example"] = example
    return {"requestBody": {"required": True, "content": content}}


class Routes:
    """The routes over a backend."""

    def __init__(self, settings: ServiceSettings, cities: Sequence[City], backend: Backend, metrics: ServiceMetrics) -> None:
        self.settings, self.cities, self.backend, self.metrics = settings, list(cities), backend, metrics
        self.city_data = {city.id: CityData(city) for city in cities}
        self._health_lock, self._health_until = asyncio.Lock(), 0.0
        self._replicas: int | None = None

    def app(self, key_hashes: Sequence[str] = (), **access: Any) -> FastAPI:
        """The ASGI application; the arguments go to `serve.middleware.AccessMiddleware`."""
        app = FastAPI(
            title="AddressVLM",
            version="1",
            description="Photo in, street address out.",
            docs_url=None,
            redoc_url=None,
            generate_unique_id_function=lambda route: re.sub(
                r"\W+", "_", f"{min(route.methods).lower()}{route.path_format}"
            ).strip("_"),
        )
        add_exception_handlers(app)
        self._add_routes(app, bool(key_hashes))
        pages = ["/" if file.name == "index.html" else f"/{file.name}" for file in sorted(PAGE.iterdir())]
        for path in pages:
            app.get(path, include_in_schema=False)(self.page_file)
        app.get("/docs", include_in_schema=False)(
            lambda: Response(render(app.openapi()), media_type="text/html", headers=PAGE_HEADERS)
        )
        pages.append("/docs")
        routes = [route for route in app.routes if isinstance(route, Route)]
        app.add_middleware(GZipMiddleware, minimum_size=4096)
        access |= {"settings": self.settings, "metrics": self.metrics, "key_hashes": key_hashes}
        app.add_middleware(AccessMiddleware, routes=routes, pages=pages, **access)
        if self.settings.allowed_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        return app

    def _add_routes(self, app: FastAPI, keys: bool) -> None:
        """Add the API with its documentation; `keys`: callers need one, which `AccessMiddleware` checks."""
        bearer = Security(HTTPBearer(scheme_name="key", auto_error=False))
        api = APIRouter(dependencies=[bearer], responses=_responses([401])) if keys else APIRouter()
        api.post(
            "/v1/localize",
            response_model=LocalizeAnswer,
            responses=_responses([*POST_ERRORS, 501]),
            openapi_extra=_request_body({"image": GREY, "top_k": 3}, json=LocalizeRequest, form=LocalizeForm),
        )(self.localize)
        api.post(
            "/v1/chat/completions",
            response_model=ChatCompletion,
            responses=_responses(POST_ERRORS, "text/event-stream", EVENT),
            openapi_extra=_request_body(CHAT_EXAMPLE, json=ChatRequest),
        )(self.chat)
        api.get("/v1/models", responses=_responses(READ_ERRORS))(self.list_models)
        api.get("/v1/models/{model:path}", responses=_responses([404, *READ_ERRORS]))(self.model)
        api.get("/v1/cities", responses=_responses(READ_ERRORS))(self.list_cities)
        api.get(
            "/v1/map",
            response_class=Response,
            responses=_responses([400, 404, *READ_ERRORS], "application/geo+json", {"type": "object"}),
            openapi_extra={"parameters": [CITY_PARAMETER]},
        )(self.city_map)
        api.get("/v1/samples", responses=_responses([400, 404, *READ_ERRORS]), openapi_extra={"parameters": [CITY_PARAMETER]})(
            self.list_samples
        )
        api.get(
            "/v1/samples/{number}",
            response_class=Response,
            responses=_responses([400, 404, *READ_ERRORS], "image/jpeg", {"type": "string", "format": "binary"}),
            openapi_extra={"parameters": [CITY_PARAMETER]},
        )(self.sample)
        metrics_responses = _responses([500], "text/plain", {"type": "string"})
        api.get("/metrics", response_class=Response, responses=metrics_responses)(self.export_metrics)
        app.include_router(api)
        app.get("/healthz", responses=_responses([500, 503]))(self.health)
        generate = app.openapi

        @cache
        def openapi() -> dict[str, Any]:
            modes: Any = [(model, "validation") for model in REQUESTS]
            document, (_, schemas) = generate(), models_json_schema(modes, ref_template=SCHEMA_PATH)
            document["components"]["schemas"] |= schemas["$defs"]
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    operation["x-codeSamples"] = examples(method, path)
                    operation["responses"].pop("422", None)  # FastAPI's own, for parameters of another type than text
            return document

        app.openapi = openapi  # type: ignore[method-assign]

    async def localize(self, request: Request) -> Response:
        """Rank the addresses of a photo."""
        source, fields = await read_localize(request)
        city = pick_city(self.cities, fields.city)
        data = self.city_data[city.id]
        gazetteer = await asyncio.to_thread(lambda: data.gazetteer)
        if not (gazetteer and gazetteer.addresses):
            raise ApiError(404, "This model has no gazetteer: it can chat, but rank no addresses.", code="no_gazetteer")
        prior = (fields.prior or PriorFields()).prior()
        await asyncio.to_thread(prior.log_weights, gazetteer)  # InputError here, not among the other photos of a batch
        (pixels,) = await self._read_images(request, [source])
        result = await self.backend.localize(LocalizeQuery(city.id, pixels, fields.top_k or TOP_K, prior, fields.threshold))
        self.metrics.count("addressvlm_localized", city.id, str(result.known).lower())
        self.metrics.observe("addressvlm_confidence", result.confidence, city.id)
        request.state.log_fields = {"city": city.id, "known": result.known, "confidence": round(result.confidence, 4)}
        await asyncio.to_thread(lambda: data.streets)
        calibration = await asyncio.to_thread(lambda: data.calibration)
        candidates = [data.candidate(c.street, c.district, c.probability) for c in result.candidates]
        address = {key: candidates[0][key] for key in ("street", "district")} if result.known else None
        body = {
            "known": result.known,
            "reason": None if result.known else _reason(result, fields.threshold, calibration),
            "confidence": result.confidence,
            "threshold": result.threshold,
            "address": address,
            "candidates": candidates,
            "city": city.name,
            "model": city.model,
            "request_id": request.state.request_id,
        }
        return JSONResponse(body)

    async def chat(self, request: Request) -> Response:
        """OpenAI-compatible chat about photos."""
        fields = parse_chat(await read_json(request))
        city = self._city_of_model(fields.model)
        messages, urls = conversation(fields)
        images = await self._read_images(request, urls)
        query = ChatQuery(city.id, messages, images, fields.sampling(self.settings.max_tokens))
        response = ChatResponse(city.model, bool(fields.logprobs))
        request.state.log_fields = {"city": city.id, "images": len(images), "stream": bool(fields.stream)}
        if fields.stream:
            usage = bool(fields.stream_options and fields.stream_options.include_usage)
            chunks = await self.backend.stream_chat(query)
            events = self._count_after(request, response, response.events(chunks, usage))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        body = response.completion(await self.backend.chat(query))
        self._count_tokens(response)
        return JSONResponse(body)

    def _city_of_model(self, model: str) -> City:
        """The city of a model's name. ApiError: 404 there is none."""
        for city in self.cities:
            if model == city.model or (model == MODEL_ALIAS and len(self.cities) == 1):
                return city
        served = ", ".join(f"'{city.model}'" for city in self.cities)
        raise ApiError(404, f"No model '{model[:100]}' here, this service has {served}.", "model", "model_not_found")

    async def _read_images(self, request: Request, sources: Sequence[bytes | str]) -> list[np.ndarray]:
        """The pixels of photos, which count as the request's memory; none is read any more once one can't be."""

        async def read(source: bytes | str) -> np.ndarray:
            pixels = await self.backend.read_image(source)
            request.state.memory.take(pixels.nbytes)
            return pixels

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(read(source)) for source in sources]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _count_after(self, request: Request, response: ChatResponse, events: AsyncIterator[str]) -> AsyncIterator[str]:
        request.state.stream_status = 499  # until it is complete
        try:
            async for event in events:
                yield event
            request.state.stream_status = response.error.status if response.error else 200
        finally:
            self._count_tokens(response)

    def _count_tokens(self, response: ChatResponse) -> None:
        for kind, tokens in zip(("prompt", "completion"), response.usage, strict=True):
            self.metrics.count("addressvlm_tokens", kind, by=tokens)

    def _data_of_query(self, request: Request) -> CityData:
        """Of the city in the query string. ApiError: see `pick_city`."""
        return self.city_data[pick_city(self.cities, request.query_params.get("city")).id]

    async def list_models(self) -> ModelList:
        """List the models, one per city."""
        return ModelList(data=[ModelAnswer(id=city.model) for city in self.cities])

    async def model(self, model: str) -> ModelAnswer:
        """One model."""
        return ModelAnswer(id=self._city_of_model(model).model)

    async def list_cities(self) -> CityList:
        """List the cities."""
        return CityList(data=await asyncio.to_thread(lambda: [data.summary for data in self.city_data.values()]))

    async def city_map(self, request: Request) -> Response:
        """A city's streets and districts as GeoJSON."""
        data = self._data_of_query(request)
        headers, body = {"Cache-Control": "private, max-age=60"}, await asyncio.to_thread(lambda: data.geojson)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            body = await asyncio.to_thread(lambda: data.geojson_gzip)
        return Response(body, media_type="application/geo+json", headers=headers)

    async def list_samples(self, request: Request) -> SampleList:
        """List photos to try, of places that training never saw."""
        data = self._data_of_query(request)
        count, city = len(await asyncio.to_thread(lambda: data.samples)), quote(data.city.id)
        return SampleList(data=[SampleAnswer(id=n, url=f"v1/samples/{n}?city={city}") for n in range(count)])

    async def sample(self, request: Request, number: str) -> Response:
        """A photo to try, as JPEG."""
        data = self._data_of_query(request)
        photos = await asyncio.to_thread(lambda: data.samples)
        if number not in map(str, range(len(photos))):
            raise ApiError(404, f"No sample photo '{number[:20]}' here, see /v1/samples.", code="sample_not_found")
        return Response(photos[int(number)], media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def health(self) -> Health:
        """200 if a model replica runs, 503 if none does."""
        async with self._health_lock:  # one question to the controller, however many ask
            if time.monotonic() >= self._health_until:
                self._replicas = None
                with suppress(TimeoutError):
                    self._replicas = await self.backend.running_replicas()
                self._health_until = time.monotonic() + HEALTH_S
        if self._replicas is None:
            raise ApiError(503, "Ray Serve does not say whether a model replica is running.", code="not_ready")
        if not self._replicas and self.settings.min_replicas:
            raise ApiError(503, "No model replica is running.", code="not_ready")
        return Health(replicas=self._replicas)

    async def export_metrics(self) -> Response:
        """The metrics of all replicas as Prometheus text."""
        return Response(render_metrics(await self.backend.collect_metrics()), media_type=CONTENT_TYPE_LATEST)

    async def page_file(self, request: Request) -> Response:
        """A file of the page, by the path of its route."""
        file = PAGE / (request.scope["route"].path[1:] or "index.html")
        media_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return Response(file.read_bytes(), media_type=media_type, headers=PAGE_HEADERS)


def _reason(result: Localization, requested: float | None, calibration: Calibration) -> str:
    """Why an address does not count as known."""
    confidence = f"The confidence, {result.confidence:.3f}, is not above"
    if requested is not None:
        return f"{confidence} the requested threshold, {requested:g}."
    if result.threshold < NEVER:
        return f"{confidence} {result.threshold:.3f}, from which on a precision of {calibration.target:.0%} is promised."
    places = calibration.measured.get("places", "few")
    return f"The {places} places that the model was checked on don't allow to promise a precision of {calibration.target:.0%}."


@serve.deployment(
    name="HttpApi",
    max_ongoing_requests=1024,  # above `ServiceSettings.max_in_flight`, so that the front refuses, with its own error
    max_queued_requests=512,  # in Serve's proxy, whose memory would grow without end; beyond it Serve answers 503 itself
    ray_actor_options={"num_cpus": 0},  # it mostly waits for the model, and must fit on a one-CPU machine
    logging_config=LOGGING_CONFIG,
)
@serve.ingress()
class HttpApi(MetricsReplica):
    """The routes as a deployment.

    Args:
        rate_limit: the service's `RateLimit`, if there is one.
        key_hashes: SHA-256 of the API keys; without any, everyone may call.
    """

    def __init__(
        self,
        model: DeploymentHandle,
        images: DeploymentHandle,
        rate_limit: DeploymentHandle | None,
        settings: ServiceSettings,
        cities: Sequence[City],
        key_hashes: Sequence[str],
    ) -> None:
        self.key_hashes, self.rate_limit, self.metrics = list(key_hashes), rate_limit, ServiceMetrics()
        backend = Backend(model, images, len(cities) > 1, settings.request_s)
        self.routes = Routes(settings, cities, backend, self.metrics)
        logger = logging.getLogger("addressvlm.access")  # one line of JSON per request, on standard output
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [logging.StreamHandler(sys.stdout)]

    def __serve_build_asgi_app__(self) -> FastAPI:
        wait = self.rate_limit.wait.remote if self.rate_limit else None
        return self.routes.app(self.key_hashes, wait=wait, set_request_id=False)
