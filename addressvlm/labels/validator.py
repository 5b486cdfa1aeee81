"""What a label must be before a model learns from it."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.name_matcher import MentionFinder, NameMention, normalize_name, split_sentences
from addressvlm.labels.fact_checker import FactChecker
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import Prompt
from addressvlm.labels.templates import cites_something

REPEATED_WORDS = 6  # so many words in a row are said only once

_TELLS = re.compile(
    r"\b(hint(s|ed)?|ground truth|the prompt|the (notes|facts)|(these|those|listed|measured) (notes|facts)"
    r"|(given|provided|supplied|stated|known|correct|expected) (address|answer|location|facts?|information|street|data|details)"
    r"|(address|answer|location|facts?|information|details) (was |is |were |are |you )*"
    r"(given|provided|supplied|stated|told|specified|known)"
    r"|(you|i was|i am|i've been|we are|we were|as) (told|gave|said|given|specified|instructed|requested)"
    r"|(rephras|reword|rewrit|paraphras)\w*|(is|are|was|were) not (mentioned|specified|stated)"
    r"|as an ai|language model|i (can't|cannot)|i'm (sorry|unable))\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(is|was|can|could|does|did)(n't|n’t|not| not)\b", re.IGNORECASE)
_CONCLUDING = re.compile(
    r"\b(so|therefore|thus|hence|must|belongs? to|identif(y|ies)|leads? to|points? to|conclusion|address|makes it)\b|: ",
    re.IGNORECASE,
)
_ENDED = re.compile(r"[.!?。！？…][\"'”’)]*\s*$")
_FORM = re.compile(r"^\s*([-*•#]|\d+[.)])\s|\*\*|```", re.MULTILINE)
_MAP = re.compile(r"\b(on|the|a|this) (map|tile|satellite)|from above|\baerial\b", re.IGNORECASE)


class Problem(NamedTuple):
    """What is wrong with a label: a kind to count, and a text that its writer can act on."""

    kind: str
    text: str


_ENGLISH = frozenset("the and this with from that which are".split())


class LabelValidator:
    """Checks the labels of one city.

    Args:
        streets, districts: those of the city, of which no label may name another one as its own.
        variants: their other names, which count as the names.
        verified: every claim must be among the facts (English only).
        mapless: the label is of a street view alone, and speaks of no map.
        config: length, language and tolerance of distances; the wording itself is looked at in English only.
    """

    def __init__(
        self,
        streets: Iterable[str] = (),
        districts: Iterable[str] = (),
        variants: Mapping[str, Iterable[str]] | None = None,
        verified: bool = False,
        mapless: bool = False,
        config: LabelsConfig | None = None,
    ) -> None:
        self._variants = variants or {}
        self._streets = MentionFinder(streets, variants=self._of(streets))
        self._districts = MentionFinder(districts, variants=self._of(districts))
        self._verified, self._mapless, config = verified, mapless, config or LabelsConfig()
        self._words, self._language, self._tolerance = config.words, config.language, config.distance_tolerance

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """What is wrong with a label, in words its writer can act on; empty if it is good."""
        near = [name for name in (facts.main_street, facts.cross_street, *facts.names) if name]
        streets = MentionFinder([facts.street, *near], more=self._streets, variants=self._of([facts.street]))
        districts = MentionFinder([facts.district], more=self._districts, variants=self._of([facts.district]))
        found = [*self._form(text), *_address(text, facts, streets, districts)]
        if self._language == "en":
            plain = _without(text, MentionFinder([facts.street, facts.district, facts.city, *near], more=self._streets))
            found += self._wording(plain, text, facts)
            if self._verified:
                claims = FactChecker(text, facts, streets, districts, self._tolerance).problems()
                found += [Problem(kind, said) for kind, said in claims]
        return found

    def _form(self, text: str) -> list[Problem]:
        """How long it is, how it is set, in which language."""
        found: list[Problem] = []
        least, most = self._words
        words = normalize_name(text).split()
        if not least <= len(words) <= most:
            found.append(Problem("length", f"it has {len(words)} words instead of {least} to {most}"))
        spoken = re.findall(r"\w+", text.lower())
        runs = Counter(zip(*(spoken[i:] for i in range(REPEATED_WORDS)), strict=False))
        if runs and max(runs.values()) > 1:
            found.append(Problem("repetition", "it says the same thing in the same words more than once"))
        if not _ENDED.search(text):
            found.append(Problem("form", "it breaks off in the middle of a sentence"))
        if _FORM.search(text):
            found.append(Problem("form", "it has lists, headings or marks of bold type instead of plain sentences"))
        if (language := _language(_without(text, self._streets))) != self._language:
            found.append(Problem("language", f"it is in the language '{language}' instead of '{self._language}'"))
        return found

    def _wording(self, plain: str, text: str, facts: Facts) -> list[Problem]:
        """What is said beside the address; `plain` is the text without names, so that a Hint Street is no hint."""
        found: list[Problem] = []
        if tell := _TELLS.search(plain):
            found.append(Problem("told", f"it speaks of having been told (“{tell.group(0)}”)"))
        if self._mapless and (tell := _MAP.search(plain)):
            found.append(Problem("map", f"it speaks of a map (“{tell.group(0)}”), and there is only the photo"))
        if not cites_something(plain) and not MentionFinder(facts.names).find(" ".join(split_sentences(text)[:-1])):
            found.append(Problem("visible", "it cites nothing that can be seen"))
        return found

    def _of(self, names: Iterable[str]) -> dict[str, Iterable[str]]:
        return {name: self._variants[name] for name in names if name in self._variants}


def make_validator(config: LabelsConfig, prompt: Prompt, gazetteer: Gazetteer | None = None) -> LabelValidator:
    """The checks of a prompt's labels in one city; without a gazetteer they know fewer names."""
    return LabelValidator(
        streets=gazetteer.streets if gazetteer else (),
        districts=gazetteer.districts if gazetteer else (),
        variants=gazetteer.variants if gazetteer else None,
        verified=prompt.verified or not config.send_image,
        mapless=prompt.shows == "photo",
        config=config,
    )


