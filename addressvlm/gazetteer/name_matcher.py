"""Names of streets and districts: one form to compare them in, the spellings that OpenStreetMap gives, free text.

Names are shown as their source writes them. The forms here are for matching only.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

# The short form stands for all of them. "Saint" and "Street" share "st": which one is meant follows from the rest. Only
# words that hardly ever stand for something else in a name are here; two streets that meet in one form in some city are
# still told apart as they are written.
_SHORT = {
    "st": ["street", "saint", "str", "strasse", "straat"],
    "ste": ["sainte"],
    "ave": ["avenue", "av", "avenida", "avda", "avinguda"],
    "rd": ["road"],
    "ln": ["lane"],
    "dr": ["drive"],
    "blvd": ["boulevard", "boul", "bd", "bvd"],
    "pl": ["place", "platz", "plac"],
    "plaza": ["plza", "pza"],
    "sq": ["square"],
    "ct": ["court"],
    "ter": ["terrace", "terr"],
    "cl": ["close"],
    "cres": ["crescent"],
    "gdns": ["gardens"],
    "hwy": ["highway"],
    "pkwy": ["parkway"],
    "mt": ["mount"],
    "r": ["rue", "rua"],
    "c": ["calle", "carrer"],
    "ul": ["ulica"],
    "cd": ["caddesi", "cad"],
    "sk": ["sokak", "sokağı", "sokagi"],
    "ул": ["улица"],
    "пр": ["проспект", "просп"],
    "пер": ["переулок"],
    "пл": ["площадь"],
    "and": ["&"],
    "n": ["north"],
    "s": ["south"],
    "e": ["east"],
    "w": ["west"],
    "ne": ["northeast"],
    "nw": ["northwest"],
    "se": ["southeast"],
    "sw": ["southwest"],
}
_FORM = {long: short for short, longs in _SHORT.items() for long in longs}
_SUFFIX = re.compile(r"(?<=\w\w\w)(?:strasse|straat|str)$")  # written as one word: Hauptstraße, Hauptstr.
_APOSTROPHES = "'’‘ʼ`´"
_BARE = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ı": "i", "ё": "е"})
_LANGUAGE = re.compile(r"name:[a-z]{2,3}([-_]\w+)*")  # not name:left, name:etymology, name:pronunciation
_OTHER_NAMES = re.compile(r"(alt_name|old_name|official_name|short_name|int_name|loc_name)(:[a-z]{2,3}([-_]\w+)*)?|name_\d+")


@lru_cache(maxsize=65536)
def normalize_name(name: str) -> str:
    """The form in which two spellings of one name are equal: `St. Mary's Rd` and `saint marys road`.

    Case, width, punctuation and common abbreviations vanish; scripts written without spaces are split into characters.
    """
    characters = []
    for character in unicodedata.normalize("NFKC", name).casefold():
        if character in _APOSTROPHES:
            continue
        if character != "&" and unicodedata.category(character)[0] in "PSZC":
            characters.append(" ")
        else:
            characters.append(f" {character} " if _unspaced(character) or character == "&" else character)
    return " ".join(_FORM.get(w, _SUFFIX.sub("str", w)) for w in "".join(characters).split())


@lru_cache(maxsize=65536)
def unaccented_name(name: str) -> str:
    """The normal form without the accents of Latin letters, as people write who lack the key; as many words."""
    words = (_without_accents(word).translate(_BARE) for word in normalize_name(name).split())
    return " ".join(_FORM.get(word, word) for word in words)


def is_distinctive(name: str) -> bool:
    """Whether something of the name is left without the words that every street has, as in `E Street` it is not."""
    return any(word not in _SHORT for word in normalize_name(name).split())


def osm_names(tags: Mapping[str, str], language: str | None = None) -> tuple[str, list[str]]:
    """The name that is shown and the other names of an OpenStreetMap object: ("", []) if it has none.

    Shown is `name:<language>` where a language is asked for and given, else `name`. The others are the names in other
    languages and `alt_name`, `old_name`, `official_name`, `short_name`, … , which may hold several between semicolons.
    """
    name = tags.get("name", "").strip()
    shown = (tags.get(f"name:{language}", "").strip() if language else "") or name
    if not shown:
        return "", []
    others = [name] if name else []
    for key in sorted(tags):
        if _OTHER_NAMES.fullmatch(key) or _LANGUAGE.fullmatch(key):
            others += [part.strip() for part in tags[key].split(";")]
    return shown, [other for other in dict.fromkeys(others) if other and other != shown]


class NameIndex:
    """Finds which of the names a free text holds, under any of their spellings.

    A name is found without its accents too, unless that would make it equal to another name. A variant that is the name of
    another one belongs to that other one.
    """

    def __init__(self, names: Iterable[str], variants: Mapping[str, Iterable[str]] | None = None) -> None:
        names = list(names)
        self._names: dict[tuple[str, ...], dict[str, list[str]]] = {}  # words -> name -> spellings that have this form
        self._add({name: [name] for name in names}, normalize_name, shared=True)
        self._add({name: [name] for name in names}, unaccented_name, shared=False)
        others = {name: [v for v in (variants or {}).get(name, ()) if _telling(normalize_name(v))] for name in names}
        self._add(others, normalize_name, shared=True)
        self._add(others, unaccented_name, shared=False)
        self._longest = max(map(len, self._names), default=0)

    def find(self, text: str) -> str | None:
        """The one name in the text, None if there is none or if there are several."""
        words, bare_words = normalize_name(text).split(), unaccented_name(text).split()
        found: dict[tuple[int, int], tuple[str, ...]] = {}
        for length in range(min(self._longest, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                span = (start, start + length)
                for key in (tuple(words[slice(*span)]), tuple(bare_words[slice(*span)])):
                    if key in self._names:
                        found.setdefault(span, key)
        whole = [s for s in found if not any(o != s and o[0] <= s[0] and s[1] <= o[1] for o in found)]
        meant = {self._meant(found[span], text) for span in whole}
        return meant.pop() if len(meant) == 1 else None

    def same(self, name: str) -> str | None:
        """The one of the names that this is a spelling of, as a whole; None if there is none."""
        for form in (normalize_name, unaccented_name):
            key = tuple(form(name).split())
            if key in self._names:
                return self._meant(key, name)
        return None

    def _meant(self, key: tuple[str, ...], text: str) -> str | None:
        """The name of this form; where several share it, the one whose own spelling is in the text, the longest if several."""
        names = self._names[key]
        if len(names) == 1:
            return next(iter(names))
        written = {(len(s), name) for name, all_of in names.items() for s in all_of if s.casefold() in text.casefold()}
        longest = [name for length, name in written if length == max(written)[0]]
        return longest[0] if len(longest) == 1 else None

    def _add(self, names: Mapping[str, Iterable[str]], form: Callable[[str], str], shared: bool) -> None:
        """Add forms of the spellings that are not there yet; those of several names only if they may be `shared`."""
        new: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)
        for name, all_of in names.items():
            for spelling in all_of:
                key = tuple(form(spelling).split())
                if key and key not in self._names:
                    new[key].setdefault(name, []).append(spelling)
        self._names |= {key: found for key, found in new.items() if shared or len(found) == 1}


def _telling(form: str) -> bool:
    """Whether a variant can be looked for in free text: not a mere letter or number."""
    return len(form) > 2 and not form.replace(" ", "").isdecimal()


def _without_accents(word: str) -> str:
    """The word with the marks of Latin letters taken off; other scripts keep theirs (they make other letters there)."""
    kept = []
    for character in word:
        base = unicodedata.normalize("NFD", character)[0]
        kept.append(base if "a" <= base <= "z" else character)
    return "".join(kept)


def _unspaced(character: str) -> bool:
    """Whether it belongs to Chinese or Japanese script."""
    return "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff"


# A full stop ends a sentence unless it follows one of the usual abbreviations in names.
_SENTENCE_END = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bDr\.)(?<!\b[NSEW]\.)(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_CHUNK = re.compile(rf"[{_UNSPACED}]|[^\s\-–—/{_UNSPACED}]+")
_POSSESSIVE = re.compile(r"['’]s?\W*$")


class NameMention(NamedTuple):
    """A name in a text: as its source writes it, and the characters of the text that it covers."""

    name: str
    start: int
    end: int


class MentionFinder:
    """Finds known names in free text, longest first, so that `Old Mill Street` is not also `Mill Street`."""

    def __init__(
        self, names: Iterable[str], more: "MentionFinder | None" = None, variants: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """`variants`: name -> other names it goes by, which count as the name."""
        names = list(names)
        self._forms: dict[tuple[str, ...], str] = {}
        for form in (normalize_name, unaccented_name):
            self._add((form(name), name) for name in names)
        self._add((normalize_name(other), name) for name, others in (variants or {}).items() for other in others)
        self._more = more  # looked up as well instead of copied: a city has thousands, and each row adds a few
        self._first = {form[0] for form in self._forms}
        self._longest: int = max([*map(len, self._forms), more._longest if more else 0], default=0)

    def find(self, text: str) -> list[NameMention]:
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
        return [normalize_name(mention.name) for mention in self.find(text)]

    def _at(self, text: str, words: list["_Word"], at: int) -> tuple[NameMention | None, int]:
        """The longest name that begins with this word, and how many words to go on by."""
        if not self._begins(words[at]):  # nearly all words
            return None, 1
        for length in range(min(self._longest, len(words) - at), 0, -1):
            here = words[at : at + length]
            key = tuple(word.form for word in here)
            name = self._get(key) or self._get((*key[:-1], here[-1].bare))
            if name and (length > 1 or not name[0].isupper() or not text[here[0].start].islower()):
                return NameMention(name, here[0].start, here[-1].end), length
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
        short = normalize_name(_POSSESSIVE.sub("", chunk.group())).split()
        for i, word in enumerate(normalize_name(chunk.group()).split()):
            words.append(_Word(word, short[i] if i < len(short) else word, chunk.start(), end))
    return words


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in any script."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
