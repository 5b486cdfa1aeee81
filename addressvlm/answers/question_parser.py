"""Find free-text questions about the address, so that its probabilities can answer them.

Callers of a service write these texts: each is read in time proportional to its length, and only up to MAX_LENGTH.
"""

import re
import string
from dataclasses import dataclass
from typing import Literal

from addressvlm.answers.address_distribution import AddressDistribution, Level
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name, unaccented_name
from addressvlm.questions import SUFFIXES, TEMPLATES

YES_NO = re.compile(r"(?:^|[.?!,]\s*)(?:is|was|are|were|could|did|does)\b|\byes or no\b", re.IGNORECASE)
OPTIONS = re.compile(r"(?:options|choose (?:one )?(?:from|of)|select [^\[]{0,60}from)\s*:?\s*", re.IGNORECASE)
MAX_LENGTH = 4000  # characters of a question
MAX_OPTIONS = 100
MAX_INTRODUCTION = 200  # characters before a list in brackets that may introduce it
ANSWER_HINT = re.compile(r"\b(?:(?:please )?(?:ans|answer|reply|say) )?(?:(?:only|just) )?(?:with )?(?:a )?yes or no\b")
PHOTO_WORDS = set(unaccented_name("this that it here photo photograph picture image view scene place we i").split())
LOCATION_WORDS = PHOTO_WORDS | set(
    unaccented_name(
        "is was are were could be did does show shown see seen stand lie lies taken made shot located a an of on in at"
        " the street road address district neighbourhood neighborhood called"
    ).split()
)
TEMPLATE_LEVELS: dict[str, Level] = {}
for _level in ("district", "street", "address"):
    for _template in TEMPLATES[_level]:
        for _question in (_template, f"{_template} {SUFFIXES['generation']}"):
            TEMPLATE_LEVELS[normalize_name(_question)] = _level
LONGEST_FIRST = sorted({unaccented_name(template) for template in TEMPLATE_LEVELS}, key=len, reverse=True)


@dataclass(frozen=True)
class ParsedQuestion:
    """A question about the address; `names` are the judged name, or the options of a choice."""

    kind: Literal["generation", "judgment", "choice"]
    level: Level
    names: tuple[str, ...] = ()

    def answer(self, distribution: AddressDistribution) -> tuple[str, float]:
        """The answer and its probability."""
        if self.kind == "judgment":
            p = distribution.probability(self.names[0], self.level)
            return ("Yes", p) if distribution.judge(self.names[0], self.level) else ("No", 1 - p)
        choice = self.kind == "choice"
        name = distribution.choose(self.names, self.level) if choice else distribution.name(self.level)
        return name, distribution.probability(name, self.level)


def parse_question(question: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """The question, None if it is not about the address or names nothing in the gazetteer."""
    if len(question) > MAX_LENGTH or len(normalize_name(question)) > MAX_LENGTH:  # one character may stand for 18
        return None
    level = TEMPLATE_LEVELS.get(normalize_name(question))
    if level:
        return ParsedQuestion("generation", level)
    if listed := _option_list(question):
        return _parse_choice(listed, gazetteer)
    return _parse_judgment(question, gazetteer) if YES_NO.search(question) else None


def _option_list(question: str) -> str:
    """What follows `options:`, `choose from` … up to the end, with or without square brackets around it; or nothing."""
    text = question.rstrip(string.whitespace + ".").removesuffix("]")
    start = max(text.rfind("["), text.rfind("]")) + 1  # a list holds no brackets
    head = text[: start - 1][-MAX_INTRODUCTION:] if text[start - 1 : start] == "[" else ""
    if any(match.end() == len(head) for match in OPTIONS.finditer(head)):
        return text[start:].strip()
    introduction = OPTIONS.search(text, start)
    return text[introduction.end() :].strip() if introduction else ""


def _parse_choice(listed: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """A choice, if an option is a street, a district, or both; options with commas in them stand between semicolons."""
    for separator in (";", ","):
        options = [name.strip() for name in listed.split(separator) if name.strip()]
        if len(options) > 1:
            level = _level_of(options, gazetteer) if len(options) <= MAX_OPTIONS else None
            return ParsedQuestion("choice", level, tuple(options)) if level else None
    return None


def _level_of(options: list[str], gazetteer: Gazetteer) -> Level | None:
    """The level of the first kind of names that is among the options."""
    names = gazetteer.normal_names
    for level in names:
        if not names[level].isdisjoint(map(normalize_name, options)):
            return level
    pairs = [option.rpartition(",") for option in options]
    addresses = any(normalize_name(a) in names["street"] and normalize_name(b) in names["district"] for a, _, b in pairs)
    return "address" if addresses else None


def _parse_judgment(question: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """A judgment of the one street, district, or both, that the question names, if it says nothing else."""
    words = normalize_name(question).split()
    street = gazetteer.find_street(question)
    if street:
        words = _remove_name(words, street, gazetteer)
    district = gazetteer.find_district(" ".join(words) if street else question)
    if district:
        words = _remove_name(words, district, gazetteer)
    rest = ANSWER_HINT.sub(" ", unaccented_name(" ".join(words))).strip() + " "
    template = next((template for template in LONGEST_FIRST if rest.startswith(f"{template} ")), "")
    other_words = set(rest.removeprefix(template).split())
    if not other_words <= LOCATION_WORDS or other_words.isdisjoint(PHOTO_WORDS):
        return None
    if street and district:
        return ParsedQuestion("judgment", "address", (Address(street, district).text(),))
    if street:
        return ParsedQuestion("judgment", "street", (street,))
    return ParsedQuestion("judgment", "district", (district,)) if district else None


def _remove_name(words: list[str], name: str, gazetteer: Gazetteer) -> list[str]:
    """Normalized words without a name, in any of its spellings."""
    forms = {tuple(unaccented_name(spelling).split()) for spelling in (name, *gazetteer.variants.get(name, ()))}
    spellings = sorted(forms - {()}, key=len, reverse=True)
    firsts = {form[0] for form in spellings}
    bare = tuple(unaccented_name(" ".join(words)).split())
    kept, start = [], 0
    while start < len(words):
        possible = spellings if bare[start] in firsts else []
        length = next((len(form) for form in possible if bare[start : start + len(form)] == form), 0)
        kept += [] if length else [words[start]]
        start += length or 1
    return kept
