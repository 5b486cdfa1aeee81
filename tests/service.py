"""A running service over a tiny model, for the tests of the API and of the page."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import shapely
from PIL import Image
from ray import serve as ray_serve

import serve as service
from addressvlm.addresses import Address, Gazetteer
from tests.tiny import tiny_llava

STREETS = {
    "Mill Street": [(0.00, 52.00), (0.02, 52.00)],
    "Oak Avenue": [(0.00, 52.01), (0.02, 52.01)],
    "Quay Lane": [(0.01, 52.00), (0.01, 52.02)],
    "Station Road": [(0.00, 52.00), (0.02, 52.02)],
}


def photo(seed: int = 0) -> bytes:
    """A small JPEG, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(out, "JPEG")
    return out.getvalue()


def check_error(response: httpx.Response, status: int, words: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert words in error["message"], error["message"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text


def model_folder(root: Path) -> Path:
    """A tiny random model with a gazetteer, where a run would put it."""
    folder = root / "toytown" / "models" / "addressvlm" / "merged"
    folder.mkdir(parents=True)
    tiny_llava(folder)
    lines = {name: shapely.LineString(points) for name, points in STREETS.items()}
    area = {"Harbour": shapely.box(0, 52, 0.02, 52.02)}
    gazetteer = Gazetteer([Address(name, "Harbour") for name in STREETS], lines, area, city="Toytown", attribution=["Made up"])
    gazetteer.save(folder / "gazetteer.geojson")
    return folder


@contextmanager
def running_service(root: Path, **settings: Any) -> Iterator[str]:
    """Deploy on the Ray of this process, give the address, and take everything down again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        ray_serve.run(service.config(service.ServiceSettings(model=str(model_folder(root)), num_cpus=0.5, **settings)))
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
