"""The HTTP front: checks and decodes what comes in, asks the model, shapes the answer, and serves the page.

Try it:
    curl -F file=@photo.jpg http://localhost:8000/v1/localize
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.body import read_json, read_localize
from serve.chat import Completion, conversation, read_request
from serve.errors import ApiError, in_words, install
from serve.images import bytes_of, decode_image
from serve.model import Question
from serve.settings import ServiceSettings

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript", "map.js": "text/javascript"}
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


@serve.deployment(name="HttpApi", max_ongoing_requests=128, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class HttpApi:
    """The routes. Reserves no CPU: it mostly waits for the model, and a one-CPU machine must do."""

    def __init__(self, model: DeploymentHandle, settings: ServiceSettings) -> None:
        self.model, self.settings = model, settings
        self.decoders = ThreadPoolExecutor(2)  # bounds how many photos are decoded, and held decoded, at a time
        self.app_name = serve.get_replica_context().app_name
        self.known: dict[str, Any] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(title="AddressVLM", docs_url=None, redoc_url=None)
        install(app)
        app.add_middleware(GZipMiddleware, minimum_size=4096)
        app.post("/v1/localize", openapi_extra=LOCALIZE_BODY)(self.localize)
        app.post("/v1/chat/completions", openapi_extra=CHAT_BODY)(self.chat)
        app.get("/v1/models")(self.models)
        app.get("/v1/map")(self.map)
        app.get("/healthz")(self.health)
        for name, kind in PAGE_FILES.items():
            app.get(f"/{name}", include_in_schema=False)(_page_file(name or "index.html", kind))
        return app

    async def localize(self, request: Request) -> Response:
        """Photo to address and ranked candidates."""
        data, top_k = await read_localize(request, self.settings.max_body_mb)
        image = await self._decode(data)
        candidates = await self._ask("localize", image, top_k)
        card = await self._card()
        address = {key: candidates[0][key] for key in ("street", "district")}
        return JSONResponse({"address": address, "candidates": candidates, "model": card["model"], "city": card["city"]})

    async def chat(self, request: Request) -> Response:
        """OpenAI-compatible chat about photos."""
        card = await self._card()
        asked = read_request(await read_json(request, self.settings.max_body_mb), card["model"])
        messages, urls = conversation(asked)
        images = [await self._decode(bytes_of(url)) for url in urls]
        limit = asked.max_completion_tokens or asked.max_tokens or self.settings.max_tokens
        question = Question(messages, images, min(limit, self.settings.max_tokens), asked.temperature or 0.0)
        got = await self._ask("answer", question)
        text, finish = got["text"], got["finish"]
        cuts = [at for at in map(text.find, asked.stops()) if at >= 0]
        if cuts:
            text, finish = text[: min(cuts)], "stop"
        completion = Completion(card["model"], text, finish, got["prompt_tokens"], got["completion_tokens"])
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            return StreamingResponse(completion.events(usage), media_type="text/event-stream")
        return JSONResponse(completion.whole())

    async def models(self) -> Response:
        """The one model that is served."""
        card = await self._card()
        model = {"id": card["model"], "object": "model", "created": 0, "owned_by": "addressvlm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def map(self) -> Response:
        """The city's streets and districts as GeoJSON."""
        card = await self._card()
        if card["map"] is None:
            raise ApiError(404, "This model has no map: its folder holds no gazetteer.geojson.", code="no_map")
        return Response(card["map"], media_type="application/geo+json", headers={"Cache-Control": "max-age=60"})

    async def health(self) -> Response:
        """200 when a model replica is up, 503 while none is."""
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[self.app_name].deployments["Localizer"].replica_states
        up = sum(count for state, count in replicas.items() if str(getattr(state, "value", state)) == "RUNNING")
        if not up and self.settings.min_replicas:
            raise ApiError(503, "No model replica is running.", code="not_ready")
        return JSONResponse({"status": "ok", "replicas": up})

    async def _decode(self, data: bytes) -> Image.Image:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.decoders, decode_image, data, self.settings.max_megapixels)

    async def _ask(self, method: str, *args: Any) -> Any:
        """A call to the model. A full queue is told here, because Serve replaces any handler for it by its own."""
        try:
            return await getattr(self.model, method).remote(*args)
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise in_words(error) from None

    async def _card(self) -> dict[str, Any]:
        if self.known is None:
            self.known = await self._ask("card")
        return self.known


def _page_file(name: str, kind: str) -> Any:
    async def serve_file() -> Response:
        return Response((PAGE / name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    return serve_file


def _json_schema(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": required, "properties": properties}}


_TOP_K = {"type": "integer", "minimum": 1, "maximum": 50, "default": 5}
LOCALIZE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": _json_schema(["file"], file={"type": "string", "format": "binary"}, top_k=_TOP_K),
            "application/json": _json_schema(
                ["image"], image={"type": "string", "description": "base64 or a data URL"}, top_k=_TOP_K
            ),
        },
    }
}
CHAT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": _json_schema(
                ["model", "messages"],
                model={"type": "string"},
                messages={"type": "array", "items": {"type": "object"}},
                max_tokens={"type": "integer"},
                temperature={"type": "number"},
                stream={"type": "boolean"},
            )
        },
    }
}
