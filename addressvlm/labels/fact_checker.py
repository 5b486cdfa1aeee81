"""Whether the claims of an English label are among the facts: directions, distances, crossing street, names, colours, sky.

Names become marks (`§own`, `§cross`, …). Then every compass word, distance, name or colour is checked against the fact that it
is about: that of the last topic word before it in its sentence, or the first one after it.
"""

import re
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import NamedTuple

from addressvlm.gazetteer.name_matcher import MentionFinder, normalize_name, split_sentences
from addressvlm.labels.facts import Facts
from addressvlm.labels.lexicon import (
    COLOUR_OF,
    COMPASS,
    DIRECTION_OF,
    GROUND,
    LOOKING,
    MEETING,
    MEETING_VERBS,
    METRES,
    NEXT_CLAUSE,
    NO_NAMES,
    NO_OBJECT,
    NOT_STREETS,
    PICTURE,
    READING,
    SKY_OF,
    STREET_WORDS,
    TOPIC_OF,
    TURNING,
    VIEW_OF,
    parse_distances,
)

NEAR_M = 20  # a crossing "right here" is not further away
MIN_TOLERANCE_M = 10.0  # distances are measured in tens of metres
REACH = 8  # words between a verb and the names that it joins
OTHER_STREETS = {"§other", "§foreign", "§unknown"}

_POINT = "|".join(sorted(COMPASS, key=len, reverse=True))
_SPLIT_POINT = re.compile(r"\b(north|south)[- ](east|west)(?=ern|erly|ward|bound|\b)")
_AXIS = re.compile(rf"\b({_POINT})(?:ern|wards?)?(?:\s*[-–/]\s*|\s+to\s+(?:the\s+)?|\s+and\s+)({_POINT})\b")
_ENDING = re.compile(rf"\b({_POINT})(?:ern|erly|wards?|bound)\b")
_TOKEN = re.compile(r"§\w+|axis:[\w-]+|\d+(?:[.,]\d+)*|\w+(?:['’]\w+)?|[;:—]")
_HERE = re.compile(
    r"\b(right here|right at|right by|at the camera|(at|on|marks) the (very )?(corner|junction|crossing|intersection))\b"
)
_UNKNOWN_STREET = re.compile(
    rf"\b(?!(?:The|This|That|A|On|In|At|From|To|One|Which)\b)[A-Z][\w'’.-]*(?:\s+[A-Z][\w'’.-]*){{0,2}}\s+{STREET_WORDS}(?!\w)"
)
_PROPER_NOUN = re.compile(r"(?<=[\w,;)] )[A-Z][\w'’-]+")  # a capital inside a sentence
_SKY = re.compile(r"\b(wide|open|broad|narrow|little|hidden|no|strip of) sky\b|\bsky is (wide|open|broad|narrow|hidden)\b")


class Problem(NamedTuple):
    """What is wrong with a label: a kind to count, and a text that its writer can act on."""

    kind: str
    text: str


