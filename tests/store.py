"""A store that speaks enough of S3's and Google's protocols to read files of a folder: python tests/store.py <folder>

Prints its port. In a process of its own because pyarrow holds the interpreter's lock while it asks a store.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

GOOGLE = "/storage/v1/b/bucket/o"


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """Serve the folder as `bucket` of both stores; yields http://host:port."""
    process = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate()


class Handler(BaseHTTPRequestHandler):
    folder = Path()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: value[0] for key, value in parse_qs(url.query).items()}
        key = path.removeprefix(GOOGLE).removeprefix("/bucket").strip("/")
        file = self.folder / key
        if not key and path.startswith(GOOGLE):
            self.answer(json.dumps({"items": [self.about(k) for k in self.keys(query)]}).encode(), "application/json")
        elif not key:
            found = "".join(
                f"<Contents><Key>{escape(k)}</Key><Size>{(self.folder / k).stat().st_size}</Size>"
                "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                for k in self.keys(query)
            )
            count = len(self.keys(query))
            head = f"<Name>bucket</Name><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>"
            self.answer(f"<?xml version='1.0'?><ListBucketResult>{head}{found}</ListBucketResult>".encode(), "application/xml")
        elif not file.is_file():
            self.answer(b"", "text/plain", 404)
        elif path.startswith(GOOGLE) and query.get("alt") != "media":
            self.answer(json.dumps(self.about(key)).encode(), "application/json")
        else:
            self.answer(file.read_bytes(), "application/octet-stream")

    def keys(self, query: dict[str, str]) -> list[str]:
        files = sorted(f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file())
        return [key for key in files if key.startswith(query.get("prefix", ""))]

    def about(self, key: str) -> dict[str, str]:
        size, time = str((self.folder / key).stat().st_size), "2024-01-01T00:00:00Z"
        return {"name": key, "bucket": "bucket", "size": size, "generation": "1", "timeCreated": time, "updated": time}

    def answer(self, data: bytes, kind: str, status: int = 200) -> None:
        total, wanted = len(data), self.headers.get("Range")
        if wanted and status == 200:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
