"""Images from web addresses: allowed hosts only, no private network, no end without a limit. A real server in this process."""

import asyncio
import gzip
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serve as service
from serve.errors import ApiError
from serve.images import ImageFetcher, Images, is_public
from tests.support.running_service import photo

pytestmark = pytest.mark.xdist_group("serve")
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
        }
        if self.path in away:
            self.send_response(302)
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


def refused(url: str, *domains: str, words: str, **options: Any) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        get(url, *domains, **options)
    assert caught.value.status == 400


def test_an_allowed_image_is_fetched(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    assert get(f"http://images.test:{port}/photo", f"images.test:{port}") == photo()
    assert get(f"http://images.test:{port}/to-photo", f".test:{port}") == photo()
    assert get(f"http://IMAGES.test:{port}/photo", f"images.test:{port}") == photo()
    assert get(f"http://images.test:{port}/to-photo-by-3", f"images.test:{port}") == photo()  # as often as is allowed
    assert get(f"http://images.test:{port}/photo", f"images.test:{port}", max_mb=(len(photo()) + 0.5) / 1e6) == photo()
    refused(f"http://images.test:{port}/photo", f"images.test:{port}", words="larger", max_mb=(len(photo()) - 0.5) / 1e6)


def test_a_name_is_resolved_once_and_that_address_is_judged(port: int, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    get(f"http://images.test:{port}/photo", f"images.test:{port}")
    assert names[""] == ["images.test"]
    for addresses in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"]):
        names["images.test"] = addresses
        refused(f"http://images.test:{port}/secret", f"images.test:{port}", words="private network", private=False)


@pytest.mark.parametrize("path", ["to-loopback", "to-decimal", "to-metadata", "to-other"])
def test_redirects_are_judged_anew(port: int, names: dict[str, list[str]], path: str) -> None:
    names["images.test"] = ["127.0.0.1"]
    refused(f"http://images.test:{port}/{path}", f"images.test:{port}", words="not fetched from this host")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("to-file", "http and https only"),
        ("to-itself", "redirects more than 3 times"),
        ("missing", "answered 404"),
        ("endless", "larger than 1 MB"),
        ("silent", "took more than"),
    ],
)
def test_bad_servers(port: int, names: dict[str, list[str]], path: str, words: str) -> None:
    names["images.test"] = ["127.0.0.1"]
    limit = 0.2 if path == "silent" else 20
    refused(f"http://images.test:{port}/{path}", f"images.test:{port}", words=words, timeout_s=limit)


def test_what_is_packed_is_not_unpacked(port: int, names: dict[str, list[str]]) -> None:
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
    given_settings = service.ServiceSettings(image_domains=f"images.test:{port}", private_addresses=True)

    async def read() -> Any:
        images = Images(given_settings)
        found = await images.read(f" http://images.test:{port}/photo")
        await images.decode_pool.close()
        return found

    assert asyncio.run(read()).shape == (240, 320, 3)
