"""Images of the service: decoding processes, base64, and fetching from allowed hosts only. A real HTTP server in-process."""

import asyncio
import gzip
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import serve as service
from addressvlm import InputError
from addressvlm.image_decode_worker import limit_resources
from serve.errors import ApiError
from serve.images import WORKER_COMMAND, DecodePool, ImageFetcher, Images, decode_base64, is_public
from tests.support.images import encoded
from tests.support.running_service import data_url, photo

pytestmark = pytest.mark.xdist_group("serve")
# ---- decoding


IMPORT = f"from {limit_resources.__module__} import {limit_resources.__name__} as limit"  # for processes of their own


@given(st.one_of(st.text(), st.text().map(lambda text: f"data:image/png;base64,{text}"), st.binary().map(repr)))
@settings(max_examples=100, deadline=None)
def test_any_text_is_decoded_or_refused(text: str) -> None:
    try:
        result = decode_base64(text)
    except InputError:
        return
    assert isinstance(result, bytes)


def run(work: object) -> object:
    return asyncio.run(work)  # type: ignore[arg-type]


def test_a_decoder_that_hangs_is_ended_and_the_next_photo_is_read() -> None:
    hangs = [
        sys.executable,
        "-c",
        f"{IMPORT}; limit(0)\nwhile True: pass",
    ]

    async def both() -> None:
        pool = DecodePool(1, cpu_s=20, max_megapixels=4)
        pool.command = hangs
        with pytest.raises(InputError, match="too long to decode"):
            await pool.decode(photo(), 336)
        pool.command = WORKER_COMMAND
        assert (await pool.decode(photo(), 336))[:2] == (320, 240)
        with pytest.raises(InputError, match="damaged"):
            await pool.decode(photo()[:1000], 336)
        assert len(pool.idle) == 1
        await pool.close()

    run(both())


def test_a_decoder_gets_no_more_memory_than_allowed() -> None:
    greedy = f'{IMPORT}; limit(9, 1 << 27); x = bytearray(1 << 29); print(\'{{"refused": "got it"}}\')'

    async def decode_greedily() -> None:
        with pytest.raises(InputError, match="too long to decode"):
            await DecodePool(1, 20, 4, [sys.executable, "-c", greedy]).decode(photo(), 336)

    run(decode_greedily())


def test_decoders_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDRESSVLM_API_KEYS", "a-key-that-is-secret")
    tells = "import os, sys; sys.stdout.write('{\"refused\": \"' + ' '.join(os.environ) + '\"}\\n')"

    async def decode_once() -> None:
        pool = DecodePool(1, 20, 4, [sys.executable, "-c", tells])
        with pytest.raises(InputError, match="PYTHONPATH") as caught:
            await pool.decode(b"", 336)
        await pool.close()
        assert "KEYS" not in str(caught.value)

    run(decode_once())


def test_no_free_process_in_time_is_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.images.WALL_TIME_FACTOR", 0.01)

    async def wait_for_a_turn() -> None:
        pool = DecodePool(1, 1, 4)
        async with pool.slots:
            with pytest.raises(ApiError) as caught:
                await pool.decode(photo(), 336)
        assert caught.value.status == 503
        assert not pool.slots.locked()

    run(wait_for_a_turn())


def test_a_process_that_can_not_start_is_overloaded() -> None:
    async def decode_without() -> None:
        with pytest.raises(ApiError) as caught:
            await DecodePool(1, 20, 4, ["/no/such/program"]).decode(photo(), 336)
        assert caught.value.status == 503

    run(decode_without())


def test_a_process_that_died_while_idle_is_not_used() -> None:
    async def decode_twice() -> None:
        pool = DecodePool(1, 20, 4)
        await pool.decode(photo(), 336)
        (process,) = pool.idle
        process.kill()
        await process.wait()
        assert (await pool.decode(photo(), 60))[:2] == (160, 120)  # twice the side that the model looks at
        assert process not in pool.idle
        (other,) = pool.idle
        sizes = [(60, 40), (40, 60), (50, 50)]
        photos = [encoded(Image.new("RGB", size), "PNG") for size in sizes]
        result = await asyncio.gather(*(pool.decode(data, 336) for data in photos))
        assert [one[:2] for one in result] == sizes
        assert pool.idle == [other]  # one process, as many as configured
        await pool.close()
        assert other.returncode is not None

    run(decode_twice())


# ---- fetching


SECRET = b"what only this network may see"


