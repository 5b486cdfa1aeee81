"""What a label must fulfil before a model learns from it: form, language, the right address, true claims.

FactChecker replaces names by marks (`§own`, `§cross`, …). Then every compass word, distance, name or colour is checked against
the fact that it is about: that of the last topic word before it in its sentence, or the first one after it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise, takewhile
from typing import NamedTuple

from addressvlm.config.labels import LabelsConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.gazetteer.name_matcher import MentionFinder, NameMention, normalize_name, split_sentences
from addressvlm.labels import lexicon
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import Prompt

NEAR_M = 20  # a crossing "right here" is not further away
MIN_TOLERANCE_M = 10.0  # distances are measured in tens of metres
REACH = 8  # words between a verb and the names that it joins
OTHER_STREETS = {"§other", "§foreign", "§unknown"}

_POINT = "|".join(sorted(lexicon.COMPASS, key=len, reverse=True))
_SPLIT_POINT = re.compile(r"\b(north|south)[- ](east|west)(?=ern|erly|ward|bound|\b)")
_AXIS = re.compile(rf"\b({_POINT})(?:ern|wards?)?(?:\s*[-–/]\s*|\s+to\s+(?:the\s+)?|\s+and\s+)({_POINT})\b")
_ENDING = re.compile(rf"\b({_POINT})(?:ern|erly|wards?|bound)\b")
_TOKEN = re.compile(r"§\w+|axis:[\w-]+|\d+(?:[.,]\d+)*|\w+(?:['’]\w+)?|[;:—]")
_HERE = re.compile(
    r"\b(right here|right at|right by|at the camera|(at|on|marks) the (very )?(corner|junction|crossing|intersection))\b"
)
_UNKNOWN_STREET = re.compile(
    rf"\b(?!(?:The|This|That|A|On|In|At|From|To|One|Which)\b)[A-Z][\w'’.-]*(?:\s+[A-Z][\w'’.-]*){{0,2}}\s+{lexicon.STREET_WORDS}(?!\w)"
)
_PROPER_NOUN = re.compile(r"(?<=[\w,;)] )[A-Z][\w'’-]+")  # a capital inside a sentence
_SKY = re.compile(r"\b(wide|open|broad|narrow|little|hidden|no|strip of) sky\b|\bsky is (wide|open|broad|narrow|hidden)\b")
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
_MARKUP = re.compile(
    r"^[^\S\n]*([-*•#>]|\d+[.)])\s|\*\*|\*\S|`|__|\]\(|https?://|^[^\S\n]*\|.*\||&(amp|lt|gt|quot|nbsp|#x?\w+);|\\[\[(n]|\\\w+\{",
    re.MULTILINE,
)
_JSON = re.compile(r"^\s*[\[{]|[\]}]\s*$|\"\w+\"\s*:")
# Special tokens of chat templates and processors: <image>, <|im_end|>, </s>, <start_of_turn>, [INST], <<SYS>>, ▁, ｜
_SPECIAL_TOKEN = re.compile(r"<[^<>\s][^<>\n]{0,60}>|<\||\|>|<<|\[/?[A-Z][A-Z_]{2,}\]|[｜▁◁▷]")
_ROLE = re.compile(
    r"^[^\w\n]{0,8}(assistant|user|system|human|ai|model|bot|answer|response|explanation|label|output|reasoning|final)[^\w\n:]{0,8}(:|：|$)",
    re.IGNORECASE | re.MULTILINE,
)
_PREFACE = re.compile(
    r"\A\W{0,8}((sure|certainly|of course|absolutely|okay|ok|great|understood|got it|natürlich|gerne|bien sûr|claro|certo)"
    r"\b\s?[,!.:—–-]"
    r"|[^.!?:\n]{0,60}\b(here(['’]s| is| are)|below is|the following|as requested|voici|hier ist|aquí (está|tienes)|ecco"
    r"|aqui está)\b[^.!?:\n]{0,80}:)"
    r"|\b(let me know|feel free to|i hope (this|that|it)|is there anything|would you like me|word count)\b|\(\d+ words\)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"(?s)\A\s*[\"“”„«'‘].*[\"”“»'’]\s*\Z")
# Control and format characters that no plain text has; joiners and direction marks belong to some scripts.
_CONTROL = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd\ud800-\udfff\ue000-\uf8ff]"
)
_MAP = re.compile(r"\b(on|the|a|this) (map|tile|satellite)|from above|\baerial\b", re.IGNORECASE)
_ENGLISH = frozenset("the and this with from that which are".split())


_FORM = (
    (_MARKUP, "has lists, headings, bold type, links or other markup"),
    (_JSON, "is JSON"),
    (_ROLE, "begins a line with the name of a role or part"),
    (_PREFACE, "speaks to the reader before or after the text"),
    (_QUOTED, "stands in quotation marks"),
    (_CONTROL, "has control characters"),
)


class Problem(NamedTuple):
    """What is wrong with a label: a kind to count, and a text that its writer can act on."""

    kind: str
    text: str


class FactChecker:
    """Checks the claims of one label; `streets` and `districts` find the names of the city and of the facts."""

    def __init__(self, text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder, tolerance: float) -> None:
        self.facts, self.tolerance = facts, tolerance
        self._readable = {normalize_name(name) for name in facts.names}
        self._marks = dict.fromkeys(self._readable, "§other")
        if facts.cross_street:
            self._marks[normalize_name(facts.cross_street)] = "§cross"
        self._marks |= dict.fromkeys(map(normalize_name, (facts.street, facts.on_map)), "§own")
        self._sentences = [self._mark_names(sentence, streets, districts) for sentence in split_sentences(text)]

    def problems(self) -> list[Problem]:
        """The claims that are not among the facts."""
        problems: list[Problem] = []
        for sentence in self._sentences:
            tokens = _TOKEN.findall(sentence)
            for check in (self._directions, self._views, self._crossings, self._names, self._colours):
                problems += check(tokens)
            problems += self._distances(sentence)
            for match in _SKY.finditer(sentence):
                if lexicon.SKY_OF[match.group(1) or match.group(2)] != self.facts.sky:
                    problems.append(Problem("sky", f"it says “{match.group(0)}”, and that is not measured"))
        return list(dict.fromkeys(problems))

    def _mark_names(self, sentence: str, streets: MentionFinder, districts: MentionFinder) -> str:
        """The sentence in lower case, with marks for names and plain compass words."""
        facts = self.facts
        spans = [(m.start, m.end, self._marks.get(normalize_name(m.name), "§foreign")) for m in streets.find(sentence)]
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
        sentence = _PROPER_NOUN.sub(
            lambda m: m.group() if m.group().lower() in lexicon.NO_NAMES else " §unknown ", sentence
        ).lower()
        return _ENDING.sub(r"\1", _AXIS.sub(_mark_axis, _SPLIT_POINT.sub(r"\1\2", sentence)))

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
            if token in lexicon.COMPASS:
                claim, allowed = claims.get(_topic(tokens, i), ("something is", {facts.facing, *ends, *cross}))
                if token not in allowed:
                    yield Problem("direction", f"it says that {claim} {token}, and that is not measured")

    def _views(self, tokens: list[str]) -> Iterator[Problem]:
        """How the camera looks at the street."""
        for i, token in enumerate(tokens):
            view = lexicon.VIEW_OF.get(token)
            if view in ("along", "across"):
                target = next((t for t in tokens[i + 1 : i + 4] if t not in ("the", "this", "its", "to")), "")
                modified = any(lexicon.VIEW_OF.get(t) == "oblique" for t in tokens[max(0, i - 2) : i])  # half along
                if modified or target not in ("street", "road", "roadway", "it", "§own"):
                    continue
            if view and view != self.facts.view and lexicon.LOOKING & set(tokens[max(0, i - REACH) : i]):
                yield Problem("direction", f"it says that the camera looks {view} to the street, and that is not measured")

    def _distances(self, sentence: str) -> Iterator[Problem]:
        facts, distances = self.facts, lexicon.parse_distances(sentence)
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
            if token not in lexicon.MEETING:
                continue
            before, after = tokens[max(0, i - REACH) : i], tokens[i + 1 :]
            left = next((t for t in reversed(before) if t.startswith("§")), None)
            right = next((t for t in after[:REACH] if t.startswith("§")), None)
            word = after[0] if after else ""
            no_object = right is None and (word in lexicon.NO_OBJECT or word[:1].isdecimal())
            if {left, right} & OTHER_STREETS:
                yield wrong
            elif (
                token in ("meets", "joins")
                and next((t for t in after if t not in ("the", "a", "its")), "") in lexicon.NOT_STREETS
            ):
                yield Problem("crossing", "it says that a street meets what is no street")
            elif token in lexicon.MEETING_VERBS and (
                (right == "§own" and left != "§cross" and "§cross" not in after)
                or (left == "§own" and no_object and "§cross" not in tokens)
            ):
                yield Problem("crossing", f"it says that {self.facts.on_map} is met by no other street than itself")
        reached = any(token.rstrip("s") in lexicon.METRES for token in tokens) or any(
            pair in lexicon.TURNING for pair in pairwise(tokens)
        )
        if reached and OTHER_STREETS & set(tokens) and "§cross" not in tokens and not lexicon.READING & set(tokens):
            yield wrong

    def _names(self, tokens: list[str]) -> Iterator[Problem]:
        """Names that the text reads on the map are there, and no other street of the city is mentioned at all."""
        facts = self.facts
        for i, token in enumerate(tokens):
            if token in ("§foreign", "§unknown", "§elsewhere"):
                yield Problem("name", "it names a street or district that is not among the facts")
            if token not in lexicon.READING:
                continue
            after = list(takewhile(lambda t: t not in lexicon.MEETING | lexicon.NEXT_CLAUSE, tokens[i + 1 :]))
            if after.count("§own") > 1 or after.count("§cross") > 1:
                yield Problem("name", "it lists a name twice")
            for mark in after if any(t.startswith("§") for t in after) else tokens[:i]:
                name = {"§own": facts.on_map, "§cross": facts.cross_street}.get(mark)
                if name and normalize_name(name) not in self._readable:
                    yield Problem("name", f"it says that {name} can be read on the map, and it is not written there")

    def _colours(self, tokens: list[str]) -> Iterator[Problem]:
        """A colour is of the ground or of the photo: by the noun after it, else the last topic word before, else after."""
        for i, token in enumerate(tokens):
            colour = lexicon.COLOUR_OF.get(token)
            if colour is None:
                continue
            noun = i + 1
            while noun < len(tokens) and (tokens[noun] in lexicon.COLOUR_OF or tokens[noun] == "and"):  # red and grey walls
                noun += 1
            order = [*tokens[noun : noun + 2], *reversed(tokens[:i]), *tokens[i + 1 :]]
            from_above = next((t in lexicon.GROUND for t in order if t in lexicon.GROUND or t in lexicon.PICTURE), False)
            if colour not in (self.facts.tile_colours if from_above else self.facts.photo_colours):
                where = "from above" if from_above else "in the photo"
                yield Problem("colour", f"it says {token} {where}, and that is not among the colours measured there")


def _mark_axis(match: re.Match[str]) -> str:
    """Two opposite compass words as one mark; others stay two words."""
    first, second = match.groups()
    if (lexicon.COMPASS.index(first) - lexicon.COMPASS.index(second)) % 8 != 4:
        return match.group(0).replace("-", " ")
    return f"axis:{lexicon.DIRECTION_OF[first]}"


def _topic(tokens: list[str], i: int) -> str:
    """What the direction at `i` is about: the topic of the last topic word before it, else of the first after it."""
    start = max((k + 1 for k in range(i) if tokens[k] in (";", ":", "—")), default=0)
    before = [lexicon.TOPIC_OF[t] for t in tokens[start:i] if t in lexicon.TOPIC_OF]
    after = [lexicon.TOPIC_OF[t] for t in tokens[i + 1 :] if t in lexicon.TOPIC_OF]
    return before[-1] if before else after[0] if after else ""


class LabelValidator:
    """Validates the labels of one city.

    Args:
        streets, districts: of the city; a label must not conclude on another one.
        variants: their other names, which count as the names.
        verified: every claim must be among the facts (English only).
        mapless: the label is of a street view alone, and must not mention a map.
        special_tokens: of the model that learns from the labels, which must not be in one.
        config: length, language and tolerance of distances; wording is validated in English only.
    """

    def __init__(
        self,
        streets: Iterable[str] = (),
        districts: Iterable[str] = (),
        variants: Mapping[str, Iterable[str]] | None = None,
        verified: bool = False,
        mapless: bool = False,
        concludes: str = "address",
        config: LabelsConfig | None = None,
        special_tokens: Iterable[str] = (),
    ) -> None:
        tokens = [token for token in special_tokens if token.strip() and not _SPECIAL_TOKEN.search(token)]  # few: most are <…>
        self._special_tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        self._variants = variants or {}
        self._streets, self._districts = self._finder(streets), self._finder(districts)
        self._verified, self._mapless, self._concludes = verified, mapless, concludes
        self.config = config or LabelsConfig()

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """What is wrong with a label, in words its writer can act on; empty if it is valid."""
        near = [name for name in (facts.main_street, facts.cross_street, *facts.names) if name]
        streets = self._finder([facts.street], near, self._streets)
        districts = self._finder([facts.district], more=self._districts)
        problems = [*self._form(text), *_address(text, facts, streets, districts, self._concludes)]
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
        token = _SPECIAL_TOKEN.search(text) or (self._special_tokens and self._special_tokens.search(text))
        if token:
            problems.append(Problem("form", f"it has a special token or a tag (“{token[0]}”) instead of plain sentences"))
        problems += [
            Problem("form", f"it {fault} instead of plain sentences") for pattern, fault in _FORM if pattern.search(text)
        ]
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
        if not lexicon.mentions_visible_things(plain) and not MentionFinder(facts.names).find(evidence):
            problems.append(Problem("visible", "it cites nothing that can be seen"))
        return problems


def make_validator(
    config: LabelsConfig, prompt: Prompt, gazetteer: Gazetteer | None = None, special_tokens: Iterable[str] = ()
) -> LabelValidator:
    """The validator of a prompt's labels in one city; without a gazetteer it knows fewer names."""
    return LabelValidator(
        streets=gazetteer.streets if gazetteer else (),
        districts=gazetteer.districts if gazetteer else (),
        variants=gazetteer.variants if gazetteer else None,
        verified=prompt.verified or not config.send_image,
        mapless=prompt.shows == "photo",
        concludes=prompt.concludes,
        config=config,
        special_tokens=special_tokens,
    )


