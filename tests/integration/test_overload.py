"""Overload, a replica that dies and an update under load, on a real Ray Serve."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve as ray_serve

import serve as service
from tests.support.running_service import check_error, photo, running_service

pytestmark = pytest.mark.xdist_group("ray-answers")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overload")


@pytest.fixture(scope="module")
def url(ray_local: None, root: Path) -> Iterator[str]:
    limits = {
        "max_replicas": 1,
        "target_ongoing_requests": 1,
        "max_ongoing_requests": 2,
        "max_queued_requests": 4,
        "batch_size": 1,
    }
    with running_service(root, **limits) as address:
        yield address


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[Counter[int]]:
    """Photos one after the other from several clients, while the block runs; counts by status, 0 for no answer."""
    statuses: Counter[int] = Counter()
    over = threading.Event()

    def send(number: int) -> None:
        while not over.is_set():
            try:
                answer = httpx.post(f"{url}/v1/localize", files={"file": ("p.jpg", photo(number))}, timeout=120)
                statuses[answer.status_code] += 1
            except httpx.HTTPError:
                statuses[0] += 1

    with ThreadPoolExecutor(clients) as pool:
        clients_running = [pool.submit(send, number) for number in range(clients)]
        try:
            yield statuses
        finally:
            over.set()
        for client in clients_running:
            client.result()


def wait_for(statuses: Counter[int], more: int) -> None:
    """Until so many more answers came."""
    goal = statuses.total() + more
    while statuses.total() < goal:
        threading.Event().wait(0.01)


def replicas() -> list[Any]:
    """Actors that hold the model."""
    running = ray.util.list_named_actors(all_namespaces=True)
    names = [actor for actor in running if "#Localizer#" in actor["name"]]
    return [ray.get_actor(actor["name"], namespace=actor["namespace"]) for actor in names]


def test_beyond_the_queue_requests_are_refused_with_retry_after(url: str) -> None:
    messages = [{"role": "user", "content": "Tell me all."}]
    body = {"model": "addressvlm", "messages": messages, "max_tokens": 400, "temperature": 1}

    def send(number: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": number % 2 == 0}, timeout=300)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(send, range(16)))
    refused = [r for r in answers if r.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for response in refused:
        check_error(response, 503, "busy")
        assert response.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/healthz").status_code == 200
    again = httpx.post(f"{url}/v1/localize", files={"file": ("p.jpg", photo())}, timeout=300)
    assert again.raise_for_status().json()["candidates"]


@pytest.mark.nodes
def test_an_update_under_load_fails_no_request(url: str, root: Path) -> None:
    model = root / "toytown" / "models" / "addressvlm" / "merged"
    settings = service.ServiceSettings(model=str(model), num_cpus=0.5, min_replicas=2, max_replicas=2, batch_size=4)
    before = {str(replica) for replica in replicas()}
    with load(url) as statuses:
        wait_for(statuses, 4)
        ray_serve.run(service.config(settings))
        wait_for(statuses, 8)
    assert set(statuses) == {200}
    assert not before & {str(replica) for replica in replicas()}


def test_a_replica_that_dies_loses_only_what_it_had_begun(url: str) -> None:
    with load(url, clients=4) as statuses:
        wait_for(statuses, 8)
        before = replicas()
        ray.kill(before[0])
        wait_for(statuses, 24)
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 4  # one of each client
    assert httpx.get(f"{url}/healthz").status_code == 200