class Server(BaseHTTPRequestHandler):
    """Photos at /photo; everything else is a trap."""

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        away = {
            "/to-photo": "/photo",
            "/to-loopback": f"http://127.0.0.1:{port}/secret",
            "/to-decimal": f"http://2130706433:{port}/secret",
            "/to-metadata": "http://169.254.169.254/latest/meta-data",
            "/to-file": "file:///etc/passwd",
            "/to-itself": "/to-itself",
            "/to-photo-by-3": "/to-photo-by-2",
            "/to-photo-by-2": "/to-photo",
            "/to-other": f"http://other.test:{port}/photo",
            **{f"/moved/{status}": "/photo" for status in (301, 302, 303, 307, 308)},
        }
        if self.path in away:
            self.send_response(int(self.path[-3:]) if self.path.startswith("/moved/") else 302)
            self.send_header("Location", away[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        body = {"/photo": photo(), "/secret": SECRET, "/packed": gzip.compress(b"\0" * 10_000_000)}.get(self.path, b"")
        self.wfile.write(body)
        try:
            while self.path == "/endless":
                self.wfile.write(b"\0" * 65536)
            if self.path == "/silent":
                self.server.asked.wait(60)  # type: ignore[attr-defined]
        except OSError:
            return  # the caller left

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.asked.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to; and, under '', which were asked for."""
    book: dict[str, list[str]] = {"": []}
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in book:
            return real(host, *args, **kwargs)
        book[""].append(host)
        return [entry for address in book[host] for entry in real(address, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return book


def get(url: str, *domains: str, private: bool = True, max_mb: float = 1, timeout_s: float = 20) -> bytes:
    return asyncio.run(ImageFetcher(domains, private, max_mb, timeout_s).fetch(url))


def refused(url: str, *domains: str, message: str, **options: Any) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        get(url, *domains, **options)
    assert caught.value.status == 400


def test_an_allowed_image_is_fetched(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    assert get(f"http://images.test:{port}/photo", f"images.test:{port}") == photo()
    assert get(f"http://images.test:{port}/to-photo", f".test:{port}") == photo()
    assert get(f"http://IMAGES.test:{port}/photo", f"images.test:{port}") == photo()
    assert get(f"http://images.test:{port}/to-photo-by-3", f"images.test:{port}") == photo()  # as often as is allowed
    assert get(f"http://images.test:{port}/photo", f"images.test:{port}", max_mb=(len(photo()) + 0.5) / 1e6) == photo()
    refused(f"http://images.test:{port}/photo", f"images.test:{port}", message="larger", max_mb=(len(photo()) - 0.5) / 1e6)


def test_a_name_is_resolved_once_and_that_address_is_judged(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    get(f"http://images.test:{port}/photo", f"images.test:{port}")
    assert names[""] == ["images.test"]
    for addresses in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"]):
        names["images.test"] = addresses
        refused(f"http://images.test:{port}/secret", f"images.test:{port}", message="private network", private=False)


@pytest.mark.parametrize("path", ["to-loopback", "to-decimal", "to-metadata", "to-other"])
def test_redirects_are_judged_anew(port: int, names: dict[str, list[str]], path: str) -> None:
    names["images.test"] = ["127.0.0.1"]
    refused(f"http://images.test:{port}/{path}", f"images.test:{port}", message="not fetched from this host")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("to-file", "http and https only"),
        ("to-itself", "redirects more than 3 times"),
        ("missing", "answered 404"),
        ("endless", "larger than 1 MB"),
        ("silent", "took more than"),
    ],
)
def test_bad_servers(port: int, names: dict[str, list[str]], path: str, message: str) -> None:
    names["images.test"] = ["127.0.0.1"]
    limit = 0.2 if path == "silent" else 20
    refused(f"http://images.test:{port}/{path}", f"images.test:{port}", message=message, timeout_s=limit)


def test_compressed_bodies_are_not_decompressed(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    assert len(get(f"http://images.test:{port}/packed", f"images.test:{port}")) < 100_000


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://localhost/",
        "http://images.test:22/",
        "http://images.test.evil.example/",
        "http://evilimages.test/",
        "http://images.test./",
        "http://images.test@127.0.0.1/",
        "http://user:pw@images.test/",
        "http://images.test\\@127.0.0.1/",
        "http://images.test:99999/",
        "http://images.test:port/",
        "ftp://images.test/a.jpg",
        "http://",
        "http:///a",
        "https://[::ffff:169.254.169.254]/",
        "http://\u2460\u2461\u2466.0.0.1/",
    ],
)
def test_other_addresses_are_refused_before_anything_is_sent(url: str, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    with pytest.raises(ApiError) as caught:
        get(url, "images.test")
    assert caught.value.status == 400
    assert names[""] == []


@given(
    st.one_of(st.text(), st.text().map(lambda rest: f"http://{rest}"), st.text().map(lambda rest: f"http://images.test{rest}"))
)
@settings(max_examples=150, deadline=None)
def test_any_address_is_judged(url: str) -> None:
    fetcher = ImageFetcher(["nowhere.test"], False, 1, 1)
    with pytest.raises(ApiError):
        fetcher.check_url(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("no address", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_the_service_fetches_when_it_may(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    config = service.ServiceSettings(image_domains=f"images.test:{port}", private_addresses=True)

    async def read() -> Any:
        images = Images(config)
        result = await images.read(f" http://images.test:{port}/photo")
        await images.decode_pool.close()
        return result

    assert asyncio.run(read()).shape == (240, 320, 3)


def test_a_photo_is_shrunk_for_the_models_input() -> None:
    async def read() -> list[Any]:
        images = Images(service.ServiceSettings(image_processes=1))
        shapes = [(await images.read(source, side)).shape for source in (photo(), data_url(photo())) for side in (60, 336)]
        await images.decode_pool.close()
        return shapes

    assert asyncio.run(read()) == [(120, 160, 3), (240, 320, 3)] * 2


def test_limits_of_images_reach_those_who_keep_them() -> None:
    images = Images(
        service.ServiceSettings(
            image_processes=3, decode_s=7, max_megapixels=5, image_domains="A.test", private_addresses=True, max_body_mb=11,
            fetch_s=13,
        )
    )  # fmt: skip
    pool, fetcher = images.decode_pool, images.fetcher
    assert (pool.slots._value, pool.cpu_s, pool.max_megapixels) == (3, 7, 5)
    assert (fetcher.private, fetcher.max_mb, fetcher.timeout_s) == (True, 11, 13)
    fetcher.check_url("http://a.test/")


@pytest.mark.parametrize(
    "text",
    [
        "/+Dw",
        " /+\r\nDw\n",
        "data:;base64,/+Dw",
        "DATA:IMAGE/PNG;BASE64,/+Dw",
        "data:image/png;charset=utf-8;name=a;base64, /+D w",
    ],
)
def test_base64_may_be_written_in_any_of_its_ways(text: str) -> None:
    assert decode_base64(text) == b"\xff\xe0\xf0"


@pytest.mark.parametrize(
    ("url", "domain", "fine"),
    [
        ("http://a.test/", "a.test", True),
        ("http://a.test:80/", "a.test", True),
        ("https://a.test/", "a.test", True),
        ("https://a.test:443/", "A.TEST", True),
        ("https://a.test/", "a.test:443", True),
        ("https://a.test:80/", "a.test", False),
        ("http://a.test:443/", "a.test", False),
        ("http://a.test/", "a.test:443", False),
        ("https://x.a.test/", ".a.test", True),
        ("https://a.test/", ".a.test", False),
        ("https://xa.test/", ".a.test", False),
        ("https://x.a.test:8443/", ".a.test:8443", True),
        ("https://x.a.test/", ".a.test:8443", False),
    ],
)
def test_a_host_is_allowed_with_its_port(url: str, domain: str, fine: bool) -> None:
    fetcher = ImageFetcher(["other.test", domain], False, 1, 1)
    if fine:
        return fetcher.check_url(url)
    with pytest.raises(ApiError):
        fetcher.check_url(url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_is_followed(port: int, names: dict[str, list[str]], status: int) -> None:
    names["images.test"] = ["127.0.0.1"]
    assert get(f"http://images.test:{port}/moved/{status}", f"images.test:{port}") == photo()


def test_a_process_that_says_nothing_is_ended_and_its_place_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.images.WALL_TIME_FACTOR", 0.2)
    started: list[Any] = []

    async def decode_slowly() -> None:
        pool = DecodePool(1, 1, 4, ["sleep", "600"])
        start = pool._start

        async def remember() -> Any:
            started.append(await start())
            return started[-1]

        monkeypatch.setattr(pool, "_start", remember)
        with pytest.raises(ApiError) as caught:
            await pool.decode(photo(), 336)
        assert (caught.value.status, pool.idle, pool.slots.locked()) == (503, [], False)
        assert started[0].returncode is not None

    run(decode_slowly())
