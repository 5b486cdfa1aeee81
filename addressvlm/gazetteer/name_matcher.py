"""Normal forms of street and district names, and finding them in free text.

Names are displayed as their source writes them; the forms here are for matching only. There are three finders, each with the
rules of its task: `NameIndex` for questions (spelling mistakes in accents, ambiguity), `NameFinder` for judging answers, and
`MentionFinder` for labels (positions, possessives, capitals).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import NamedTuple, TypeVar

Word = TypeVar("Word")

# Abbreviation -> words it stands for. "Saint" and "Street" share "st"; the other words of a name tell them apart. Only words
# that hardly ever mean something else in a name are listed; streets that share a form differ in their spelling.
_SHORT = {
    "st": ["street", "saint", "str", "strasse", "straat"], "ste": ["sainte"],
    "ave": ["avenue", "av", "avenida", "avda", "avinguda"], "rd": ["road"], "ln": ["lane"], "dr": ["drive"],
    "blvd": ["boulevard", "boul", "bd", "bvd"], "pl": ["place", "platz", "plac"], "plaza": ["plza", "pza"], "sq": ["square"],
    "ct": ["court"], "ter": ["terrace", "terr"], "cl": ["close"], "cres": ["crescent"], "gdns": ["gardens"],
    "hwy": ["highway"], "pkwy": ["parkway"], "mt": ["mount"], "r": ["rue", "rua"], "c": ["calle", "carrer"], "ul": ["ulica"],
    "cd": ["caddesi", "cad"], "sk": ["sokak", "sokaği", "sokagi"], "ул": ["улица"], "пр": ["проспект", "просп"],
    "пер": ["переулок"], "пл": ["площадь"], "and": ["&"], "n": ["north"], "s": ["south"], "e": ["east"], "w": ["west"],
    "ne": ["northeast"], "nw": ["northwest"], "se": ["southeast"], "sw": ["southwest"],
}  # fmt: skip
_ABBREVIATIONS = {word: short for short, words in _SHORT.items() for word in words}
_DIRECTIONS = frozenset(word for short in ("n", "s", "e", "w", "ne", "nw", "se", "sw") for word in _SHORT[short])
MAX_NAME, MAX_TEXT = 64, 4000  # characters of what is remembered: at most about 100 MB of names, and a few texts
MAX_LETTERS = 65536
MAX_MARKS = 30  # as in Unicode's stream-safe text
_SUFFIXES = ("strasse", "straat", "str")
_SUFFIX = re.compile(rf"(?<=\w\w\w)(?:{'|'.join(_SUFFIXES)})$")  # as in Hauptstraße, Hauptstr.
_APOSTROPHES = "'’‘‛ʼʻʽʾʿꞌ`´′׳"  # the Hawaiian ʻokina and the Arabic ʿayn among them
# Letters that one language's capitals, or its usual spelling, don't tell apart: the Turkish İ and ı, small Japanese ヶ.
_SAME_LETTERS = str.maketrans({"ı": "i", "ヶ": "ケ", "ヵ": "カ", "ς": "σ", "\u0640": None})
_OPTIONAL_MARKS = re.compile(  # Hebrew points, Arabic harakat
    "[\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\ufe00-\ufe0f]"
)
_GREEK_MARKS = re.compile("(?<=[\u0370-\u03ff])[\u0300-\u036f]+")
_NUMERALS = "〇一二三四五六七八九"
_NUMERAL = re.compile(f"[{_NUMERALS}十]+")
_PLAIN_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe", "ё": "е"}
    | dict.fromkeys("أإآٱ", "ا") | {"ى": "ي", "ی": "ي", "ک": "ك", "ة": "ه"}
)  # fmt: skip


class _Letters(dict[int, str]):
    """What `str.translate` puts in place of each character, worked out when it is first met."""

    def __init__(self, form: Callable[[str], str]) -> None:
        self.form = form

    def __missing__(self, code: int) -> str:
        text = self.form(chr(code))
        if len(self) < MAX_LETTERS:
            self[code] = text
        return text


def _normal_letter(character: str) -> str:
    kind = unicodedata.category(character)
    if character in _APOSTROPHES or kind == "Cf":
        return ""
    if character != "&" and kind[0] in "PSZC":
        return " "
    if "\u0370" <= character <= "\u03ff" or "\u1f00" <= character <= "\u1fff":  # Greek
        return unicodedata.normalize("NFD", character)[0]
    is_unspaced = "\u3040" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff"  # Chinese, Japanese
    return f" {character} " if is_unspaced or character == "&" else character


def _plain_letter(character: str) -> str:
    base = unicodedata.normalize("NFD", character)[0]
    return (base if "a" <= base <= "z" else character).translate(_PLAIN_LETTERS)


def _remember(form: Callable[[str], str]) -> Callable[[str], str]:
    """Remember the forms of names and of the latest texts, but not all of the long texts that callers may send."""
    names, latest = lru_cache(maxsize=65536)(form), lru_cache(maxsize=4)(form)

    @wraps(form)
    def wrapper(text: str) -> str:
        return (names if len(text) <= MAX_NAME else latest if len(text) <= MAX_TEXT else form)(text)

    return wrapper


_NORMAL_LETTERS, _BASE_LETTERS = _Letters(_normal_letter), _Letters(_plain_letter)


@_remember
def normalize_name(name: str) -> str:
    """A form in which all spellings of a name are equal: `St. Mary's Rd` and `saint marys road`, `三丁目` and `３丁目`.

    It ignores case, character width, punctuation, common abbreviations, characters that can't be seen, and accents where
    capitals have none (Greek) or most texts leave them out (Arabic, Hebrew); scripts without spaces are split into characters.
    """
    text = unicodedata.normalize("NFKC", _without_long_runs(name)).casefold()
    text = text.replace("i\u0307", "i").translate(_SAME_LETTERS)
    text = _NUMERAL.sub(_digits, _OPTIONAL_MARKS.sub("", text))
    text = _GREEK_MARKS.sub("", text.translate(_NORMAL_LETTERS))
    return " ".join([_ABBREVIATIONS.get(w) or (_SUFFIX.sub("str", w) if w.endswith(_SUFFIXES) else w) for w in text.split()])


def _digits(numeral: re.Match[str]) -> str:
    """A Chinese or Japanese numeral below 100 in digits, digit by digit where it has no 十."""
    tens, ten, ones = numeral.group().rpartition("十")
    if not ten:
        return "".join(str(_NUMERALS.index(c)) for c in ones)
    if len(tens) > 1 or len(ones) > 1 or tens == "十":
        return " ".join("10" if c == "十" else str(_NUMERALS.index(c)) for c in numeral.group())
    return str(10 * (_NUMERALS.index(tens) if tens else 1) + (_NUMERALS.index(ones) if ones else 0))


def _without_long_runs(text: str) -> str:
    """A text with at most MAX_MARKS combining characters in a row: Python sorts them, in time that grows by the square."""
    if len(text) <= MAX_MARKS or text.isascii():
        return text
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= MAX_MARKS:
            kept.append(character)
    return "".join(kept)


@_remember
def unaccented_name(name: str) -> str:
    """The normal form without the accents of Latin letters, which in other scripts make other letters; it has as many words."""
    return " ".join([_ABBREVIATIONS.get(w, w) for w in normalize_name(name).translate(_BASE_LETTERS).split()])


def is_distinctive(name: str) -> bool:
    """Whether a name has a word other than generic ones; `E Street` has none."""
    return any(word not in _SHORT for word in normalize_name(name).split())


def spelling_form(name: str) -> str:
    """The normal form of a distinctive name; of another one with its directions as they are written.

    So `E Street` and `E ST.` are one, and `East Street` is another street, which may well cross.
    """
    if is_distinctive(name):
        return normalize_name(name)
    written = re.sub(
        r"[^\W\d_]+", lambda word: f"{word.group()}0" if word.group().casefold() in _DIRECTIONS else word.group(), name
    )
    return normalize_name(written)


class NameIndex:
    """Finds the one name that a free text mentions, in any of its spellings.

    A name also matches without its accents, unless it then equals another name. A variant that is itself another entry's name
    belongs to that entry.
    """

    def __init__(self, names: Iterable[str], variants: Mapping[str, Iterable[str]] | None = None) -> None:
        names = list(names)
        self._names: dict[tuple[str, ...], dict[str, list[str]]] = {}  # words -> name -> spellings with this form
        self._add({name: [name] for name in names}, normalize_name, shared=True)
        self._add({name: [name] for name in names}, unaccented_name, shared=False)
        others = {}
        for name in names:
            forms = {variant: normalize_name(variant) for variant in (variants or {}).get(name, ())}
            others[name] = [v for v, form in forms.items() if len(form) > 2 and not form.replace(" ", "").isdecimal()]
        self._add(others, normalize_name, shared=True)
        self._add(others, unaccented_name, shared=False)
        self._longest = _longest_by_first_word(self._names)

    def find(self, text: str) -> str | None:
        """The one name in the text, None if there is none or several; one inside a longer one does not count."""
        words, plain_words = tuple(normalize_name(text).split()), tuple(unaccented_name(text).split())
        keys: dict[tuple[str, ...], None] = {}
        end = 0  # of the names so far
        for start, (word, plain_word) in enumerate(zip(words, plain_words, strict=True)):
            longest = max(self._longest.get(word, 0), self._longest.get(plain_word, 0))
            for stop in range(min(start + longest, len(words)), max(start, end), -1):
                found = [key for key in (words[start:stop], plain_words[start:stop]) if key in self._names]
                if found:
                    keys[found[0]], end = None, stop
                    break
        name = None
        for key in keys:
            other = self._disambiguate(key, text)
            if other is None or name not in (None, other):
                return None
            name = other
        return name

    def resolve(self, name: str) -> str | None:
        """The entry that the whole text is a spelling of, None if there is none."""
        for form in (normalize_name, unaccented_name):
            key = tuple(form(name).split())
            if key in self._names:
                return self._disambiguate(key, name)
        return None

    def _disambiguate(self, key: tuple[str, ...], text: str) -> str | None:
        """The name with this form; if several share it, the one with the longest spelling that is in the text literally."""
        names = self._names[key]
        if len(names) == 1:
            return next(iter(names))
        text = text.casefold()
        literal = {(len(s), name) for name, spellings in names.items() for s in spellings if s.casefold() in text}
        longest = [name for length, name in literal if length == max(literal)[0]]
        return longest[0] if len(longest) == 1 else None

    def _add(self, names: Mapping[str, Iterable[str]], form: Callable[[str], str], shared: bool) -> None:
        """Add the spellings' forms that are not in the index yet; without `shared` only those of a single name."""
        new: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)
        for name, spellings in names.items():
            for spelling in spellings:
                key = tuple(form(spelling).split())
                if key and key not in self._names:
                    new[key].setdefault(name, []).append(spelling)
        self._names |= {key: entries for key, entries in new.items() if shared or len(entries) == 1}