class FactChecker:
    """Checks the claims of one label; `streets` and `districts` find the names of the city and of the facts."""

    def __init__(self, text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder, tolerance: float) -> None:
        self.facts, self.tolerance = facts, tolerance
        self._readable = {normalize_name(name) for name in facts.names}
        self._sentences = [self._mark_names(sentence, streets, districts) for sentence in split_sentences(text)]

    def problems(self) -> list[Problem]:
        """The claims that are not among the facts."""
        problems: list[Problem] = []
        for sentence in self._sentences:
            tokens = _TOKEN.findall(sentence)
            for check in (self._directions, self._views, self._crossings, self._names, self._colours):
                problems += check(tokens)
            problems += self._distances(sentence)
            problems += self._sky(sentence)
        return list(dict.fromkeys(problems))

    def _mark_names(self, sentence: str, streets: MentionFinder, districts: MentionFinder) -> str:
        """The sentence in lower case, with marks for names and plain compass words."""
        facts, spans = self.facts, [(m.start, m.end, self._street_mark(m.name)) for m in streets.find(sentence)]
        areas = [
            (m, "§district" if normalize_name(m.name) == normalize_name(facts.district) else "§elsewhere")
            for m in districts.find(sentence)
        ]
        cities = [(m, "§city") for m in MentionFinder([facts.city]).find(sentence)] if facts.city else []
        for mention, mark in areas + cities:
            if not any(start < mention.end and mention.start < end for start, end, _ in spans):
                spans.append((mention.start, mention.end, mark))
        for start, end, mark in sorted(spans, reverse=True):
            sentence = f"{sentence[:start]} {mark} {sentence[end:]}"
        sentence = _UNKNOWN_STREET.sub(" §unknown ", sentence)
        sentence = _PROPER_NOUN.sub(lambda m: m.group() if m.group().lower() in NO_NAMES else " §unknown ", sentence).lower()
        return _ENDING.sub(r"\1", _AXIS.sub(_mark_axis, _SPLIT_POINT.sub(r"\1\2", sentence)))

    def _street_mark(self, name: str) -> str:
        form, facts = normalize_name(name), self.facts
        if form in (normalize_name(facts.street), normalize_name(facts.on_map)):
            return "§own"
        if facts.cross_street and form == normalize_name(facts.cross_street):
            return "§cross"
        return "§other" if form in self._readable else "§foreign"

    def _directions(self, tokens: list[str]) -> Iterator[Problem]:
        facts = self.facts
        ends = set(facts.direction.split("-")) if facts.direction else set()
        cross = {facts.cross_direction} if facts.cross_street else set()
        claims = {
            "facing": ("the camera faces", {facts.facing}),
            "cross": ("a street is met to the", cross),
            "axis": ("the street runs to the", ends | cross),
        }
        for i, token in enumerate(tokens):
            if token.startswith("axis:") and token.removeprefix("axis:") != facts.direction:
                yield Problem(
                    "direction", f"it says that the street runs {token.removeprefix('axis:')}, and that is not measured"
                )
            if token in COMPASS:
                claim, allowed = claims.get(_topic(tokens, i), ("something is", {facts.facing, *ends, *cross}))
                if token not in allowed:
                    yield Problem("direction", f"it says that {claim} {token}, and that is not measured")

    def _views(self, tokens: list[str]) -> Iterator[Problem]:
        """How the camera looks at the street."""
        for i, token in enumerate(tokens):
            view = VIEW_OF.get(token)
            if view in ("along", "across"):
                target = next((t for t in tokens[i + 1 : i + 4] if t not in ("the", "this", "its", "to")), "")
                modified = any(VIEW_OF.get(t) == "oblique" for t in tokens[max(0, i - 2) : i])  # half along
                if modified or target not in ("street", "road", "roadway", "it", "§own"):
                    continue
            if view and view != self.facts.view and LOOKING & set(tokens[max(0, i - REACH) : i]):
                yield Problem("direction", f"it says that the camera looks {view} to the street, and that is not measured")

    def _distances(self, sentence: str) -> Iterator[Problem]:
        facts, distances = self.facts, parse_distances(sentence)
        measured = facts.cross_distance_m if facts.cross_street else None
        for words, metres in distances:
            if measured is None:
                yield Problem("distance", f"it says {words}, and that is not measured")
            elif abs(metres - measured) > max(MIN_TOLERANCE_M, self.tolerance * measured):
                yield Problem("distance", f"it says {words}, and {facts.cross_street} is {measured} m away")
        far = (facts.cross_distance_m or 0) > NEAR_M
        if far and not distances and "§cross" in sentence and _HERE.search(sentence):
            yield Problem(
                "distance", f"it says that {facts.cross_street} is right here, and it is {facts.cross_distance_m} m away"
            )

    def _crossings(self, tokens: list[str]) -> Iterator[Problem]:
        """A verb of meeting joins the nearest names to its left and right; the street that is met is the crossing street."""
        wrong = Problem(
            "crossing", f"it says that a street is met that is not {self.facts.cross_street or 'measured to meet it'}"
        )
        for i, token in enumerate(tokens):
            if token not in MEETING:
                continue
            before, after = tokens[max(0, i - REACH) : i], tokens[i + 1 :]
            left = next((t for t in reversed(before) if t.startswith("§")), None)
            right = next((t for t in after[:REACH] if t.startswith("§")), None)
            word = after[0] if after else ""
            no_object = right is None and (word in NO_OBJECT or word[:1].isdecimal())
            if {left, right} & OTHER_STREETS:
                yield wrong
            elif token in ("meets", "joins") and next((t for t in after if t not in ("the", "a", "its")), "") in NOT_STREETS:
                yield Problem("crossing", "it says that a street meets what is no street")
            elif token in MEETING_VERBS and (
                (right == "§own" and left != "§cross" and "§cross" not in after)
                or (left == "§own" and no_object and "§cross" not in tokens)
            ):
                yield Problem("crossing", f"it says that {self.facts.on_map} is met by no other street than itself")
        reached = any(token.rstrip("s") in METRES for token in tokens) or any(pair in TURNING for pair in pairwise(tokens))
        if reached and OTHER_STREETS & set(tokens) and "§cross" not in tokens and not READING & set(tokens):
            yield wrong

    def _names(self, tokens: list[str]) -> Iterator[Problem]:
        """Names that the text reads on the map are there, and no other street of the city is mentioned at all."""
        facts = self.facts
        for i, token in enumerate(tokens):
            if token in ("§foreign", "§unknown", "§elsewhere"):
                yield Problem("name", "it names a street or district that is not among the facts")
            if token not in READING:
                continue
            after = list(takewhile(lambda t: t not in MEETING | NEXT_CLAUSE, tokens[i + 1 :]))
            if after.count("§own") > 1 or after.count("§cross") > 1:
                yield Problem("name", "it lists a name twice")
            for mark in after if any(t.startswith("§") for t in after) else tokens[:i]:
                name = {"§own": facts.on_map, "§cross": facts.cross_street}.get(mark)
                if name and normalize_name(name) not in self._readable:
                    yield Problem("name", f"it says that {name} can be read on the map, and it is not written there")

    def _colours(self, tokens: list[str]) -> Iterator[Problem]:
        for i, token in enumerate(tokens):
            colour = COLOUR_OF.get(token)
            if colour is None:
                continue
            from_above = _of_ground(tokens, i)
            if colour not in (self.facts.tile_colours if from_above else self.facts.photo_colours):
                where = "from above" if from_above else "in the photo"
                yield Problem("colour", f"it says {token} {where}, and that is not among the colours measured there")

    def _sky(self, sentence: str) -> Iterator[Problem]:
        for match in _SKY.finditer(sentence):
            if SKY_OF[match.group(1) or match.group(2)] != self.facts.sky:
                yield Problem("sky", f"it says “{match.group(0)}”, and that is not measured")


