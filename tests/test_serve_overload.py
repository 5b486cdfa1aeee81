"""More than the service can take, on a real Ray Serve: python -m pytest tests/test_serve_overload.py"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service import check_error, photo, running_service

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def url(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    limits = {
        "max_replicas": 1,
        "target_ongoing_requests": 1,
        "max_ongoing_requests": 2,
        "max_queued_requests": 1,
        "batch_size": 1,
    }
    with running_service(tmp_path_factory.mktemp("overload"), **limits) as address:
        yield address


def test_beyond_the_queue_callers_are_told_to_come_back(url: str) -> None:
    body = {"model": "addressvlm", "messages": [{"role": "user", "content": "Tell me all."}], "max_tokens": 400}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    refused = [r for r in answers if r.status_code != 200]
    assert 0 < len(refused) < len(answers)
    for response in refused:
        check_error(response, 503, "busy")
        assert response.headers["retry-after"] == "1"
    assert httpx.get(f"{url}/healthz").status_code == 200
    again = httpx.post(f"{url}/v1/localize", files={"file": ("p.jpg", photo())}, timeout=300)
    assert again.raise_for_status().json()["candidates"]
