"""The routes: what comes in is checked, the model is asked, the answer is shaped.

Try it:
    curl -F file=@photo.jpg http://localhost:8000/v1/localize
"""

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import Metric
from starlette.routing import Route

from serve.chat import ALIAS, Reply, conversation, read_request
from serve.cities import City, CityGeometry, pick_city
from serve.errors import ApiError, install
from serve.metrics import ServiceMetrics, render_metrics
from serve.middleware import AccessMiddleware
from serve.openapi import openapi_document
from serve.schemas import ChatQuery, LocalizeQuery, PriorFields, read_json, read_localize
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


class ModelBackend(Protocol):
    """What the routes need of `serve.app.Backend`."""

    async def read(self, source: bytes | str) -> np.ndarray: ...
    async def localize(self, where: LocalizeQuery) -> Any: ...
    async def answer(self, question: ChatQuery) -> Any: ...
    async def stream(self, question: ChatQuery) -> Any: ...


class Routes:
    """The routes over a backend.

    Args:
        up: how many model replicas run.
        counts: the counts of all replicas, by replica.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        cities: Sequence[City],
        backend: ModelBackend,
        records: ServiceMetrics,
        up: Callable[[], Awaitable[int]],
        counts: Callable[[], Awaitable[Mapping[str, Sequence[Metric]]]],
    ) -> None:
        self.settings, self.backend, self.records, self.up, self.counts = settings, backend, records, up, counts
        self.cities = list(cities)
        self.places = {city.id: CityGeometry(city) for city in cities}

    def app(self, **access: Any) -> FastAPI:
        """The ASGI application; `access` goes to `serve.middleware.AccessMiddleware`."""
        app = FastAPI(title="AddressVLM", docs_url=None, redoc_url=None)
        install(app)
        app.post("/v1/localize")(self.localize)
        app.post("/v1/chat/completions")(self.chat)
        app.get("/v1/models")(self.models)
        app.get("/v1/cities")(self.list_cities)
        app.get("/v1/map")(self.map)
        app.get("/healthz")(self.health)
        app.get("/metrics")(self.metrics)
        pages = {"/" if file.name == "index.html" else f"/{file.name}": file for file in sorted(PAGE.iterdir())}
        for path, file in pages.items():
            app.get(path, include_in_schema=False)(_page_file(file))
        routes = [route.path for route in app.routes if isinstance(route, Route)]
        app.add_middleware(GZipMiddleware, minimum_size=4096)
        app.add_middleware(
            AccessMiddleware, settings=self.settings, records=self.records, routes=routes, pages=list(pages), **access
        )
        if self.settings.allowed_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        app.openapi = lambda: openapi_document(bool(access.get("digests")))  # type: ignore[method-assign]
        return app

    async def localize(self, request: Request) -> Response:
        """Photo to address and ranked candidates."""
        source, asked = await read_localize(request, self.settings.max_body_mb)
        city = pick_city(self.cities, asked.city)
        places = self.places[city.id]
        if not (await asyncio.to_thread(lambda: places.summary))["addresses"]:
            raise ApiError(404, "This model has no gazetteer: it can chat, but rank no addresses.", code="no_gazetteer")
        pixels = await self.backend.read(source)
        prior = (asked.prior or PriorFields()).prior()
        found = await self.backend.localize(LocalizeQuery(city.id, pixels, asked.top_k or TOP_K, prior, asked.threshold))
        self.records.count("addressvlm_localized", city.id, str(found.known).lower())
        self.records.observe("addressvlm_confidence", found.confidence, city.id)
        _note(request, city=city.id, known=found.known, confidence=round(found.confidence, 4))
        await asyncio.to_thread(lambda: places.streets)
        candidates = [places.candidate(c.street, c.district, c.probability) for c in found.candidates]
        address = {key: candidates[0][key] for key in ("street", "district")} if found.known else None
        body = {
            "known": found.known,
            "confidence": found.confidence,
            "threshold": found.threshold,
            "address": address,
            "candidates": candidates,
            "city": city.name,
            "model": city.model,
            "request_id": request.state.request_id,
        }
        return JSONResponse(body)

    async def chat(self, request: Request) -> Response:
        """OpenAI-compatible chat about photos."""
        asked = read_request(await read_json(request, self.settings.max_body_mb))
        city = self._city_of(asked.model)
        messages, urls = conversation(asked)
        images = list(await asyncio.gather(*map(self.backend.read, urls)))
        question = ChatQuery(city.id, messages, images, asked.sampling(self.settings.max_tokens))
        reply = Reply(city.model, bool(asked.logprobs))
        _note(request, city=city.id, images=len(images), stream=bool(asked.stream))
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = self._counted(reply, reply.events(await self.backend.stream(question), usage))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = reply.whole(await self.backend.answer(question))
        self._count(reply)
        return JSONResponse(whole)

    async def _counted(self, reply: Reply, events: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        finally:
            self._count(reply)

    def _count(self, reply: Reply) -> None:
        for kind, tokens in zip(("prompt", "completion"), reply.used, strict=True):
            self.records.count("addressvlm_tokens", kind, by=tokens)

    async def models(self) -> Response:
        """The models that are served, one a city."""
        models = [{"id": c.model, "object": "model", "created": 0, "owned_by": "addressvlm"} for c in self.cities]
        return JSONResponse({"object": "list", "data": models})

    async def list_cities(self) -> Response:
        """The cities that are served."""
        data = await asyncio.to_thread(lambda: [places.summary for places in self.places.values()])
        return JSONResponse({"object": "list", "data": data})

    async def map(self, request: Request) -> Response:
        """A city's streets and districts as GeoJSON."""
        city = pick_city(self.cities, request.query_params.get("city"))
        places, headers = self.places[city.id], {"Cache-Control": "private, max-age=60"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            geojson = await asyncio.to_thread(lambda: places.zipped)
        else:
            geojson = await asyncio.to_thread(lambda: places.geojson)
        return Response(geojson, media_type="application/geo+json", headers=headers)

    async def health(self) -> Response:
        """200 when a model replica is up, 503 while none is."""
        up = await self.up()
        if not up and self.settings.min_replicas:
            raise ApiError(503, "No model replica is running.", code="not_ready")
        return JSONResponse({"status": "ok", "replicas": up})

    async def metrics(self) -> Response:
        """The counts of all replicas as Prometheus text."""
        return Response(render_metrics(await self.counts()), media_type=CONTENT_TYPE_LATEST)

    def _city_of(self, model: str) -> City:
        """The city whose model a chat asks."""
        for city in self.cities:
            if model == city.model or (model == ALIAS and len(self.cities) == 1):
                return city
        served = ", ".join(f"'{city.model}'" for city in self.cities)
        raise ApiError(404, f"No model '{model[:100]}' here, this service has {served}.", "model", "model_not_found")


def _note(request: Request, **facts: Any) -> None:
    """Facts for the access log."""
    request.state.noted = facts


def _page_file(file: Path) -> Any:
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"

    async def serve_file() -> Response:
        return Response(file.read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    return serve_file