class NameFinder:
    """Finds names and their variants as whole words of free text, longest first."""

    def __init__(self, names: Iterable[str], variants: Mapping[str, Iterable[str]] | None = None) -> None:
        forms = {
            normalize_name(variant): normalize_name(name) for name, others in (variants or {}).items() for variant in others
        }
        forms |= {normalize_name(name): normalize_name(name) for name in names}
        self._names = {tuple(form.split()): name for form, name in forms.items() if form}
        self._longest = _longest_by_first_word(self._names)

    def find(self, text: str) -> set[str]:
        """Normal forms of the names in the text; a name inside a longer one does not count."""
        clauses = (normalize_name(clause).split() for clause in _CLAUSE_END.split(text))
        return {
            name
            for words in clauses
            for _, _, name in _longest_matches(words, lambda word: self._longest.get(word, 0), self._names.get)
        }


def _longest_by_first_word(names: Iterable[tuple[str, ...]]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for words in names:
        longest[words[0]] = max(len(words), longest.get(words[0], 0))
    return longest


def _longest_matches(
    words: Sequence[Word], longest: Callable[[Word], int], lookup: Callable[[tuple[Word, ...]], str | None]
) -> Iterator[tuple[int, int, str]]:
    """(start, end, name) from left to right, the longest match at each word, without overlaps.

    `longest` gives the number of words of the longest name that begins with a word, 0 if none does.
    """
    start = 0
    while start < len(words):
        for length in range(min(longest(words[start]), len(words) - start), 0, -1):
            if (name := lookup(tuple(words[start : start + length]))) is not None:
                yield start, start + length, name
                start += length
                break
        else:
            start += 1


_CLAUSE_END = re.compile(r"[,;:!?\n]")  # no name goes over these; a full stop may be part of one (St. Andrew's)
# A full stop ends a sentence unless it follows one of the usual abbreviations in names.
_SENTENCE_END = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bDr\.)(?<!\b[NSEW]\.)(?<=[.!?。！？])\s+|\n+|(?<=[。！？])")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
_CHUNK = re.compile(rf"{_NUMERAL.pattern}|[{_UNSPACED}]|[^\s\-–—/{_UNSPACED}]+")
_POSSESSIVE = re.compile(r"['’]s?\W{0,9}$")


