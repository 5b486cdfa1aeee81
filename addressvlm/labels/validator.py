"""What a label must fulfil before a model learns from it: form, language, the right address, true claims."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.name_matcher import MentionFinder, NameMention, normalize_name, split_sentences
from addressvlm.labels.fact_checker import FactChecker, Problem
from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import mentions_visible_things
from addressvlm.labels.prompt import Prompt

REPEATED_WORDS = 6  # so many consecutive words may occur only once

_ABOUT_PROMPT = re.compile(
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
_CONCLUSION = re.compile(
    r"\b(so|therefore|thus|hence|must|belongs? to|identif(y|ies)|leads? to|points? to|conclusion|address|makes it)\b|: ",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)]*\s*$")
_MARKUP = re.compile(r"^\s*([-*•#]|\d+[.)])\s|\*\*|```", re.MULTILINE)
_MAP = re.compile(r"\b(on|the|a|this) (map|tile|satellite)|from above|\baerial\b", re.IGNORECASE)
_ENGLISH = frozenset("the and this with from that which are".split())


class LabelValidator:
    """Validates the labels of one city.

    Args:
        streets, districts: of the city; a label must not conclude on another one.
        variants: their other names, which count as the names.
        verified: every claim must be among the facts (English only).
        mapless: the label is of a street view alone, and must not mention a map.
        config: length, language and tolerance of distances; wording is validated in English only.
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
        self._streets, self._districts = self._finder(streets), self._finder(districts)
        self._verified, self._mapless, self.config = verified, mapless, config or LabelsConfig()

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """What is wrong with a label, in words its writer can act on; empty if it is valid."""
        near = [name for name in (facts.main_street, facts.cross_street, *facts.names) if name]
        streets = self._finder([facts.street], near, self._streets)
        districts = self._finder([facts.district], more=self._districts)
        problems = [*self._form(text), *_address(text, facts, streets, districts)]
        if self.config.language == "en":
            names = MentionFinder([facts.street, facts.district, facts.city, *near], more=self._streets)
            problems += self._wording(_remove_names(text, names), text, facts)
            if self._verified:
                problems += FactChecker(text, facts, streets, districts, self.config.distance_tolerance).problems()
        return problems

    def _finder(self, names: Iterable[str], near: Iterable[str] = (), more: MentionFinder | None = None) -> MentionFinder:
        names = list(names)
        variants = {name: self._variants[name] for name in names if name in self._variants}
        return MentionFinder([*names, *near], more=more, variants=variants)

    def _form(self, text: str) -> list[Problem]:
        """Length, repetition, markup, language."""
        problems: list[Problem] = []
        least, most = self.config.words
        count = len(normalize_name(text).split())
        if not least <= count <= most:
            problems.append(Problem("length", f"it has {count} words instead of {least} to {most}"))
        words = re.findall(r"\w+", text.lower())
        runs = Counter(zip(*(words[i:] for i in range(REPEATED_WORDS)), strict=False))
        if runs and max(runs.values()) > 1:
            problems.append(Problem("repetition", "it says the same thing in the same words more than once"))
        if not _SENTENCE_END.search(text):
            problems.append(Problem("form", "it breaks off in the middle of a sentence"))
        if _MARKUP.search(text):
            problems.append(Problem("form", "it has lists, headings or marks of bold type instead of plain sentences"))
        language, expected = _detect_language(_remove_names(text, self._streets)), self.config.language
        if language != expected:
            problems.append(Problem("language", f"it is in the language '{language}' instead of '{expected}'"))
        return problems

    def _wording(self, plain: str, text: str, facts: Facts) -> list[Problem]:
        """Wording beside the address; `plain` is the text without names, so that a Hint Street is no hint."""
        problems: list[Problem] = []
        if match := _ABOUT_PROMPT.search(plain):
            problems.append(Problem("told", f"it speaks of having been told (“{match.group(0)}”)"))
        if self._mapless and (match := _MAP.search(plain)):
            problems.append(Problem("map", f"it speaks of a map (“{match.group(0)}”), and there is only the photo"))
        evidence = " ".join(split_sentences(text)[:-1])
        if not mentions_visible_things(plain) and not MentionFinder(facts.names).find(evidence):
            problems.append(Problem("visible", "it cites nothing that can be seen"))
        return problems


def make_validator(config: LabelsConfig, prompt: Prompt, gazetteer: Gazetteer | None = None) -> LabelValidator:
    """The validator of a prompt's labels in one city; without a gazetteer it knows fewer names."""
    return LabelValidator(
        streets=gazetteer.streets if gazetteer else (),
        districts=gazetteer.districts if gazetteer else (),
        variants=gazetteer.variants if gazetteer else None,
        verified=prompt.verified or not config.send_image,
        mapless=prompt.shows == "photo",
        config=config,
    )


def _address(text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder) -> list[Problem]:
    """Whether the text names the right street and district, and concludes on them."""
    problems: list[Problem] = []
    street, district = normalize_name(facts.street), normalize_name(facts.district)
    if street not in streets.mentions(text):
        problems.append(Problem("street", f"it does not name the street {facts.street}"))
    if district not in districts.mentions(text):
        problems.append(Problem("district", f"it does not name the district {facts.district}"))
    sentences = split_sentences(text)[::-1]
    last = next(((sentence, mentions) for sentence in sentences if (mentions := streets.find(sentence))), None)
    if last and _concluded_street(*last) != street:
        problems.append(Problem("conclusion", f"its last sentence about a street does not conclude on {facts.street}"))
    elif last and _DENIAL.search(last[0]):
        problems.append(Problem("conclusion", f"its conclusion denies {facts.street}"))
    first = next(filter(None, (_first_district(sentence, streets, districts) for sentence in sentences)), None)
    if first and first != district:
        problems.append(Problem("conclusion", f"its last sentence about a district does not conclude on {facts.district}"))
    return problems


def _concluded_street(sentence: str, mentions: list[NameMention]) -> str:
    """Normal form of the street that a sentence concludes on: the first after its last word of conclusion, else the first."""
    for word in reversed(list(_CONCLUSION.finditer(sentence))):
        if after := [mention for mention in mentions if mention.start >= word.start()]:
            return normalize_name(after[0].name)
    return normalize_name(mentions[0].name)


def _first_district(sentence: str, streets: MentionFinder, districts: MentionFinder) -> str | None:
    """Normal form of the first district in a sentence that is not part of a street's name."""
    spans = [(mention.start, mention.end) for mention in streets.find(sentence)]
    for mention in districts.find(sentence):
        if not any(start <= mention.start and mention.end <= end for start, end in spans):
            return normalize_name(mention.name)
    return None


def _remove_names(text: str, names: MentionFinder) -> str:
    for mention in reversed(names.find(text)):
        text = text[: mention.start] + text[mention.end :]
    return text


def _detect_language(text: str) -> str:
    """The most likely language, ISO 639-1. English is detected by its frequent words alone, which is much faster."""
    words = text.lower().split()
    if sum(word in _ENGLISH for word in words) * 8 >= len(words) > 0:
        return "en"
    import py3langid  # loads its model, which takes half a second

    return str(py3langid.classify(text)[0])
