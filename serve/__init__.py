"""The service: photo in, address and answers out, on Ray Serve.

    serve run serve.config                                        the last trained model
    serve run serve.config model=runs/demo/models/addressvlm max_replicas=8

Run it from the repository root. Every `key=value` is a field of `serve.settings.ServiceSettings`.
"""

from ray.serve import Application

from serve.settings import ServiceSettings

__all__ = ["ServiceSettings", "config"]


def config(args: ServiceSettings) -> Application:
    """Build the application: an HTTP front that checks what comes in, and the model behind it; each scales by itself.

    Raises:
        InputError: a setting is wrong, or there is no such model.
    """
    from serve.app import HttpApi
    from serve.model import LocalizerDeployment

    model = LocalizerDeployment.options(
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
            "upscale_delay_s": args.upscale_delay_s,
            "downscale_delay_s": args.downscale_delay_s,
        },
    ).bind(str(args.folder()), args.dtype, args.batch_size, args.batch_wait_s)
    http = HttpApi.options(
        autoscaling_config={"min_replicas": 1, "max_replicas": args.max_replicas, "target_ongoing_requests": 32},
    )
    return http.bind(model, args)
