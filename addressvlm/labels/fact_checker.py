"""Whether what an English label says is among the facts: directions, distances, crossing street, names read, colours.

Names become marks (`§own`, `§cross`, …), then every compass word, distance, name or colour is judged by what it is said of:
the last telling word before it in its sentence, or the first one after it.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from addressvlm.gazetteer.name_matcher import MentionFinder, normalize_name, split_sentences
from addressvlm.labels.facts import COMPASS, Facts
from addressvlm.labels.templates import AXES, COLOUR_OF, METRES, amounts

Claim = tuple[str, str]  # kind of the problem, what is wrong

NEAR_M = 20  # what is "right here" is not further away
LEAST_TOLERANCE_M = 10.0  # distances are measured in tens of metres
REACH = 8  # words between a verb and the names that it joins

_TOPICS = {
    "facing": "camera photo photograph photographer picture scene viewer view gaze looks looking look faces facing faced face "
    "gazes gazing points pointing pointed turned aimed directed shot seen sees",
    "cross": "§cross §other §foreign §unknown junction meets meet meeting met crosses crossing crossed corner intersection "
    "intersects joins joining joined metres meters metre meter m away branches",
    "axis": "runs run running ran axis oriented orientation aligned extends extending stretches leads leading",
}
_TOPIC = {word: topic for topic, words in _TOPICS.items() for word in words.split()}
_LOOKING = set("camera looks looking look faces facing faced turned points pointing pointed aimed gazes directed view".split())
_JOINING = set(
    "meets meet meeting met crosses crossing crossed intersects intersecting joins joining joined junction intersection".split()
)
_READING = set(
    "read reads reading written labelled labeled labels label marked inscribed printed legible bears names named".split()
)
_GROUND = set("above aerial overhead satellite roofs ground around surroundings map tile".split())
_PICTURE = set(
    "photo camera view facades façades fronts surfaces picture image street-level shows walls buildings houses".split()
)

_POINT = "|".join(sorted(COMPASS, key=len, reverse=True))
_SPLIT_POINT = re.compile(r"\b(north|south)[- ](east|west)(?=ern|erly|ward|bound|\b)")
_AXIS = re.compile(rf"\b({_POINT})(?:ern|wards?)?(?:\s*[-–/]\s*|\s+to\s+(?:the\s+)?|\s+and\s+)({_POINT})\b")
_ENDING = re.compile(rf"\b({_POINT})(?:ern|erly|wards?|bound)\b")
_TOKEN = re.compile(r"§\w+|axis:[\w-]+|\d+(?:[.,]\d+)*|\w+(?:['’]\w+)?|[;:—]")
_HERE = re.compile(
    r"\b(right here|right at|right by|at the camera|(at|on|marks) the (very )?(corner|junction|crossing|intersection))\b"
)
_OBLIQUE = re.compile(r"^(half|slantwise|obliquely|diagonally|askew|angle|slanting)$")
_STREET_WORD = (
    r"(?:Street|St\.?|Road|Rd\.?|Avenue|Ave\.?|Lane|Ln\.?|Drive|Boulevard|Blvd\.?|Place|Court|Square|Row|Terrace|Close|Passage|"
    r"Crescent|Parade|Way|Alley)"
)
_LOOKS_LIKE_A_STREET = re.compile(
    rf"\b(?!(?:The|This|That|A|On|In|At|From|To|One|Which)\b)[A-Z][\w'’.-]*(?:\s+[A-Z][\w'’.-]*){{0,2}}\s+{_STREET_WORD}(?!\w)"
)
_PROPER = re.compile(r"(?<=[\w,;)] )[A-Z][\w'’-]+")  # a capital inside a sentence
_NO_NAME = {*COMPASS, *(f"{point}ern" for point in COMPASS), "i'm", "i've", "street", "road", "district", "district's"}
_SKY = re.compile(r"\b(wide|open|broad|narrow|little|hidden|no|strip of) sky\b|\bsky is (wide|open|broad|narrow|hidden)\b")
_SKY_WORD = {"wide": "wide", "open": "wide", "broad": "wide", "narrow": "narrow", "little": "narrow", "strip of": "narrow",
             "hidden": "hidden", "no": "hidden"}  # fmt: skip


class FactChecker:
    """The claims of one label. `streets` and `districts` are those of the city with the label's own."""

    def __init__(self, text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder, tolerance: float) -> None:
        self.facts, self.tolerance = facts, tolerance
        self._readable = {normalize_name(name) for name in facts.names}
        self._sentences = [self._tokens(sentence, streets, districts) for sentence in split_sentences(text)]

    def problems(self) -> list[Claim]:
        """What is said and is not among the facts."""
        found: list[Claim] = []
        for text, tokens in self._sentences:
            for check in (self._directions, self._views, self._crossings, self._readings, self._colours):
                found += check(tokens)
            found += self._distances(text)
            found += self._sky(text)
        return list(dict.fromkeys(found))

    def _tokens(self, sentence: str, streets: MentionFinder, districts: MentionFinder) -> tuple[str, list[str]]:
        """The sentence with marks for names and directions, in lower case, and its words."""
        spans = [(m.start, m.end, self._mark(m.name)) for m in streets.find(sentence)]
        for m in districts.find(sentence):
            if not any(start < m.end and m.start < end for start, end, _ in spans):
                spans.append(
                    (
                        m.start,
                        m.end,
                        "§district" if normalize_name(m.name) == normalize_name(self.facts.district) else "§elsewhere",
                    )
                )
        city = MentionFinder([self.facts.city]).find(sentence) if self.facts.city else []
        spans += [(m.start, m.end, "§city") for m in city if not any(s < m.end and m.start < e for s, e, _ in spans)]
        for start, end, mark in sorted(spans, reverse=True):
            sentence = f"{sentence[:start]} {mark} {sentence[end:]}"
        text = _LOOKS_LIKE_A_STREET.sub(" §unknown ", sentence)
        text = _PROPER.sub(lambda m: m.group() if m.group().lower() in _NO_NAME else " §unknown ", text).lower()
        text = _SPLIT_POINT.sub(r"\1\2", text)
        text = _ENDING.sub(r"\1", _AXIS.sub(_axis, text))
        return text, _TOKEN.findall(text)

    def _mark(self, name: str) -> str:
        form, facts = normalize_name(name), self.facts
        if form in (normalize_name(facts.street), normalize_name(facts.on_map)):
            return "§own"
        if facts.cross_street and form == normalize_name(facts.cross_street):
            return "§cross"
        return "§other" if form in self._readable else "§foreign"

    def _directions(self, tokens: list[str]) -> Iterator[Claim]:
        facts = self.facts
        for at, token in enumerate(tokens):
            if token.startswith("axis:") and token.removeprefix("axis:") != facts.direction:
                yield "direction", f"it says that the street runs {token.removeprefix('axis:')}, and that is not measured"
            if token not in COMPASS:
                continue
            topic = _topic(tokens, at)
            ends = _ends(facts.direction)
            allowed = {
                "facing": {facts.facing},
                "cross": {facts.cross_direction} if facts.cross_street else set(),
                "axis": ends | ({facts.cross_direction} if facts.cross_street else set()),
            }.get(topic, {facts.facing, *ends} | ({facts.cross_direction} if facts.cross_street else set()))
            if token not in allowed:
                said = {"facing": "the camera faces", "cross": "a street is met to the", "axis": "the street runs to the"}
                yield "direction", f"it says that {said.get(topic, 'something is')} {token}, and that is not measured"

    def _views(self, tokens: list[str]) -> Iterator[Claim]:
        """How the camera looks at the street."""
        for at, token in enumerate(tokens):
            said = "oblique" if _OBLIQUE.match(token) else _VIEW_WORDS.get(token)
            target = next((t for t in tokens[at + 1 : at + 4] if t not in ("the", "this", "its", "to")), "")
            if said is None or (said != "oblique" and target not in ("street", "road", "roadway", "it", "§own")):
                continue
            before = tokens[max(0, at - REACH) : at]
            if said != "oblique" and any(_OBLIQUE.match(t) for t in before[-2:]):
                continue
            if _LOOKING & set(before) and said != self.facts.view:
                yield "direction", f"it says that the camera looks {said} to the street, and that is not measured"

    def _distances(self, text: str) -> Iterator[Claim]:
        facts, said = self.facts, amounts(text)
        true = facts.cross_distance_m if facts.cross_street else None
        for words, metres in said:
            if true is None:
                yield "distance", f"it says {words}, and that is not measured"
            elif abs(metres - true) > max(LEAST_TOLERANCE_M, self.tolerance * true):
                yield "distance", f"it says {words}, and {facts.cross_street} is {true} m away"
        if not said and "§cross" in text and _HERE.search(text) and (facts.cross_distance_m or 0) > NEAR_M:
            yield "distance", f"it says that {facts.cross_street} is right here, and it is {facts.cross_distance_m} m away"

    def _crossings(self, tokens: list[str]) -> Iterator[Claim]:
        """A verb of meeting joins the nearest names to its left and right, and what is reached is the crossing street."""
        said = f"it says that a street is met that is not {self.facts.cross_street or 'measured to meet it'}"
        for at, token in enumerate(tokens):
            if token not in _JOINING:
                continue
            left = next((t for t in reversed(tokens[max(0, at - REACH) : at]) if t.startswith("§")), None)
            right = next((t for t in tokens[at + 1 : at + 1 + REACH] if t.startswith("§")), None)
            if {left, right} & _STRANGERS:
                yield "crossing", said
            elif (
                token in ("meets", "joins")
                and next((t for t in tokens[at + 1 :] if t not in ("the", "a", "its")), "") in _NO_STREET
            ):
                yield "crossing", "it says that a street meets what is no street"
            elif token in _MEETING and (
                (right == "§own" and left != "§cross" and "§cross" not in tokens[at:])
                or (
                    left == "§own"
                    and right is None
                    and "§cross" not in tokens
                    and _NOBODY.match(" ".join(tokens[at + 1 : at + 2]))
                )
            ):
                yield "crossing", f"it says that {self.facts.on_map} is met by no other street than itself"
        reached = not self._distance_free(tokens) or any(pair in _TURNINGS for pair in pairwise(tokens))
        if reached and _STRANGERS & set(tokens) and "§cross" not in tokens and not _READING & set(tokens):
            yield "crossing", said

    def _distance_free(self, tokens: list[str]) -> bool:
        return not any(token.rstrip("s") in METRES for token in tokens)

    def _readings(self, tokens: list[str]) -> Iterator[Claim]:
        """Names that are said to be written on the map are; no other street of the city is spoken of at all."""
        facts = self.facts
        for at, token in enumerate(tokens):
            if token in ("§foreign", "§unknown", "§elsewhere"):
                yield "name", "it names a street or district that is not among the facts"
            if token not in _READING:
                continue
            after = list(_until(tokens[at + 1 :], _JOINING | _NEXT))
            if after.count("§own") > 1 or after.count("§cross") > 1:
                yield "name", "it lists a name twice"
            for mark in [t for t in (after if any(t.startswith("§") for t in after) else tokens[:at]) if t.startswith("§")]:
                name = {"§own": facts.on_map, "§cross": facts.cross_street}.get(mark)
                if name and normalize_name(name) not in self._readable:
                    yield "name", f"it says that {name} can be read on the map, and it is not written there"

    def _colours(self, tokens: list[str]) -> Iterator[Claim]:
        for at, token in enumerate(tokens):
            colour = COLOUR_OF.get(token)
            if colour is None:
                continue
            ground = _of_ground(tokens, at)
            if colour not in (self.facts.tile_colours if ground else self.facts.photo_colours):
                where = "from above" if ground else "in the photo"
                yield "colour", f"it says {token} {where}, and that is not among the colours measured there"

    def _sky(self, text: str) -> Iterator[Claim]:
        for match in _SKY.finditer(text):
            said = _SKY_WORD[match.group(1) or match.group(2)]
            if said != self.facts.sky:
                yield "sky", f"it says “{match.group(0)}”, and that is not measured"


