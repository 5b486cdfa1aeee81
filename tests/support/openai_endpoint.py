"""An OpenAI-compatible endpoint on this machine, for tests."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.http_server import Answer, Request, Server

Reply = tuple[int, dict[str, str], dict[str, Any] | str]  # a text is sent as a page


def says(text: str) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, {}, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def refuses(status: int, message: str, **headers: str) -> Reply:
    return status, headers, {"error": {"message": message, "type": "error", "code": None}}


def drops() -> Reply:
    """The connection ends without an answer."""
    raise ConnectionAbortedError


def cuts(reply: Reply) -> Reply:
    """The connection ends in the middle of the answer."""
    text = json.dumps(reply[2])
    return 200, {"Content_Type": "application/json", "Content_Length": str(len(text))}, text[: len(text) // 2]


class Endpoint:
    """A chat completions server on this machine that replies as the test says and remembers its requests."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.reply = reply  # from the number of the request and its body
        self._server = Server(self._answer)
        self.url = f"{self._server.url}/v1"

    @contextmanager
    def running(self) -> Iterator["Endpoint"]:
        with self._server.running():
            yield self

    def _answer(self, request: Request) -> Answer:
        self.requests.append(json.loads(request.body))
        self.keys.append({name.lower(): value for name, value in request.headers.items()}.get("authorization"))
        status, headers, body = self.reply(request.number, self.requests[-1])
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        page = isinstance(body, str)
        kind = {"Content-Type": "text/html" if page else "application/json"}
        return status, {**kind, **named}, (body if isinstance(body, str) else json.dumps(body)).encode()
