"""The service on this machine by one command: starts Ray, waits for the model, prints the page's address.

    python -m serve                       the model trained last; `make serve`
    python -m serve model=runs/my-city/models/addressvlm/merged

Arguments are those of `serve run serve.config`. On a cluster use `serve run` or `serve deploy` (docs/service.md).
"""

import logging
import socket
import sys
import threading

if __name__ == "__main__":
    from ray_jobs.progress import Progress, display

    display.begin(Progress("serve: loading libraries"))

from ray import serve as ray_serve

from addressvlm import InputError
from ray_jobs.common import connect, run_main
from ray_jobs.progress import display
from serve import ServiceSettings, config

HOST, PORTS = "127.0.0.1", range(8000, 8020)


def free_port() -> int:
    """The first port of PORTS that nothing listens on."""
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise InputError(f"ports {PORTS[0]} to {PORTS[-1]} are all in use: end one of the programs that listen there.")


def main() -> None:
    arguments = [argument.partition("=") for argument in sys.argv[1:]]
    if wrong := next((name for name, equals, _ in arguments if not equals), None):
        raise InputError(f"'{wrong}': write arguments as key=value, for instance model=runs/demo/models/addressvlm.")
    application = config(ServiceSettings(**{name: value for name, _, value in arguments}))
    connect()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    port = free_port()
    try:
        with display.show("serve: loading the model"):
            ray_serve.start(http_options={"host": HOST, "port": port})
            ray_serve.run(application)
    except RuntimeError as error:
        raise InputError(f"the service did not start ({' '.join(str(error).split())[:300]}): see `serve status`.") from error
    display.clear()
    print(f"\nopen http://{HOST}:{port}    (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        with display.show("serve: stopping"):
            ray_serve.shutdown()


if __name__ == "__main__":
    run_main(main, "serve")
