import itertools
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addressvlm import InputError
from addressvlm.config import TilesConfig
from addressvlm.storage import http_client
from addressvlm.tiles import imagery
from addressvlm.tiles.graft_rows import Grafter
from addressvlm.tiles.imagery import XyzServer
from addressvlm.tiles.raster import Mosaic
from addressvlm.tiles.renderer import TileRenderer
from tests.support import town
from tests.support.clock import Clock
from tests.support.http_server import Answer, Request, Server
from tests.support.tile_server import encoded, good, ground

HTML = b"<html><body>Sign in</body></html>"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """All waits of the client and of its rate limit."""
    ours = Clock()
    monkeypatch.setattr(imagery, "time", ours)
    monkeypatch.setattr(http_client, "time", ours)
    return ours


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return town.write_streets(tmp_path_factory.mktemp("town") / "streets.geojson")


def config(folder: Path, **changes: object) -> TilesConfig:
    return TilesConfig(cache=str(folder / "cache"), per_second=1000, names=False, **changes)


def server_of(running: Server, folder: Path, **options: object) -> XyzServer:
    return XyzServer(f"{running.url}/{{z}}/{{x}}/{{y}}.png", folder, "tests (mail@example.org)", 1000, **options)


def always(status: int, body: bytes = b"", **headers: str) -> Server:
    return Server(lambda path: (status, {key.replace("_", "-"): value for key, value in headers.items()}, body))


@pytest.mark.parametrize(("zoom", "pixels"), [(None, 336), (17, 336), (18, 100), (None, 600)])
def test_same_ground_as_the_geotiff(tmp_path: Path, streets: Path, zoom: int | None, pixels: int) -> None:
    geotiff = town.write_imagery(tmp_path / "satellite.tif")
    chosen = config(tmp_path, zoom=zoom, pixels=pixels)
    with Server(good).running() as running:
        renderer = TileRenderer(streets, f"{running.url}/{{z}}/{{x}}/{{y}}.png", chosen)
        drawn = np.asarray(renderer.tile(*town.degrees(-60, 60)).image).astype(int)
    expected = np.asarray(TileRenderer(streets, geotiff, chosen).tile(*town.degrees(-60, 60)).image).astype(int)
    assert (abs(drawn - expected).max(axis=-1) > 60).mean() < 0.01
    levels = {int(request.path.split("/")[1]) for request in running.requests}
    assert levels == {zoom or (18 if pixels == 336 else 19)}  # 0.60 or 0.33 m a pixel; level 18 has 0.37 m here


def test_requests_are_cached_and_identify_themselves(tmp_path: Path, streets: Path) -> None:
    with Server(good).running() as running:
        url = f"{running.url}/{{z}}/{{x}}/{{y}}.png"
        chosen = config(tmp_path, user_agent="my-city (me@example.org)", attribution="© Me")
        first = TileRenderer(streets, url, chosen)
        picture = first.tile(*town.degrees(0, 0)).image
        count = len(running.requests)
        assert 0 < count <= 16
        assert {request.headers["User-Agent"] for request in running.requests} == {"my-city (me@example.org)"}
        assert first.imagery.attribution == "© Me"
        again = TileRenderer(streets, url, chosen).tile(*town.degrees(0, 0)).image  # another process would do the same
        assert len(running.requests) == count
    assert again.tobytes() == picture.tobytes()


def test_a_damaged_cached_tile_is_downloaded_again(tmp_path: Path) -> None:
    with Server(good).running() as running:
        server = server_of(running, tmp_path)
        whole = server.tile(18, 131159, 86000)
        (file,) = tmp_path.glob("*/18/131159/86000")
        file.write_bytes(file.read_bytes()[:100])
        again = server.tile(18, 131159, 86000)
    assert whole is not None
    assert again is not None
    assert whole.tobytes() == again.tobytes()
    assert len(running.requests) == 2


