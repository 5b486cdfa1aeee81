"""Texts that callers may send to keep the service busy: short pieces, repeated, and what reads them."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple
from unittest import mock

import shapely
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.answers import question_parser
from addressvlm.answers.address_distribution import Prior
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from serve.chat import conversation, parse_chat
from serve.errors import ApiError
from serve.images import ImageFetcher, decode_base64
from serve.requests import parse_json

PIECES = [
    "options: ", "select ", "choose one from ", " from", "[", "]", " ", "\n", "\t", ". ", ".", ",", ";", ":", "?",
    "is ", "was ", "yes or no ", "please answer ", "only ", "with a ", "Mill Street", "Mill ", "Street ",
    "Rue de la Mer", "Rue de la ", "Old Town", "St. ", "Haupt", "strasse", "str", "this ", "photo ",
    "Which street is this? ", "a", "é", "\u0315\u0300", "\ufdfa", "銀座", "'", "&", "ß", "<image>", "<im", "_start|>",
    "{", "}", '"', "\\u", "data:", ";a=", "base64,", "http://", "@", "%", "/", "..", "0", "-", "\u200b", "\u0000",
    "😀",
]  # fmt: skip


class Recipe(NamedTuple):
    """A text of any length: a unit repeated between a beginning and an end."""

    start: str
    unit: str
    end: str

    def text(self, length: int) -> str:
        """About so many characters."""
        return self.start + self.unit * max(1, length // len(self.unit)) + self.end


def recipes() -> st.SearchStrategy[Recipe]:
    """Up to two pieces before, one to four repeated, up to two behind."""
    some = st.lists(st.sampled_from(PIECES), max_size=2).map("".join)
    return st.builds(Recipe, some, st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join), some)


def city(streets: int = 1000) -> Gazetteer:
    """A city with names that begin alike, have variants, and are inside each other."""
    names = ["Mill Street", "Old Mill Street", "Rue de la Mer", "Rue de la Mer du Nord", "銀座", "Old Town Street"]
    names += [f"Rue de la {number}" for number in range(streets - len(names))]
    lines = {name: shapely.LineString([(0, 0), (0.001, 0.001)]) for name in names}
    variants = {"Mill Street": ["Molenstraat", "Mühlstraße", "C/ Mill"], "Rue de la Mer": ["Sea Street"]}
    return Gazetteer([Address(name, "Old Town") for name in names], lines, city="X", variants=variants)


def targets(gazetteer: Gazetteer) -> dict[str, Callable[[str], Any]]:
    """What reads callers' texts without a model; questions also without the bounds on their length, so that growth shows."""
    fetcher = ImageFetcher(["images.example.org"], False, 1, 1)

    def question(text: str) -> Any:
        with mock.patch.multiple(question_parser, MAX_LENGTH=10**9, MAX_OPTIONS=10**9):
            return question_parser.parse_question(text, gazetteer)

    def prior(text: str) -> Any:  # names have at most 200 characters, and there are at most 1,000
        names = tuple(text[at : at + 200] for at in range(0, min(len(text), 200_000), 200))
        return Prior(streets=names[-1:]).log_weights(gazetteer), Prior(weights=dict.fromkeys(names, 1.0)).log_weights(gazetteer)

    def chat(text: str) -> Any:
        return conversation(parse_chat({"model": text, "messages": [{"role": "user", "content": text}]}))

    return {
        "question": lambda text: question_parser.parse_question(text[: question_parser.MAX_LENGTH], gazetteer),
        "question without bounds": question,
        "street": gazetteer.find_street,
        "prior": prior,
        "chat": chat,
        "json": lambda text: parse_json(json.dumps({"image": text}).encode() + text.encode(), "The body"),
        "base64": decode_base64,
        "url": fetcher.check_url,
    }


def cpu_s(function: Callable[[str], Any], text: str) -> float:
    """Seconds of this thread's CPU time, refusals included."""
    start = time.thread_time()
    with suppress(InputError, ApiError):
        function(text)
    return time.thread_time() - start
