"""One spelling for each street and district, so that no question contradicts another because of how a name is written.

Of the ways of a map the most frequent spelling wins; a table's names become the map's.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from addressvlm.gazetteer.name_matcher import is_distinctive, spelling_form, unaccented_name
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE

SAME_STREET_M = 50.0  # two spellings of one name belong to one street if their lines come this near


class KnownNames:
    """The names of a map and which of them another spelling stands for."""

    def __init__(self, names: Iterable[str], variants: Mapping[str, Sequence[str]]) -> None:
        """`variants`: name -> its other names; one that is itself a name, or a spelling of one, stands for that."""
        self._names = set(names)
        others = {name: [name, *variants.get(name, ())] for name in self._names}
        self._forms = [
            _by_form({name: [name] for name in self._names}, spelling_form),
            _by_form(others, spelling_form),
            _by_form(others, _unaccented_form),
        ]

    def candidates(self, spelling: str) -> list[str]:
        """The names that it may stand for, sorted; only itself if it is one."""
        if spelling in self._names:
            return [spelling]
        keys = (spelling_form(spelling), spelling_form(spelling), _unaccented_form(spelling))
        matches = (names[key] for names, key in zip(self._forms, keys, strict=True) if key in names)
        return sorted(next(matches, ()))


def _unaccented_form(name: str) -> str:
    return unaccented_name(name) if is_distinctive(name) else spelling_form(name)


def _by_form(spellings: Mapping[str, Iterable[str]], form: Callable[[str], str]) -> dict[str, set[str]]:
    names: dict[str, set[str]] = defaultdict(set)
    for name, others in spellings.items():
        for other in others:
            names[form(other)].add(name)
    return names


def most_frequent_spellings(counts: Counter[str]) -> dict[str, str]:
    """Spelling -> the most frequent of those that are the same name."""
    forms: dict[str, str] = {}
    order = sorted(counts, key=lambda name: (-counts[name], -len(name), name))
    return {name: forms.setdefault(spelling_form(name), name) for name in order}


def translate_spellings(spellings: list[str], local: list[str], street: dict[str, str]) -> list[str]:
    """The names of N ways where only some ways of a street have `name:<language>`: the others take the most frequent one.

    Args:
        spellings: `name:<language>`, or `name` where it is missing.
        local: `name`.
        street: `name` -> the street's own spelling of it.
    """
    translations: dict[str, Counter[str]] = defaultdict(Counter)
    for spelling, name in zip(spellings, local, strict=True):
        if spelling != name:
            translations[street[name]][spelling] += 1
    return [
        translations[street[name]].most_common(1)[0][0] if spelling == name and street[name] in translations else spelling
        for spelling, name in zip(spellings, local, strict=True)
    ]


def unify_spellings(names: Sequence[str], shapes: Sequence[BaseGeometry]) -> dict[str, str]:
    """Spelling -> the displayed one: of those with one normal form and touching lines the most frequent.

    Streets of one form in different parts of the city stay apart, if they differ in more than capitals and blanks; so do
    `E Street` and `East Street`, which may well cross.
    """
    counts = Counter(names)
    forms: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda n: (-counts[n], -len(n), n)):
        forms[spelling_form(name)].append(name)
    display = {name: name for name in counts}
    groups = [group for group in forms.values() if len(group) > 1]
    if not groups:
        return display
    scale = METRES_PER_DEGREE * np.array([np.cos(np.radians(np.mean(shapely.total_bounds(shapes)[1::2]))), 1])
    parts = defaultdict(list)
    ambiguous = {name for group in groups for name in group}
    for name, shape in zip(names, shapes, strict=True):
        if name in ambiguous:
            parts[name].append(shapely.transform(shape, lambda c: c * scale))
    metres = {name: shapely.geometrycollections(shapes) for name, shapes in parts.items()}
    for group in groups:
        rest = list(group)
        while rest:
            street = [rest.pop(0)]
            for member in street:  # grows during the loop
                near = [
                    name
                    for name in rest
                    if _letters(member) == _letters(name) or shapely.dwithin(metres[member], metres[name], SAME_STREET_M)
                ]
                street += near
                rest = [name for name in rest if name not in near]
            display |= dict.fromkeys(street, street[0])
    return display


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))
