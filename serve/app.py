"""The HTTP front as a Ray Serve deployment: the routes of `serve.api` over the other deployments."""

import asyncio
import logging
import sys
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.api import Api
from serve.backend import METRICS_S, Backend
from serve.cities import City
from serve.errors import QUIET
from serve.records import Records
from serve.settings import ServiceSettings


@serve.deployment(
    name="HttpApi",
    max_ongoing_requests=1024,  # more than `ServiceSettings.at_once`, so that what is too much is refused in our words
    max_queued_requests=512,  # in the proxy, whose memory would grow without end; beyond it Serve answers 503 itself
    ray_actor_options={"num_cpus": 0},
    logging_config=QUIET,
)
@serve.ingress()
class HttpApi:
    """The front. Reserves no CPU: it mostly waits for the model, and a one-CPU machine must do.

    Args:
        digests: SHA-256 of the keys that may ask; none: everyone may.
        limit: the one `RateLimit` of the service, if there is one.
    """

    def __init__(
        self,
        model: DeploymentHandle,
        images: DeploymentHandle,
        limit: DeploymentHandle | None,
        settings: ServiceSettings,
        cities: Sequence[City],
        digests: Sequence[str],
    ) -> None:
        self.settings, self.digests, self.limit = settings, list(digests), limit
        self.records, self.context = Records(), serve.get_replica_context()
        self.backend = Backend(model, images, self.records, len(cities) > 1, settings.request_s)
        self.api = Api(settings, cities, self.backend, self.records, self._up, self._counts)
        _log_to_stdout()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.api.app(digests=self.digests, wait=self.limit.wait.remote if self.limit else None, set_id=False)

    async def collect(self) -> tuple[str, list[Metric]]:
        """What was counted here, for `/metrics`."""
        return str(self.context.replica_tag), self.records.collect()

    async def _counts(self) -> Mapping[str, Sequence[Metric]]:
        """The counts of all replicas, those of the other fronts too."""
        fronts = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
        told = await fronts.broadcast("collect").results_async(timeout_s=METRICS_S, return_exceptions=True)
        return dict(one for one in told if isinstance(one, tuple)) | await self.backend.counts()

    async def _up(self) -> int:
        """How many model replicas run."""
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[self.context.app_name].deployments["Localizer"].replica_states
        return sum(count for state, count in replicas.items() if str(getattr(state, "value", state)) == "RUNNING")


def _log_to_stdout() -> None:
    """The access log, one line of JSON a request, on the replica's standard output."""
    logger = logging.getLogger("addressvlm.access")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [logging.StreamHandler(sys.stdout)]
