"""Where a free text names streets and districts, and where its sentences end."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from addressvlm.names import bare, normal

# A full stop ends a sentence unless it follows one of the usual abbreviations in names.
_SENTENCE_END = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bDr\.)(?<!\b[NSEW]\.)(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_CHUNK = re.compile(rf"[{_UNSPACED}]|[^\s\-–—/{_UNSPACED}]+")
_POSSESSIVE = re.compile(r"['’]s?\W*$")


class Mention(NamedTuple):
    """A name in a text: as its source writes it, and the characters of the text that it covers."""

    name: str
    start: int
    end: int


class Names:
    """Finds known names in free text, longest first, so that `Old Mill Street` is not also `Mill Street`."""

    def __init__(
        self, names: Iterable[str], more: "Names | None" = None, variants: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """`variants`: name -> other names it goes by, which count as the name."""
        names = list(names)
        self._forms: dict[tuple[str, ...], str] = {}
        for form in (normal, bare):
            self._add((form(name), name) for name in names)
        self._add((normal(other), name) for name, others in (variants or {}).items() for other in others)
        self._more = more  # looked up as well instead of copied: a city has thousands, and each row adds a few
        self._first = {form[0] for form in self._forms}
        self._longest: int = max([*map(len, self._forms), more._longest if more else 0], default=0)

    def find(self, text: str) -> list[Mention]:
        """The names in the order of the text. A name of one word must be written with its capital: a church is no Church."""
        words, found, at = _words(text), [], 0
        while at < len(words):
            mention, length = self._at(text, words, at)
            if mention is not None:
                found.append(mention)
            at += length
        return found

    def mentions(self, text: str) -> list[str]:
        """Normal forms of the names in the order of the text."""
        return [normal(mention.name) for mention in self.find(text)]

    def _at(self, text: str, words: list["_Word"], at: int) -> tuple[Mention | None, int]:
        """The longest name that begins with this word, and how many words to go on by."""
        if not self._begins(words[at]):  # nearly all words
            return None, 1
        for length in range(min(self._longest, len(words) - at), 0, -1):
            here = words[at : at + length]
            key = tuple(word.form for word in here)
            name = self._get(key) or self._get((*key[:-1], here[-1].bare))
            if name and (length > 1 or not name[0].isupper() or not text[here[0].start].islower()):
                return Mention(name, here[0].start, here[-1].end), length
        return None, 1

    def _begins(self, word: "_Word") -> bool:
        return word.form in self._first or word.bare in self._first or bool(self._more and self._more._begins(word))

    def _get(self, key: tuple[str, ...]) -> str | None:
        return self._forms.get(key) or (self._more._get(key) if self._more else None)

    def _add(self, forms: Iterable[tuple[str, str]]) -> None:
        for form, name in forms:
            if form:
                self._forms.setdefault(tuple(form.split()), name)


class _Word(NamedTuple):
    form: str
    bare: str  # without the ending of the possessive
    start: int
    end: int


@lru_cache(maxsize=256)
def _words(text: str) -> list[_Word]:
    words = []
    for chunk in _CHUNK.finditer(text):
        end = chunk.start() + len(chunk.group().rstrip(".,;:!?)”\"'’"))
        short = normal(_POSSESSIVE.sub("", chunk.group())).split()
        for i, word in enumerate(normal(chunk.group()).split()):
            words.append(_Word(word, short[i] if i < len(short) else word, chunk.start(), end))
    return words


def sentences(text: str) -> list[str]:
    """The sentences of a text in any script."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
