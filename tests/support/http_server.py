"""A real HTTP server on this machine, for tests: answers as the test says and remembers the requests."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, urlsplit

Answer = tuple[int, Mapping[str, str], bytes]  # status, headers, body


@dataclass(frozen=True)
class Request:
    """One request."""

    number: int  # from 1
    path: str  # with its query
    headers: Mapping[str, str]
    body: bytes
    at: float  # seconds of a clock that never goes back

    @property
    def query(self) -> dict[str, str]:
        return {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}


class Server:
    """Answers one request after the other; a HEAD and a Range are answered from the whole body."""

    def __init__(self, answer: Callable[[Request], Answer], drip_s: float = 0.0) -> None:
        """`drip_s`: seconds between the bytes of a body."""
        self.answer, self.drip_s = answer, drip_s
        self.requests: list[Request] = []
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def reply(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Remember the request and answer it."""
        with self._lock:
            self.requests.append(Request(len(self.requests) + 1, path, headers, body, time.monotonic()))
            return self.answer(self.requests[-1])

    def pieces(self, body: bytes) -> Iterator[bytes]:
        """The body, byte by byte if it drips, until the test is over."""
        if not self.drip_s:
            yield body
            return
        for byte in body:
            yield bytes([byte])
            if self._stop.wait(self.drip_s):
                return


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            status, headers, body = server.reply(self.path, dict(self.headers), self.rfile.read(length))
            if status == 200 and (part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                first, last = int(part[1]), min(int(part[2]), len(body) - 1)
                headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
                status, body = 206, body[first : last + 1]
            try:
                self.send_response(status)
                for key, value in {"Accept-Ranges": "bytes", "Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                for piece in server.pieces(body) if self.command != "HEAD" else ():
                    self.wfile.write(piece)
            except OSError:
                return  # the client has gone

        do_POST = do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    return Handler