def _address(text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder) -> list[Problem]:
    """Whether the right street and district are named, and concluded on."""
    found: list[Problem] = []
    street, district = normalize_name(facts.street), normalize_name(facts.district)
    if street not in streets.mentions(text):
        found.append(Problem("street", f"it does not name the street {facts.street}"))
    if district not in districts.mentions(text):
        found.append(Problem("district", f"it does not name the district {facts.district}"))
    spoken = split_sentences(text)
    last = next(((s, m) for s in reversed(spoken) if (m := streets.find(s))), None)
    if last and _concluded(*last) != street:
        found.append(Problem("conclusion", f"its last sentence about a street does not conclude on {facts.street}"))
    elif last and _DENIAL.search(last[0]):
        found.append(Problem("conclusion", f"its conclusion denies {facts.street}"))
    areas = next((d for s in reversed(spoken) if (d := _districts_of(s, streets, districts))), None)
    if areas and areas[0] != district:
        found.append(Problem("conclusion", f"its last sentence about a district does not conclude on {facts.district}"))
    return found


def _concluded(sentence: str, named: list[NameMention]) -> str:
    """Normal form of the street that a sentence concludes on: the first after its last word of concluding, else the first."""
    for word in reversed(list(_CONCLUDING.finditer(sentence))):
        if after := [mention for mention in named if mention.start >= word.start()]:
            return normalize_name(after[0].name)
    return normalize_name(named[0].name)


def _districts_of(sentence: str, streets: MentionFinder, districts: MentionFinder) -> list[str]:
    """Normal forms of the districts in a sentence, less those that are part of a street's name."""
    taken = streets.find(sentence)
    free = [m for m in districts.find(sentence) if not any(t.start <= m.start and m.end <= t.end for t in taken)]
    return [normalize_name(mention.name) for mention in free]


def _without(text: str, names: MentionFinder) -> str:
    """The text without names."""
    for mention in reversed(names.find(text)):
        text = text[: mention.start] + text[mention.end :]
    return text


def _language(text: str) -> str:
    """The most likely language, ISO 639-1; where every eighth word is one that only English has, without asking further."""
    words = text.lower().split()
    if sum(word in _ENGLISH for word in words) * 8 >= len(words) > 0:
        return "en"
    import py3langid  # reads its model, half a second

    return str(py3langid.classify(text)[0])
