"""The hand-drawn town as web mercator tiles, and a real HTTP server that answers with them, or with something worse."""

import io
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyproj
from PIL import Image

from tests import town

WORLD_M = 2 * math.pi * 6378137.0
_UTM = pyproj.Transformer.from_crs("EPSG:3857", "EPSG:32631", always_xy=True)
_HERE = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:32631", always_xy=True).transform(town.LON, town.LAT)

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def ground(z: int, x: int, y: int, side: int = 256) -> Image.Image:
    """What `town.write_imagery` draws, as the tile z/x/y (RGBA, transparent beyond the town)."""
    columns, rows = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5)
    mx = ((x + columns / side) / 2**z - 0.5) * WORLD_M
    my = (0.5 - (y + rows / side) / 2**z) * WORLD_M
    east, north = _UTM.transform(mx, my)
    east, north = east - _HERE[0], north - _HERE[1]
    pixels = np.zeros((side, side, 4), np.uint8)
    pixels[east < 0] = (200, 0, 0, 255)
    pixels[east >= 0] = (0, 0, 200, 255)
    pixels[(east < -125) & (north > 125)] = (0, 180, 0, 255)
    pixels[np.maximum(abs(east), abs(north)) > 250] = 0
    return Image.fromarray(pixels)


@cache
def png(z: int, x: int, y: int) -> bytes:
    """`ground`, encoded."""
    return encoded(ground(z, x, y))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def tiles_of_town(zoom: int) -> Iterator[tuple[int, int]]:
    """Columns and rows of the tiles that the town lies on."""
    x, y = pyproj.Transformer.from_crs("EPSG:4326", "EPSG:3857", always_xy=True).transform(town.LON, town.LAT)
    column, row = (x / WORLD_M + 0.5) * 2**zoom, (0.5 - y / WORLD_M) * 2**zoom
    reach = 450 / (WORLD_M / 2**zoom)  # 250 m on the ground are 408 m of web mercator here
    for i in range(math.floor(column - reach), math.floor(column + reach) + 1):
        for j in range(math.floor(row - reach), math.floor(row + reach) + 1):
            yield i, j


def good(path: str) -> Answer:
    """A PNG of the ground for /z/x/y.png; a town of water elsewhere has no tiles."""
    z, x, y = map(int, path.strip("/").removesuffix(".png").split("/"))
    return 200, {"Content-Type": "image/png"}, png(z, x, y)


@dataclass
class TileServer:
    """Answers each request with `answer(path)`; remembers path, headers and time of each."""

    answer: Callable[[str], Answer] = good
    asked: list[tuple[str, dict[str, str], float]] = field(default_factory=list)
    url: str = ""
    drip_s: float = 0.0  # between the bytes of a body
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["TileServer"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            self.stop.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.asked.append((self.path, dict(self.headers), time.monotonic()))
                status, headers, body = owner.answer(self.path)
                if status == 200 and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                    first, last = int(part[1]), min(int(part[2]), len(body) - 1)
                    headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
                    status, body = 206, body[first : last + 1]
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                try:
                    if not owner.drip_s:
                        self.wfile.write(body)
                    for byte in body if owner.drip_s else b"":
                        self.wfile.write(bytes([byte]))
                        if owner.stop.wait(owner.drip_s):
                            return
                except OSError:
                    return  # whoever asked has gone

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(owner.answer(self.path)[2])))
                self.send_header("Accept-Ranges", "bytes")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        return Handler
