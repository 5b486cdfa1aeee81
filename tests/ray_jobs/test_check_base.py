"""The check of a base: a model behind an endpoint, and the places that it is asked about."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from addressvlm import InputError
from addressvlm.config import validate
from addressvlm.storage.run_dir import Run
from ray_jobs import check_base, graft
from tests.support.openai_endpoint import Endpoint, refuses, says


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (red, 0, 0))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of one's own needs none."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_an_endpoint_sees_each_picture_with_its_question() -> None:
    with Endpoint(lambda n, body: says(f"answer {body['messages'][0]['content'][1]['text']}")).running() as endpoint:
        answers = check_base.ask_endpoint(endpoint.url, "some-model")([picture(10), picture(200)], ["one?", "two?"])
    assert answers == ["answer one?", "answer two?"]
    for request, red in zip(endpoint.requests, (10, 200), strict=True):
        assert (request["model"], request["temperature"]) == ("some-model", 0)
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        shown = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        assert abs(shown.getpixel((20, 15))[0] - red) < 6


def test_an_endpoint_that_refuses_is_one_sentence() -> None:
    with (
        Endpoint(lambda n, body: refuses(400, "no images here")).running() as endpoint,
        pytest.raises(InputError, match=r"does not answer for some-model .*no images here"),
    ):
        check_base.ask_endpoint(endpoint.url, "some-model")([picture(10)], ["one?"])


def test_too_few_streets_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate({"name": "r", "storage": str(tmp_path)}, "test")

    class Renderer:
        def __init__(self, *_: Any) -> None: ...

        def tile(self, *_: Any) -> Any:
            return type("Tile", (), {"image": picture(1), "names": ["Mill Street"]})()

    data = io.BytesIO()
    picture(5).save(data, "JPEG")
    rows = [
        {"id": f"{i}", "place": f"p{i // 2}", "lat": 1.0, "lon": 1.0, "street": "Mill Street", "main_street": "Mill Street",
         "image": {"bytes": data.getvalue()}}
        for i in range(8)
    ]  # fmt: skip
    monkeypatch.setattr(check_base, "TileRenderer", Renderer)
    monkeypatch.setattr(graft, "sources", lambda *_: ((None, "imagery"), config.tiles.model_dump_json()))
    monkeypatch.setattr(check_base.tables, "iter_rows", lambda *_: iter(rows))
    with pytest.raises(InputError, match=r"4 places of 1 streets are too few to match photos with: raise --places"):
        check_base.checked_places(config, Run(config), 40)
    for row, street in zip(rows, "AABBCCDD", strict=True):
        row["main_street"] = f"{street} Street"
    places = check_base.checked_places(config, Run(config), 40)
    assert [(place.id, place.street) for place in places] == [(f"p{i}", f"{s} Street") for i, s in enumerate("ABCD")]
