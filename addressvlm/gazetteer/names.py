"""Names as their sources write them: cleaned of what nobody sees, several in one told apart, words for "nothing" left out.

Names are displayed in the spelling that these functions return; normal forms (addressvlm/gazetteer/name_matcher.py) are for
matching only.
"""

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

# What programs write where there is no value: pandas, R, SQL, spreadsheets, JavaScript, C, Google's geocoder. Only these
# spellings: `None` is nothing, since Python writes it (a village in Italy has the name; its streets have others), while `Nan`
# (in Thailand), `Na` and `Null` may be names.
_WORDS = (
    "nan none null n/a na nat nil undefined unknown unnamed #n/a #na <na> <null> <none> (null) (none) (blank) (empty) [null] "
    "\\n -nan +nan 1.#ind -1.#ind 1.#qnan -1.#qnan #ref! #value! #name? #div/0! #num! #null!"
).split()
_PHRASES = ("#n/a n/a", "not available", "no data", "unnamed road", "unnamed street")
NO_VALUE = frozenset(
    {word for w in (*_WORDS, *_PHRASES) for word in (w, w.upper())}
    | {"NaN", "NaT", "None", "<NaN>", "#N/A N/A", "Unknown", "Unnamed", "Unnamed Road", "Unnamed road", "(Null)", "\\N"}
)
_BLANKS = dict.fromkeys((0x2800, 0x3164, 0x115F, 0x1160, 0xFFA0), " ")  # look like a blank and count as a symbol or letter
_JOINERS = "\u200c\u200d"  # belong to the spelling in Arabic, Persian and Indian scripts
_JOINED = re.compile("[\u0600-\u06ff\u0900-\u0dff]")
_SEPARATOR = re.compile(r";|(?<=\s)/(?=\s)|[\r\n\u2028\u2029]+")
_LIST = re.compile(r"\s*(\[.*\]|\{.*\}|\(\s*['\"].*\))\s*", re.DOTALL)
_QUOTED = re.compile(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""")
_SIDES = ("name:left", "name:right")
_LANGUAGE = re.compile(r"name:[a-z]{2,3}([-_]\w+)*")  # not name:left, name:etymology, name:pronunciation
_OTHER_NAMES = re.compile(r"(alt_name|old_name|official_name|short_name|int_name|loc_name)(:[a-z]{2,3}([-_]\w+)*)?|name_\d+")


class DamagedTextError(ValueError):
    """A text that lost characters when it was written or read in a wrong encoding."""


def is_nothing(text: str) -> bool:
    """Whether a cell says that there is no value: by one of NO_VALUE, or without any letter or digit."""
    return text in NO_VALUE or not (text[:1].isalnum() or any(map(str.isalnum, text)))


def clean_name(text: str) -> str:
    """The name with composed accents and single blanks, without characters that can't be seen.

    Raises:
        DamagedTextError: it has a replacement character or half of a surrogate pair.
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip()
    if damaged := [c for c in text if c == "\ufffd" or "\ud800" <= c <= "\udfff"]:
        raise DamagedTextError(f"damaged text: {printable(text)!r} has lost {len(damaged)} of its characters")
    characters = []
    for character in unicodedata.normalize("NFC", text.translate(_BLANKS)):
        kind = unicodedata.category(character)
        if kind == "Cc":
            characters.append(" ")
        elif kind != "Cf" or (character in _JOINERS and characters and _JOINED.match(characters[-1])):
            characters.append(character)
    return " ".join("".join(characters).split())


def printable(text: str) -> str:
    """The text with what UTF-8 can't hold, as in the name of a file in another encoding, written as `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode()


def split_names(value: Any) -> list[str]:
    """The names in a cell or property, cleaned, each once: of a list, or between `;`, ` / ` or line breaks.

    A list may also be the text of one, as Python, JSON and PostgreSQL write it: `['Mill Street', 'Quay Road']`.
    """
    if isinstance(value, str):
        return list(_split_text(value))
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(name for item in value for name in split_names(item)))
    return [] if value is None or value != value else [str(value)]


@lru_cache(maxsize=65536)
def _split_text(text: str) -> tuple[str, ...]:
    if _LIST.fullmatch(text):
        quoted = [one or other for one, other in _QUOTED.findall(text)]
        parts = [re.sub(r"\\(.)", r"\1", item) for item in quoted] or text.strip()[1:-1].split(",")
    else:
        parts = _SEPARATOR.split(text)
    return tuple(dict.fromkeys(name for part in parts if not is_nothing(name := clean_name(part))))


def single_names(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """The tags of a street once for each of its names, which may stand in one tag or differ by the side of the street.

    A name in two languages (`Via Roma / Romstraße` with `name:it` and `name:de`, or with both in `alt_name`) is one;
    translations are told apart with it.
    """
    names = split_names(tags.get("name", ""))
    languages = {key: split_names(value) for key, value in tags.items() if _LANGUAGE.fullmatch(key)}
    others = split_names(tags.get("alt_name", ""))
    if len(names) > 1 and all([name] in languages.values() or name in others for name in names):
        names = [clean_name(tags["name"])]
    every = list(dict.fromkeys([*names, *(name for side in _SIDES for name in split_names(tags.get(side, "")))]))
    if len(every) < 2 and not any(len(parts) > 1 for parts in languages.values()):
        return [dict(tags, name=every[0]) if every else dict(tags)]
    rest = without_names(tags)
    return [
        rest
        | {"name": name}
        | {key: parts[i] for key, parts in languages.items() if i < len(names) and len(parts) == len(names)}
        for i, name in enumerate(every)
    ]


def without_names(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that hold no name."""
    return {key: value for key, value in tags.items() if not key.startswith("name") and not _OTHER_NAMES.fullmatch(key)}


def osm_names(tags: Mapping[str, str], language: str | None = None) -> tuple[str, list[str]]:
    """The display name of an OpenStreetMap object and its variants; ("", []) if it has no name.

    The display name is `name:<language>` if there is a language and the object has it, else `name`. Variants are the names in
    other languages and `alt_name`, `old_name`, `official_name`, `short_name` …, which may list several between semicolons.
    """
    name = clean_name(tags.get("name", ""))
    display = (clean_name(tags.get(f"name:{language}", "")) if language else "") or name
    if not display:
        return "", []
    variants = [name] if name else []
    for key in sorted(tags):
        if _OTHER_NAMES.fullmatch(key) or _LANGUAGE.fullmatch(key):
            variants += split_names(tags[key])
    return display, [variant for variant in dict.fromkeys(variants) if variant != display]