def test_404_is_transparent_and_requested_once(tmp_path: Path, streets: Path) -> None:
    with always(404, HTML).running() as running:
        renderer = TileRenderer(streets, f"{running.url}/{{z}}/{{x}}/{{y}}.png", config(tmp_path))
        for _ in range(2):
            with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:\d+ at zoom 18 covers only 0% of the tile\.$"):
                renderer.tile(*town.degrees(0, 0))
        assert len(running.requests) == len({request.path for request in running.requests})


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("after", ["60", format_datetime(NOW + timedelta(seconds=60), usegmt=True)])
def test_429_waits_as_long_as_the_server_says(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """All who share the folder wait, not only the one with the answer 429."""
    monkeypatch.setattr(http_client, "datetime", SimpleNamespace(now=lambda zone: NOW))
    at: list[float] = []

    def answer(request: Request) -> Answer:
        at.append(clock.now)
        return (429, {"Retry-After": after}, b"") if request.number in (1, 3) else good(request)

    with Server(answer).running() as running:
        first, second = (server_of(running, tmp_path) for _ in range(2))
        assert first.tile(18, 131159, 86000) is not None
        assert at[1] - at[0] == pytest.approx(60)
        monkeypatch.setattr(imagery, "MAX_ATTEMPTS", 1)
        with pytest.raises(InputError, match="429"):
            first.tile(18, 131159, 86001)
        assert second.tile(18, 131159, 86001) is not None
    assert at[3] - at[2] == pytest.approx(60)


def test_waits_double_without_retry_after(tmp_path: Path, clock: Clock) -> None:
    at: list[float] = []

    def answer(request: Request) -> Answer:
        at.append(clock.now)
        return 503, {}, b""

    with Server(answer).running() as running, pytest.raises(InputError):
        server_of(running, tmp_path).tile(18, 1, 5)
    assert [after - before for before, after in itertools.pairwise(at)] == pytest.approx([1, 2, 4])


def test_requests_respect_the_rate_limit(tmp_path: Path, clock: Clock) -> None:
    at: list[float] = []

    def answer(request: Request) -> Answer:
        at.append(clock.now)
        return good(request)

    with Server(answer).running() as running:
        for number in range(4):  # one process after the other
            server = XyzServer(f"{running.url}/{{z}}/{{x}}/{{y}}.png", tmp_path, "tests", 5)
            server.tile(18, 131159, 86000 + number)
            server.tile(18, 131159, 86000)  # is there by now, and takes no turn
    assert [after - before for before, after in itertools.pairwise(at)] == pytest.approx([0.2] * 3)


def test_two_addresses_of_a_host_share_no_tiles(tmp_path: Path) -> None:
    """Nor do two tiles of an address: whatever of it differs, another picture comes, from the server and from the cache."""

    def answer(request: Request) -> Answer:
        shade = zlib.crc32(request.path.encode())
        return 200, {}, encoded(Image.new("RGB", (8, 8), (shade & 255, shade >> 8 & 255, shade >> 16 & 255)))

    with Server(answer).running() as running:
        addresses = [
            f"{running.url}/{rest}" for rest in ("a/{z}/{x}/{y}.png", "b/{z}/{x}/{y}.png", "a/{z}/{x}/{y}.png?style=2")
        ]
        places = [(3, 1, 2), (3, 2, 1), (4, 1, 2)]
        rounds = [
            [XyzServer(address, tmp_path, "tests", 1000).tile(*place) for address in addresses for place in places]
            for _ in range(2)
        ]
    pictures = [[tile.tobytes() for tile in tiles if tile] for tiles in rounds]
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) == len(running.requests) == 9


@pytest.mark.parametrize(
    ("status", "headers", "reason", "asks"),
    [
        (500, {}, "500 Internal Server Error", 4),
        (503, {}, "503 Service Unavailable", 4),
        (429, {"Retry_After": "61"}, "429 Too Many Requests, it asks to wait 61 s", 1),
    ],
)
def test_a_server_that_keeps_failing(
    tmp_path: Path, clock: Clock, status: int, headers: dict[str, str], reason: str, asks: int
) -> None:
    """A sentence each, and after three tiles in a row one question in 30 s."""
    with always(status, **headers).running() as running:
        server = server_of(running, tmp_path)
        for x in range(3):
            with pytest.raises(InputError, match=rf"tile 18/{x}/5 can't be downloaded \({reason}\): rerun this step"):
                server.tile(18, x, 5)
        assert len(running.requests) == 3 * asks
        clock.now += 29
        with pytest.raises(InputError, match="is down"):
            server.tile(18, 4, 5)
        assert len(running.requests) == 3 * asks
        clock.now += 1
        for _ in range(2):
            with pytest.raises(InputError):
                server.tile(18, 4, 5)
        assert len(running.requests) == 3 * asks + 1


