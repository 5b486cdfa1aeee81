"""The service: photo in, address and answers out, on Ray Serve.

    serve run serve.config                                        the last trained model
    serve run serve.config model=runs/demo/models/addressvlm max_replicas=8
    serve deploy serve/production.yaml                            on a cluster that runs already

Run it from the repository root. Every `key=value` is a field of `serve.settings.ServiceSettings`.
"""

from typing import Any

from ray.serve import Application, deployment

from serve.settings import IMAGES, MODEL, ServiceSettings, SettingsError

__all__ = ["ServiceSettings", "config"]


def config(args: ServiceSettings) -> Application:
    """Build the application: an HTTP front, the decoder of images and the model behind it; each scales by itself.

    Raises:
        InputError: a setting is wrong, or there is no such model.
    """
    from serve.app import HttpApi
    from serve.cities import find_cities
    from serve.errors import QUIET
    from serve.images import ImagesDeployment
    from serve.middleware import RateLimit, key_digests

    cities = find_cities(args)
    delays = {"upscale_delay_s": args.upscale_delay_s, "downscale_delay_s": args.downscale_delay_s}
    model = _engine(args).options(
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        graceful_shutdown_timeout_s=args.drain_s,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
            **delays,
        },
    )
    images = ImagesDeployment.options(
        ray_actor_options={"num_cpus": args.image_cpus},
        max_ongoing_requests=8 * args.image_processes,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": args.image_replicas,
            "target_ongoing_requests": 2 * args.image_processes,
            **delays,
        },
    )
    http = HttpApi.options(
        graceful_shutdown_timeout_s=args.drain_s,
        autoscaling_config={"min_replicas": 1, "max_replicas": args.http_replicas, "target_ongoing_requests": 64, **delays},
    )
    limit = deployment(RateLimit, name="RateLimit", logging_config=QUIET).options(num_replicas=1, max_ongoing_requests=1000)
    one_limit = limit.options(ray_actor_options={"num_cpus": 0}).bind(args.rate_limit) if args.rate_limit else None
    return http.bind(
        model.bind(args.only(MODEL), cities), images.bind(args.only(IMAGES)), one_limit, args, cities, key_digests()
    )


def _engine(args: ServiceSettings) -> Any:
    """The deployment of the model.

    Raises:
        InputError: vLLM is asked for and not installed.
    """
    if args.engine == "vllm":
        from importlib.util import find_spec

        if args.vllm_python is None and find_spec("vllm") is None:
            raise SettingsError("engine=vllm needs vLLM: install it here, or give vllm_python=<a Python that has it>.")
        from serve.vllm_engine import VllmDeployment

        return VllmDeployment
    from serve.model import LocalizerDeployment

    return LocalizerDeployment
