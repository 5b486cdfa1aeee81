"""Shared by all jobs: flags, the connection to Ray, and errors as one sentence."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import ray

from addressvlm import InputError
from addressvlm.config import Config, load
from ray_jobs.cluster import Workers, wait_for_workers
from ray_jobs.progress import display


def job_parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags of all jobs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="a preset or a YAML file (default: demo)")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--redo", action="store_true", help="repeat this step even if it is done or its settings changed")
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The configuration of the parsed flags."""
    return load(args.config, args.sets)


def absolute_path(local: str) -> str:
    """The absolute path of a local file or folder, since workers have another working directory; else the text itself."""
    path = Path(local).expanduser()
    return str(path.absolute()) if path.exists() else local


def connect() -> None:
    """Connect to the Ray of this job, of RAY_ADDRESS or of `ray start` on this machine, or start a local one.

    Raises:
        InputError: Ray rejects the token, can't be reached, or does not start.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with display.show("starting Ray"):
            # errors of workers come as exceptions, and what they do is shown by `progress`
            ray.init(log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        message = " ".join(str(error).split())[:300]
        raise InputError(
            f"Ray can't be reached ({message}): start one with `ray start --head`, and set RAY_AUTH_MODE=token both there "
            "and here if ~/.ray/auth_token exists (docs/cluster.md, Tokens)."
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise InputError("Ray did not start within 30 s, this machine is too busy: try again when it has less to do.") from None


def require_evaluation_workers(config: Config, step: str) -> None:
    """Wait until the cluster has the workers of `evaluate`; InputError if it can't have them."""
    need = config.evaluate
    workers = Workers(step, need.workers, need.cpus_per_worker, need.gpus_per_worker, "evaluate")
    wait_for_workers(workers, config.cluster.wait_s)


def run_main(main: Callable[[], None], name: str = "") -> None:
    """Run a job's main; errors that a user can fix end as one sentence and exit status 1. `name`: default: that of the file."""
    try:
        try:
            with display.show(name or Path(sys.argv[0]).stem):
                main()
            with display.show("stopping Ray"):
                ray.shutdown()
        finally:
            display.clear()  # also what the file shows while it loads libraries
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: rerun the command to resume.", file=sys.stderr, flush=True)
        sys.exit(130)
