"""What every job shares: its flags, its Ray, its way of ending."""

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import ray

from addressvlm import InputError
from addressvlm.config import Config, load


def job_parser(description: str) -> argparse.ArgumentParser:
    """The flags that all jobs have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="demo", help="a preset's name or a YAML file (default: demo)")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--redo", action="store_true", help="do this step again even if it is done or its settings changed")
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The configuration that the flags ask for."""
    return load(args.config, args.sets)


def absolute_path(local: str) -> str:
    """A local file or folder by a name that means the same in a worker, whose working directory is another; else the text."""
    path = Path(local).expanduser()
    return str(path.absolute()) if path.exists() else local


def connect() -> None:
    """Join the Ray around this process (a submitted job, RAY_ADDRESS, `ray start` on this machine), or start a local one.

    Raises:
        InputError: Ray refuses the token, can't be reached, or does not start.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        ray.init(address=None if _ray_is_around() else "local", log_to_driver=True, logging_level="warning")
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        sentence = " ".join(str(error).split())[:300]
        raise InputError(
            f"Ray can't be reached ({sentence}): start one with `ray start --head`, and set RAY_AUTH_MODE=token both there "
            "and here if ~/.ray/auth_token exists (see README, 'On a cluster')."
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise InputError("Ray did not start within 30 s, this machine is too busy: try again when it has less to do.") from None


def _ray_is_around() -> bool:
    """Whether a cluster was named or started, without starting one."""
    return bool(os.environ.get("RAY_ADDRESS")) or Path("/tmp/ray/ray_current_cluster").exists()


def require_resources(resource: str, needed: float, what: str, key: str) -> None:
    """Refuse a plan that Ray would wait for in vain; `resource` is CPU or GPU.

    Raises:
        InputError: the cluster has fewer of them, and its autoscaler, if any, may not bring enough.
    """
    have = ray.cluster_resources().get(resource, 0)
    may_have = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    if needed > max(have, may_have.get(resource, 0)):
        raise InputError(f"{what} asks for {needed:g} {resource}s and the cluster has {have:g}: lower {key}, or add nodes.")


_last_shown: dict[str, float] = {}


def progress(step: str, done: int, total: int) -> None:
    """Print `step: done/total`, at most every five seconds and always at the end."""
    now = time.monotonic()
    if done >= total or now - _last_shown.get(step, 0.0) >= 5:
        _last_shown[step] = now
        print(f"{step}: {done:,}/{total:,}", flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Run a job's main; what a person can mend ends as one sentence and exit status 1."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on.", file=sys.stderr, flush=True)
        sys.exit(130)


class Heartbeat:
    """Prints what `say` returns every `every_s` seconds until the block ends; nothing if it returns nothing."""

    def __init__(self, say: Callable[[], str], every_s: float = 30.0) -> None:
        self._say, self._every_s = say, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            if said := self._say():
                print(said, flush=True)
