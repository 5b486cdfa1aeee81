"""What the service is made of, without Ray: settings, error shapes, image decoding."""

import json
from io import BytesIO
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

import serve as service
from addressvlm import InputError
from serve.errors import install
from serve.images import LONGEST_SIDE, decode_image
from tests.service import check_error

pytestmark = pytest.mark.xdist_group("ray")


def test_defects_show_nothing_of_the_inside() -> None:
    app = FastAPI()
    install(app)

    @app.get("/")
    def broken() -> None:
        raise RuntimeError("secret")

    response = TestClient(app, raise_server_exceptions=False).get("/")
    check_error(response, 500, "operator's log")
    assert "secret" not in response.text


def test_photos_come_upright_and_bounded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned
    out = BytesIO()
    Image.new("RGB", (3000, 1500), "red").save(out, "JPEG", exif=exif)
    image = decode_image(out.getvalue(), max_megapixels=50)
    assert image.mode == "RGB"
    assert image.width < image.height <= LONGEST_SIDE


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_format_is_read(kind: str) -> None:
    out = BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(out, kind)
    red, green, _ = decode_image(out.getvalue(), 50).getpixel((5, 5))
    assert red > 150 > green


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"modle": "x"}, "nearest known is 'model'"),
        ({"min_replicas": "many"}, "'min_replicas' is 'many'"),
        ({"min_replicas": "3", "max_replicas": "2"}, "max_replicas"),
        ({"max_ongoing_requests": "4", "target_ongoing_requests": "4"}, "never scales up"),
        ({"model": "/no/such/folder"}, "no model folder /no/such/folder"),
        ({"model": str(Path(__file__).parent)}, "no config.json"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        service.config(service.ServiceSettings.model_validate(arguments))
    assert "\n" not in str(caught.value)


def test_the_last_trained_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"ray job submit ray_jobs/train\.py"):
        service.ServiceSettings().folder()
    merged = tmp_path / "addressvlm" / "runs" / "demo" / "models" / "addressvlm" / "merged"
    merged.mkdir(parents=True)
    (tmp_path / "addressvlm" / "runs" / "last-model").write_text(f"{merged}\n")
    with pytest.raises(InputError, match=r"no config\.json"):
        service.ServiceSettings().folder()
    (merged / "config.json").write_text(json.dumps({}))
    assert service.ServiceSettings().folder() == merged
    assert service.ServiceSettings(model=str(merged.parent)).folder() == merged