_VIEW_WORDS = {"along": "along", "down": "along", "up": "along", "follows": "along", "following": "along",
               "across": "across", "over": "across"}  # fmt: skip
_MEETING = {"meets", "crosses", "intersects", "joins"}
_NOBODY = re.compile(r"$|it$|its$|at$|about$|around$|roughly$|right$|here$|\d")  # after a verb of meeting: no other street
_NO_STREET = {"camera", "photo", "map", "centre", "center", "corner", "picture", "viewer"}
_STRANGERS = {"§other", "§foreign", "§unknown"}
_TURNINGS = {("corner", "of"), ("corner", "with"), ("comes", "to"), ("come", "to"), ("turn", "into"), ("turns", "into")}
_NEXT = {"runs", ";", "so", "therefore", "which", "where", "that", "at"}  # what follows is said of something else


def _axis(match: re.Match[str]) -> str:
    """Two opposite compass words as one mark; others stay two words."""
    first, second = match.groups()
    if (COMPASS.index(first) - COMPASS.index(second)) % 8 != 4:
        return match.group(0).replace("-", " ")
    return f"axis:{AXES.get(first) or AXES[second]}"


def _ends(direction: str | None) -> set[str | None]:
    return set() if direction is None else set(direction.split("-"))


def _topic(tokens: list[str], at: int) -> str:
    """What a direction is said of: by the last telling word before it, else the first after it; empty if there is none."""
    start = max((i + 1 for i in range(at) if tokens[i] in (";", ":", "—")), default=0)
    before = [_TOPIC[t] for t in tokens[start:at] if t in _TOPIC]
    after = [_TOPIC[t] for t in tokens[at + 1 :] if t in _TOPIC]
    return before[-1] if before else after[0] if after else ""


def _of_ground(tokens: list[str], at: int) -> bool:
    """Whether a colour is said of the ground: by the noun it stands before, else the last telling word before, else after."""
    telling = [t in _GROUND if t in _GROUND or t in _PICTURE else None for t in tokens]
    rest = [t for t in (*_after_colours(tokens, telling, at), *reversed(telling[:at]), *telling[at + 1 :]) if t is not None]
    return bool(rest and rest[0])


def _after_colours(tokens: list[str], telling: list[bool | None], at: int) -> list[bool | None]:
    """What the two words after a run of colours (`red and grey walls`) tell."""
    while at + 1 < len(tokens) and (tokens[at + 1] in COLOUR_OF or tokens[at + 1] == "and"):
        at += 1
    return telling[at + 1 : at + 3]


def _until(tokens: Iterable[str], stops: set[str]) -> Iterator[str]:
    for token in tokens:
        if token in stops:
            return
        yield token
