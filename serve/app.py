"""The HTTP front as a Ray Serve deployment: the routes of `serve.routes` over the other deployments."""

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.backend import Backend
from serve.cities import City
from serve.errors import LOGGING_CONFIG
from serve.metrics import MetricsReplica, ServiceMetrics
from serve.routes import Routes
from serve.settings import ServiceSettings


@serve.deployment(
    name="HttpApi",
    max_ongoing_requests=1024,  # above `ServiceSettings.max_in_flight`, so that the front refuses, with its own error
    max_queued_requests=512,  # in Serve's proxy, whose memory would grow without end; beyond it Serve answers 503 itself
    ray_actor_options={"num_cpus": 0},  # it mostly waits for the model, and must fit on a one-CPU machine
    logging_config=LOGGING_CONFIG,
)
@serve.ingress()
class HttpApi(MetricsReplica):
    """The HTTP front.

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
        self.key_hashes, self.rate_limit = list(key_hashes), rate_limit
        self.metrics, self.context = ServiceMetrics(), serve.get_replica_context()
        self.backend = Backend(model, images, self.metrics, len(cities) > 1, settings.request_s)
        self.routes = Routes(settings, cities, self.backend, self.metrics, self._running_replicas, self._collect_metrics)
        logger = logging.getLogger("addressvlm.access")  # one line of JSON per request, on standard output
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [logging.StreamHandler(sys.stdout)]

    def __serve_build_asgi_app__(self) -> FastAPI:
        wait = self.rate_limit.wait.remote if self.rate_limit else None
        return self.routes.app(self.key_hashes, wait=wait, set_request_id=False)

    async def _collect_metrics(self) -> Mapping[str, Sequence[Metric]]:
        front = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
        return await self.backend.collect_metrics(front)

    async def _running_replicas(self) -> int:
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[self.context.app_name].deployments["Localizer"].replica_states
        return sum(count for state, count in replicas.items() if str(getattr(state, "value", state)) == "RUNNING")
