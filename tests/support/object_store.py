"""An object store with enough of S3's protocol for runs, and of Google's to read files.

    python tests/support/object_store.py <folder>

Its one bucket is called `bucket` and lies in the folder; another one is not there, and `secret` is refused. Prints its port.
In a process of its own because pyarrow holds the interpreter's lock while it asks a store.
"""

import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

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
    protocol_version = "HTTP/1.1"  # else every upload waits a second for leave to go on

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
        elif not key and not path.startswith("/bucket"):
            self.refused(path)
        elif not key:
            keys, below = self.listed(query)
            result = "".join(
                f"<Contents><Key>{escape(k)}</Key><Size>{(self.folder / k).stat().st_size}</Size>"
                "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                for k in keys
            )
            result += "".join(f"<CommonPrefixes><Prefix>{escape(k)}</Prefix></CommonPrefixes>" for k in below)
            count = len(keys) + len(below)
            head = f"<Name>bucket</Name><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>"
            self.answer(f"<?xml version='1.0'?><ListBucketResult>{head}{result}</ListBucketResult>".encode(), "application/xml")
        elif path.startswith("/secret"):
            self.refused(path)
        elif not file.is_file():
            self.answer(b"", "text/plain", 404)
        elif path.startswith(GOOGLE) and query.get("alt") != "media":
            self.answer(json.dumps(self.about(key)).encode(), "application/json")
        else:
            self.answer(file.read_bytes(), "application/octet-stream")

    def do_PUT(self) -> None:
        url = urlsplit(self.path)
        data = self.body()
        if not url.path.startswith("/bucket/"):
            self.refused(url.path)
            return
        file = self.folder / unquote(url.path).removeprefix("/bucket/")
        if not url.path.endswith("/"):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{file.name}.{threading.get_ident()}")
            partial.write_bytes(data)
            partial.replace(file)
        self.answer(b"", "application/xml", headers={"ETag": '"1"'})

    def do_DELETE(self) -> None:
        self.remove(unquote(urlsplit(self.path).path).removeprefix("/bucket/"))
        self.answer(b"", "application/xml", 204)

    def do_POST(self) -> None:
        """Many keys to delete; uploads in parts are not known."""
        if "delete" not in urlsplit(self.path).query:
            self.answer(b"", "application/xml", 501)
            return
        for key in re.findall(r"<Key>(.*?)</Key>", self.body().decode()):
            self.remove(unescape(key))
        self.answer(b"<?xml version='1.0'?><DeleteResult></DeleteResult>", "application/xml")

    def remove(self, key: str) -> None:
        file = self.folder / key
        file.unlink(missing_ok=True) if not file.is_dir() else None
        while file.parent != self.folder and file.parent.is_dir() and not any(file.parent.iterdir()):
            file = file.parent
            file.rmdir()

    def body(self) -> bytes:
        """What was sent, without the frames of its chunks."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = self.chunks(self.rfile)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return self.chunks(io.BytesIO(data)) if "x-amz-decoded-content-length" in self.headers else data

    def chunks(self, file: IO[bytes]) -> bytes:
        data = b""
        while size := int(file.readline().split(b";")[0] or b"0", 16):
            data += file.read(size)
            file.readline()
        while file.readline().strip():
            pass
        return data

    def refused(self, path: str) -> None:
        status, code = (403, "AccessDenied") if path.startswith("/secret") else (404, "NoSuchBucket")
        self.answer(f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode(), "application/xml", status)

    def listed(self, query: dict[str, str]) -> tuple[list[str], list[str]]:
        """The keys below the prefix, and the folders among them where only one level is wanted."""
        keys = self.keys(query)
        if query.get("delimiter") != "/":
            return keys, []
        start = len(query.get("prefix", ""))
        below = {key[: key.index("/", start) + 1] for key in keys if "/" in key[start:]}
        return [key for key in keys if "/" not in key[start:]], sorted(below)

    def keys(self, query: dict[str, str]) -> list[str]:
        files = sorted(
            f.relative_to(self.folder).as_posix() for f in self.folder.rglob("*") if f.is_file() and f.name[0] != "."
        )
        return [key for key in files if key.startswith(query.get("prefix", ""))]

    def about(self, key: str) -> dict[str, str]:
        size, time = str((self.folder / key).stat().st_size), "2024-01-01T00:00:00Z"
        return {"name": key, "bucket": "bucket", "size": size, "generation": "1", "timeCreated": time, "updated": time}

    def answer(self, data: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        total, expected = len(data), self.headers.get("Range")
        if expected and status == 200:
            first, _, last = expected.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{total}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
