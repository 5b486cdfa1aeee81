"""The service's routes over a tiny model in this process, without Ray: for tests with many requests."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

import serve as service
from serve.backend import Backend
from serve.cities import find_cities
from serve.images import Images
from serve.metrics import ServiceMetrics
from serve.middleware import RateLimit, key_hashes
from serve.model import Model
from serve.routes import Routes
from tests.support.running_service import model_folder


class Handle:
    """A `DeploymentHandle` of an object in this process, as far as `Backend` uses it."""

    def __init__(self, served: Any) -> None:
        self.served = served

    def options(self, **_: Any) -> "Handle":
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.served, name)
        return type("Method", (), {"remote": staticmethod(lambda *args: Response(method(*args)))})


class Response:
    """A `DeploymentResponse`, or its generator, of a coroutine or an asynchronous generator."""

    def __init__(self, result: Any) -> None:
        self.result = asyncio.ensure_future(result) if inspect.iscoroutine(result) else result

    def cancel(self) -> None:
        self.closing = self.result.cancel() if isinstance(self.result, asyncio.Future) else asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with suppress(RuntimeError):  # it is just running, or has ended
            await self.result.aclose()

    def __await__(self) -> Any:
        return self.result.__await__()

    def __aiter__(self) -> Any:
        return self

    def __anext__(self) -> Any:
        return self.result.__anext__()


def application(root: Path, **settings: Any) -> FastAPI:
    """The routes of a service with these settings."""
    if not settings.keys() & {"model", "cities"}:
        settings["model"] = str(model_folder(root))
    config = service.ServiceSettings(**settings)
    cities, metrics = find_cities(config), ServiceMetrics()
    model, images = Model(config, cities), Images(config)

    class InProcessBackend(Backend):
        async def running_replicas(self) -> int:
            return 1

        async def collect_metrics(self) -> Any:
            return {"front": metrics.collect(), "model": model.metrics.collect(), "images": images.metrics.collect()}

    backend = InProcessBackend(Handle(model), Handle(images), len(cities) > 1, config.request_s)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await images.decode_pool.close()

    wait = RateLimit(config.rate_limit).wait if config.rate_limit else None
    app = Routes(config, cities, backend, metrics).app(key_hashes=key_hashes(), wait=wait)
    app.router.lifespan_context = lifespan
    return app


@contextmanager
def api(root: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of the routes."""
    with TestClient(application(root, **settings), raise_server_exceptions=False) as client:
        yield client


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """An application over HTTP, in a thread of this process; yields the URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
