"""The service: photo in, address and answers out, on Ray Serve.

    serve run serve.config                                        the last trained model
    serve run serve.config model=runs/demo/models/addressvlm max_replicas=8
    serve deploy serve/production.yaml                            on a running cluster

Run it from the repository root. `serve.config` is the function `config` of this package; every `key=value` is a field of
`serve.settings.ServiceSettings`.
"""

from importlib.util import find_spec

from ray.serve import Application, deployment

from serve.settings import IMAGE_SETTINGS, MODEL_SETTINGS, ServiceSettings, SettingsError

__all__ = ["ServiceSettings", "config"]


def config(args: ServiceSettings) -> Application:
    """Build the application: HTTP front, image decoding and model, deployments that scale independently.

    Raises:
        InputError: a setting is wrong, or there is no such model.
    """
    from serve.cities import find_cities
    from serve.errors import LOGGING_CONFIG
    from serve.images import ImagesDeployment
    from serve.middleware import API_KEYS, RateLimit, key_hashes
    from serve.routes import HttpApi

    cities, hashes = find_cities(args), key_hashes()
    if args.require_keys and not hashes:
        raise SettingsError(f"require_keys is set and there is no key: put keys into {API_KEYS}, separated by commas.")
    delays = {"upscale_delay_s": args.upscale_delay_s, "downscale_delay_s": args.downscale_delay_s}
    if args.engine == "vllm":
        if args.vllm_python is None and find_spec("vllm") is None:
            raise SettingsError("engine=vllm needs vLLM: install it here, or give vllm_python=<a Python that has it>.")
        from serve.vllm_engine import VllmDeployment as ModelDeployment
    else:
        from serve.model import LocalizerDeployment as ModelDeployment  # type: ignore[assignment]
    model = ModelDeployment.options(
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
    rate_limit = None
    if args.rate_limit:
        limiter = deployment(RateLimit, name="RateLimit", logging_config=LOGGING_CONFIG)
        limiter = limiter.options(num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
        rate_limit = limiter.bind(args.rate_limit)
    model, images = model.bind(args.subset(MODEL_SETTINGS), cities), images.bind(args.subset(IMAGE_SETTINGS))
    return http.bind(model, images, rate_limit, args, cities, hashes)
