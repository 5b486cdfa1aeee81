"""Questions in words that are really about the address, so that its probabilities can answer them."""

import re
from dataclasses import dataclass
from typing import Literal

from addressvlm.answers.address_distribution import AddressDistribution, Level
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.name_matcher import normalize_name, unaccented_name
from addressvlm.questions import SUFFIXES, TEMPLATES

_YES_NO = re.compile(r"(?:^|[.?!,]\s*)(?:is|was|are|were|could|did|does)\b|\byes or no\b", re.IGNORECASE)
_OPTIONS = re.compile(
    r"(?:options|choose (?:one )?(?:from|of)|select [^\[]*from)\s*:?\s*\[?(?P<names>[^\[\]]+?)\]?[.\s]*$", re.I
)
_OR = re.compile(r"\b(?:(?:please )?(?:ans|answer|reply|say) )?(?:(?:only|just) )?(?:with )?(?:a )?yes or no\b")
_PHOTO = set(unaccented_name("this that it here photo photograph picture image view scene place we i").split())
_LOCATING = _PHOTO | set(
    unaccented_name(
        "is was are were could be did does show shown see seen stand lie lies taken made shot located a an of on in at"
        " the street road address district neighbourhood neighborhood called"
    ).split()
)
_OPENINGS: dict[str, Level] = {}
for _level in ("district", "street", "address"):
    for _opening in TEMPLATES[_level]:
        _OPENINGS[normalize_name(_opening)] = _OPENINGS[normalize_name(f"{_opening} {SUFFIXES['generation']}")] = _level
_LONGEST_FIRST = sorted({unaccented_name(opening) for opening in _OPENINGS}, key=len, reverse=True)


@dataclass(frozen=True)
class ParsedQuestion:
    """What a question asks for; `names` are the one asked about, or the options."""

    kind: Literal["generation", "judgment", "choice"]
    level: Level
    names: tuple[str, ...] = ()

    def answer(self, beliefs: AddressDistribution) -> tuple[str, float]:
        """The answer and its probability."""
        if self.kind == "generation":
            name = beliefs.name(self.level)
            return name, beliefs.probability(name, self.level)
        if self.kind == "choice":
            name = beliefs.choose(self.names, self.level)
            return name, beliefs.probability(name, self.level)
        yes, p = beliefs.judge(self.names[0], self.level), beliefs.probability(self.names[0], self.level)
        return ("Yes", p) if yes else ("No", 1 - p)


def parse_question(question: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """What is asked, None if it is no question about the address or names nothing that the gazetteer knows."""
    level = _OPENINGS.get(normalize_name(question))
    if level:
        return ParsedQuestion("generation", level)
    options = _OPTIONS.search(question)
    if options:
        return _choice(options["names"], gazetteer)
    return _judgment(question, gazetteer) if _YES_NO.search(question) else None


def _choice(names: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """A choice, if one level knows an option."""
    for separator in (";", ","):
        options = [name.strip() for name in names.split(separator) if name.strip()]
        levels: tuple[tuple[Level, list[str]], ...] = (("street", gazetteer.streets), ("district", gazetteer.districts))
        for level, known in levels:
            forms = {normalize_name(name) for name in known}
            if len(options) > 1 and any(normalize_name(option) in forms for option in options):
                return ParsedQuestion("choice", level, tuple(options))
    return None


def _judgment(question: str, gazetteer: Gazetteer) -> ParsedQuestion | None:
    """A judgment of the one street, district, or both, that the question names, if it says no more than that."""
    words = normalize_name(question).split()
    street = gazetteer.find_street(question)
    if street:
        words = _remove_names(words, street, gazetteer)
    district = gazetteer.find_district(" ".join(words) if street else question)
    if district:
        words = _remove_names(words, district, gazetteer)
    if not _asks_only_location(unaccented_name(" ".join(words))):
        return None
    if street and district:
        return ParsedQuestion("judgment", "address", (Address(street, district).text(),))
    if street:
        return ParsedQuestion("judgment", "street", (street,))
    return ParsedQuestion("judgment", "district", (district,)) if district else None


def _remove_names(words: list[str], name: str, gazetteer: Gazetteer) -> list[str]:
    """The words of a normal text without a name, under any of its spellings."""
    spellings = {tuple(unaccented_name(spelling).split()) for spelling in (name, *gazetteer.variants.get(name, ()))}
    plain = unaccented_name(" ".join(words)).split()
    for spelling in sorted(spellings - {()}, key=len, reverse=True):
        for start in range(len(plain) - len(spelling) + 1):
            stop = start + len(spelling)
            if tuple(plain[start:stop]) == spelling:
                return _remove_names(words[:start] + words[stop:], name, gazetteer)
    return words


def _asks_only_location(rest: str) -> bool:
    """Whether a question without its names asks where the photo is: as the templates do, or in words of place alone."""
    rest = _OR.sub(" ", rest).strip()
    opening = next((opening for opening in _LONGEST_FIRST if f"{rest} ".startswith(f"{opening} ")), "")
    words = set(rest.removeprefix(opening).split())
    return words <= _LOCATING and not words.isdisjoint(_PHOTO)