class NameMention(NamedTuple):
    """A name in a text: as its source writes it, and the range of characters that it covers."""

    name: str
    start: int
    end: int


class MentionFinder:
    """Finds where a text mentions known names, longest first, so that `Old Mill Street` is not also `Mill Street`."""

    def __init__(
        self, names: Iterable[str], more: "MentionFinder | None" = None, variants: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        """`more`: names of the whole city, shared between finders; `variants`: name -> its other names, which count as it."""
        names = list(names)
        forms = [(form(name), name) for form in (normalize_name, unaccented_name) for name in names]
        forms += [(normalize_name(other), name) for name, others in (variants or {}).items() for other in others]
        self._names: dict[tuple[str, ...], str] = {}
        for form, name in forms:
            if form:
                self._names.setdefault(tuple(form.split()), name)
        self._more = more
        self._longest = _longest_by_first_word(self._names)

    def find(self, text: str) -> list[NameMention]:
        """The mentions in the order of the text. A one-word name needs its capital: a church is not the street Church."""

        def lookup(words: tuple[_Word, ...]) -> str | None:
            key = tuple(word.form for word in words)
            name = self._get(key) or self._get((*key[:-1], words[-1].stem))
            needs_capital = len(words) == 1 and name and name[0].isupper()
            return None if needs_capital and text[words[0].start].islower() else name or None

        words = _split_words(text)
        matches = _longest_matches(words, self._longest_from, lookup)
        return [NameMention(name, words[start].start, words[end - 1].end) for start, end, name in matches]

    def mentions(self, text: str) -> list[str]:
        """Normal forms of the names in the order of the text."""
        return [normalize_name(mention.name) for mention in self.find(text)]

    def _longest_from(self, word: "_Word") -> int:
        more = self._more._longest_from(word) if self._more else 0
        return max(self._longest.get(word.form, 0), self._longest.get(word.stem, 0), more)

    def _get(self, key: tuple[str, ...]) -> str | None:
        return self._names.get(key) or (self._more._get(key) if self._more else None)


class _Word(NamedTuple):
    form: str
    stem: str  # without the possessive ending
    start: int
    end: int


@lru_cache(maxsize=256)
def _split_words(text: str) -> list[_Word]:
    words = []
    for chunk in _CHUNK.finditer(text):
        end = chunk.start() + len(chunk.group().rstrip(".,;:!?)”\"'’"))
        stems = normalize_name(_POSSESSIVE.sub("", chunk.group())).split()
        for i, word in enumerate(normalize_name(chunk.group()).split()):
            words.append(_Word(word, stems[i] if i < len(stems) else word, chunk.start(), end))
    return words


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in any script."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