def _mark_axis(match: re.Match[str]) -> str:
    """Two opposite compass words as one mark; others stay two words."""
    first, second = match.groups()
    if (COMPASS.index(first) - COMPASS.index(second)) % 8 != 4:
        return match.group(0).replace("-", " ")
    return f"axis:{DIRECTION_OF[first]}"


def _topic(tokens: list[str], i: int) -> str:
    """What the direction at `i` is about: the topic of the last topic word before it, else of the first after it."""
    start = max((k + 1 for k in range(i) if tokens[k] in (";", ":", "—")), default=0)
    before = [TOPIC_OF[t] for t in tokens[start:i] if t in TOPIC_OF]
    after = [TOPIC_OF[t] for t in tokens[i + 1 :] if t in TOPIC_OF]
    return before[-1] if before else after[0] if after else ""


def _of_ground(tokens: list[str], i: int) -> bool:
    """Whether the colour at `i` is of the ground: by the noun after it, else the last topic word before, else after."""
    noun = i + 1
    while noun < len(tokens) and (tokens[noun] in COLOUR_OF or tokens[noun] == "and"):  # red and grey walls
        noun += 1
    order = [*tokens[noun : noun + 2], *reversed(tokens[:i]), *tokens[i + 1 :]]
    return next((token in GROUND for token in order if token in GROUND or token in PICTURE), False)
