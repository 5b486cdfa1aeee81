"""A running service with a tiny model, for tests of the API and the page."""

import base64
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import shapely
import torch
from PIL import Image
from ray import serve as ray_serve

import serve as service
from addressvlm.config.train import ModelConfig, PartConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.models.loading import load_model
from addressvlm.models.lora import adapter_weights, attach_lora, export_merged
from tests.support.tiny import tiny_llava

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


def data_url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def chat_messages(text: str, *images: str) -> list[dict[str, Any]]:
    """The user's turn of a chat request: a text and the URLs of images."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def check_error(response: httpx.Response, status: int, message: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    assert error["type"] == ("server_error" if status >= 500 else kinds.get(status, "invalid_request_error"))
    assert message in error["message"], error["message"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text


def model_folder(root: Path) -> Path:
    """A tiny random model with a gazetteer, where a run would put it."""
    folder = root / "toytown" / "models" / "addressvlm" / "merged"
    folder.mkdir(parents=True)
    tiny_llava(folder)
    save_gazetteer(folder, "Toytown", STREETS)
    return folder


def save_gazetteer(folder: Path, city: str, streets: dict[str, list[tuple[float, float]]]) -> None:
    lines = {name: shapely.LineString(points) for name, points in streets.items()}
    area = {"Harbour": shapely.box(0, 52, 0.02, 52.02)}
    gazetteer = Gazetteer([Address(name, "Harbour") for name in streets], lines, area, city=city, attribution=["Made up"])
    gazetteer.save(folder / "gazetteer.geojson")


def two_cities(root: Path) -> list[Path]:
    """Trained systems of two cities on one tiny base: LoRA, and a projector tuned whole, each with its merged model."""
    base, systems = tiny_llava(root / "base"), []
    config = ModelConfig(base=str(base), adapter=PartConfig(full=True), llm=PartConfig(rank=4), vision=PartConfig(rank=2))
    for seed, (city, streets) in enumerate({"Toytown": list(STREETS), "St. Alder": ["Elm Row", "Oak Avenue"]}.items()):
        model, _ = attach_lora(load_model(str(base))[0], config)
        torch.manual_seed(seed)
        for _, weights in adapter_weights(model):
            weights.data += 0.05 * torch.randn_like(weights)
        system = root / f"run{seed}" / "models" / "addressvlm"
        model.save_pretrained(system / "adapter")
        export_merged(system / "adapter", config, system / "merged")
        save_gazetteer(system / "merged", city, {name: STREETS.get(name, STREETS["Mill Street"]) for name in streets})
        systems.append(system)
    return systems


@contextmanager
def running_service(root: Path, **settings: Any) -> Iterator[str]:
    """Deploy on this process's Ray, yield the URL, and shut down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        config = settings if "cities" in settings else {"model": str(model_folder(root)), **settings}
        ray_serve.run(service.config(service.ServiceSettings(num_cpus=0.5, dtype="float32", **config)))
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