def test_a_recovered_server_is_used_again(tmp_path: Path, clock: Clock) -> None:
    broken = Server(lambda path: (500, {}, b""))
    with broken.running() as running:
        server = server_of(running, tmp_path)
        for x in range(3):
            with pytest.raises(InputError):
                server.tile(18, x, 5)
        broken.answer = good
        clock.now += 30
        assert server.tile(18, 3, 5) is not None
        broken.answer = lambda path: (500, {}, b"")
        before = len(running.requests)
        with pytest.raises(InputError):
            server.tile(18, 6, 5)
        assert len(running.requests) == before + 4  # it counts as up: several tries again


@pytest.mark.parametrize(("status", "hint"), [(401, "key"), (403, "user_agent"), (400, "check tiles.imagery")])
def test_refused_requests_are_not_repeated(tmp_path: Path, status: int, hint: str) -> None:
    with always(status).running() as running:
        with pytest.raises(InputError, match=rf"is refused \({status} .*{hint}"):
            server_of(running, tmp_path).tile(1, 0, 0)
        assert len(running.requests) == 1


@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        ({"Content_Type": "text/html; charset=utf-8"}, HTML, "is text/html, not an image"),
        ({"Content_Type": "application/json"}, b"{}", "is application/json, not an image"),
        ({"Content_Type": "image/png"}, HTML, "is not a PNG, JPEG or WebP image"),
        ({}, b"", "is not a PNG, JPEG or WebP image"),
        ({}, encoded(Image.new("RGB", (256, 256)), "GIF"), "is not a PNG, JPEG or WebP image"),
        ({}, encoded(ground(18, 131159, 86000))[:200], "is a damaged image"),
        ({}, encoded(Image.new("L", (1025, 8))), "has 1025 x 8 pixels"),
        ({}, bytes(9 << 20), "larger than 8 MB"),
    ],
    ids=range(8),
)
def test_responses_that_are_not_map_tiles(tmp_path: Path, headers: dict[str, str], body: bytes, reason: str) -> None:
    with always(200, body, **headers).running() as running:
        with pytest.raises(InputError, match=reason):
            server_of(running, tmp_path).tile(1, 0, 0)
        assert not list(tmp_path.rglob("1/0/*"))  # nothing bad is kept


@pytest.mark.parametrize("drip_s", [0.005, 30.0])
def test_a_server_that_hangs_times_out(tmp_path: Path, clock: Clock, drip_s: float) -> None:
    """Nothing after the first byte, or a byte now and then: bounded by the time of one request, times the tries."""
    clock.tick = 0.06
    with Server(good, drip_s).running() as running:
        with pytest.raises(InputError, match=r"can't be downloaded \(no answer within 0.2 s\)"):
            server_of(running, tmp_path, timeout_s=0.2).tile(18, 131159, 86000)
        assert len(running.requests) == 4


def test_connection_refused(tmp_path: Path) -> None:
    with Server(good).running() as running:
        url = running.url
    server = XyzServer(f"{url}/{{z}}/{{x}}/{{y}}", tmp_path, "tests", 1000)
    with pytest.raises(InputError, match=r"can't be downloaded \(no connection, Connection refused\)"):
        server.tile(1, 0, 0)


def test_redirects_stay_on_the_web(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(Image.new("RGB", (256, 256))))
    with always(302, Location=secret.as_uri()).running() as running, pytest.raises(InputError, match="InvalidSchema"):
        server_of(running, tmp_path / "cache").tile(1, 0, 0)


def test_a_bad_server_rejects_rows_and_the_rest_goes_on(tmp_path: Path, streets: Path) -> None:
    """Tiles in the east of the town are HTML: places there are rejected, those in the west grafted."""
    photo = encoded(Image.new("RGB", (64, 48), (9, 9, 9)), "JPEG")
    here = [(-200, "w"), (200, "e"), (-190, "w2")]
    photos = [
        {"id": key, "place": key, "street": "Mill Street", "main_street": "Mill Street", "district": "Harbour", "heading": None,
         "lat": town.degrees(x, 0)[0], "lon": town.degrees(x, 0)[1], "image": {"bytes": photo, "path": key}}
        for x, key in here
    ]  # fmt: skip

    def answer(request: Request) -> Answer:
        z, x, _ = map(int, request.path.strip("/").removesuffix(".png").split("/"))
        east = (x + 0.5) / 2**z * 360 - 180 > town.LON
        return (200, {"Content-Type": "text/html"}, HTML) if east else good(request)

    with Server(answer).running() as running:
        grafter = Grafter(str(streets), f"{running.url}/{{z}}/{{x}}/{{y}}.png", config(tmp_path, side_m=100))
        reasons = {row["id"]: row["reason"] for row in grafter.graft_rows(photos)}
    assert reasons["w"] is None
    assert reasons["w2"] is None
    assert "is text/html, not an image" in reasons["e"]


