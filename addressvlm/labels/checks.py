"""What an alignment label must be before a model learns from it."""

import re
from collections.abc import Iterable

from addressvlm.labels.facts import Facts
from addressvlm.names import normal

WORDS = (15, 150)

# A full stop ends a sentence unless it follows one of the usual abbreviations in names.
_SENTENCE_END = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bDr\.)(?<!\b[NSEW]\.)(?<=[.!?。！？])\s+|\n+")
_TELLS = re.compile(
    r"\b(hint(s|ed)?|ground truth|the prompt|the notes"
    r"|(given|provided|supplied|stated) (address|answer|location|facts?|information|street|data)"
    r"|(address|answer|location|facts?|information) (was |is |were |are |you )*(given|provided|supplied|stated|told)"
    r"|(you|i was|i am|i've been) (told|gave|said|given)|as an ai|language model|i (can't|cannot)|i'm (sorry|unable))\b",
    re.IGNORECASE,
)
_DENIAL = re.compile(r"\b(is|was|can|could|does|did)(n't|n’t|not| not)\b", re.IGNORECASE)


class Names:
    """Finds known names in free text, longest first, so that `Old Mill Street` is not also `Mill Street`."""

    def __init__(self, names: Iterable[str], more: "Names | None" = None) -> None:
        self._forms = {tuple(normal(name).split()) for name in names} - {()}
        if more is not None:
            self._forms |= more._forms
        self._longest = max(map(len, self._forms), default=0)

    def mentions(self, text: str) -> list[str]:
        """Normal forms of the names in the order of the text."""
        words, found, at = normal(text).split(), [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                if tuple(words[at : at + length]) in self._forms:
                    found.append(" ".join(words[at : at + length]))
                    at += length
                    break
            else:
                at += 1
        return found


class Checker:
    """Checks the labels of one city."""

    def __init__(self, streets: Iterable[str] = ()) -> None:
        """`streets` are those of the city, which no label may conclude on by mistake."""
        self._streets = Names(streets)

    def problems(self, text: str, facts: Facts) -> list[str]:
        """What is wrong with a label, in words its writer can act on; empty if it is good."""
        found = []
        length = len(normal(text).split())
        if not WORDS[0] <= length <= WORDS[1]:
            found.append(f"it has {length} words instead of {WORDS[0]} to {WORDS[1]}")
        near = [name for name in (facts.cross_street, *facts.names) if name]
        streets = Names([facts.street, *near], more=self._streets)
        right = normal(facts.street)
        if right not in streets.mentions(text):
            found.append(f"it does not name the street {facts.street}")
        if not Names([facts.district]).mentions(text):
            found.append(f"it does not name the district {facts.district}")
        conclusions = [(s, m) for s in _SENTENCE_END.split(text) if (m := streets.mentions(s))]
        if conclusions:
            sentence, named = conclusions[-1]
            if named[0] != right:
                found.append(f"its last sentence about a street does not conclude on {facts.street}")
            elif _DENIAL.search(sentence):
                found.append(f"its conclusion denies {facts.street}")
        if tell := _TELLS.search(_without(text, [facts.street, facts.district, *near])):
            found.append(f"it speaks of having been told (“{tell.group(0)}”)")
        return found


def _without(text: str, names: list[str]) -> str:
    """The text without names, so that a Hint Street is no hint."""
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(re.escape(name), "", text, flags=re.IGNORECASE)
    return text