def _address(text: str, facts: Facts, streets: MentionFinder, districts: MentionFinder, concludes: str) -> list[Problem]:
    """Whether the text names the right street and district, or the district alone, and concludes on them."""
    problems: list[Problem] = []
    street, district = normalize_name(facts.street), normalize_name(facts.district)
    if concludes == "district":
        problems += [
            Problem("street", f"it names a street, {m.name}, and is to tell the district") for m in streets.find(text)[:1]
        ]
    elif street not in streets.mentions(text):
        problems.append(Problem("street", f"it does not name the street {facts.street}"))
    if district not in districts.mentions(text):
        problems.append(Problem("district", f"it does not name the district {facts.district}"))
    sentences = split_sentences(text)[::-1]
    last = next(((sentence, mentions) for sentence in sentences if (mentions := streets.find(sentence))), None)
    if concludes == "district":
        last = None
    if last and _concluded_street(*last) != street:
        problems.append(Problem("conclusion", f"its last sentence about a street does not conclude on {facts.street}"))
    elif last and _DENIAL.search(last[0]):
        problems.append(Problem("conclusion", f"its conclusion denies {facts.street}"))
    for sentence in sentences:
        spans = [(street.start, street.end) for street in streets.find(sentence)]  # a street's name may contain a district's
        mentions = [m for m in districts.find(sentence) if not any(start <= m.start and m.end <= end for start, end in spans)]
        if mentions and normalize_name(mentions[0].name) != district:
            problems.append(Problem("conclusion", f"its last sentence about a district does not conclude on {facts.district}"))
        if mentions:
            break
    return problems


def _concluded_street(sentence: str, mentions: list[NameMention]) -> str:
    """Normal form of the street that a sentence concludes on: the first after its last word of conclusion, else the first."""
    for word in reversed(list(_CONCLUSION.finditer(sentence))):
        if after := [mention for mention in mentions if mention.start >= word.start()]:
            return normalize_name(after[0].name)
    return normalize_name(mentions[0].name)


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