@given(z=st.integers(1, 22), data=st.data())
def test_placeholders_of_addresses(z: int, data: st.DataObject) -> None:
    x, y = (data.draw(st.integers(0, 2**z - 1)) for _ in "xy")
    plain, flipped, key, part = imagery._address("h/{z}/{x}/{y}|{-y}|{q}|{s}", z, x, y).split("|")
    assert plain == f"h/{z}/{x}/{y}"
    assert int(flipped) + y == 2**z - 1
    assert len(key) == z
    assert int(key.replace("2", "0").replace("3", "1"), 2) == x
    assert int(key.replace("1", "0").replace("2", "1").replace("3", "1"), 2) == y
    assert part in "abc"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("https://host/{z}/{x}.png", "needs {z}, {x} and {y}"),
        ("https://host/{z}/{x}/{y}{r}.png", "has {r}: the placeholders are"),
        ("ftp://host/{z}/{x}/{y}", "begins with http"),
        ("file:///tiles/{z}/{x}/{y}.png", "begins with http"),
        ("tiles/{z}/{x}/{y}.png", "begins with http"),
        ("https://{x}/{z}/{y}", "begins with http"),
        ("https://host:port/{z}/{x}/{y}", "no web address"),
        ("https://host/{z/{x}/{y}", "tiles.imagery"),
        ("ftp://bucket/city.tif", "http"),
    ],
)
def test_invalid_addresses(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        imagery.open_imagery(template, "EPSG:3857", config(tmp_path))
    assert reason in str(caught.value)


def test_keys_stay_out_of_messages(tmp_path: Path) -> None:
    with always(403).running() as running:
        server = XyzServer(f"{running.url}/{{z}}/{{x}}/{{y}}?key=hush", tmp_path, "tests", 1000)
        with pytest.raises(InputError) as caught:
            server.tile(1, 0, 0)
    assert "hush" not in str(caught.value) + server.attribution


def test_a_zoom_that_needs_too_many_tiles_is_an_error(tmp_path: Path, streets: Path) -> None:
    with Server(good).running() as running:
        renderer = TileRenderer(streets, f"{running.url}/{{z}}/{{x}}/{{y}}.png", config(tmp_path, zoom=23))
        with pytest.raises(InputError, match=r"set tiles\.zoom lower"):
            renderer.tile(*town.degrees(0, 0))
        assert not running.requests


def test_an_xyz_server_alone_has_no_centre(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set city\.streets as well"):
        TileRenderer(None, "https://host/{z}/{x}/{y}.png", config(tmp_path))


def test_finer_tiles_than_usual(tmp_path: Path) -> None:
    """512 px tiles, which many servers send for {z}: the same ground."""

    def answer(request: Request) -> Answer:
        z, x, y = map(int, request.path.strip("/").removesuffix(".png").split("/"))
        return 200, {}, encoded(ground(z, x, y, 512).convert("RGB"), "WEBP")

    crs = f"+proj=tmerc +lat_0={town.LAT} +lon_0={town.LON} +k=1 +datum=WGS84 +units=m"
    pictures = []
    for number, kind in enumerate((good, answer)):
        with Server(kind).running() as running:
            mosaic = Mosaic(server_of(running, tmp_path / str(number)), crs)
            pictures.append(np.asarray(mosaic.read((-100, -100, 100, 100), 336)).astype(int))
    assert (abs(pictures[0] - pictures[1]).max(axis=-1) > 60).mean() < 0.02


def test_two_addresses_of_one_host_share_its_rate_limit(tmp_path: Path, clock: Clock) -> None:
    with Server(good).running() as server:
        places = ("{z}/{x}/{y}.png", "/{z}/{x}/{y}.png")
        first, second = (XyzServer(f"{server.url}/{place}", tmp_path, "test", per_second=0.5) for place in places)
        began = clock.now
        first.tile(18, 131159, 86000)
        second.tile(18, 131160, 86000)
        assert clock.now - began == 2.0
