"""Which named shapes of a file are the streets of its addresses, and what each is called.

Streets are lines; a square is an area or a point. Where streets have no names (Japan, many planned towns) addresses name the
block or neighbourhood instead: then those areas are the "streets", as data, and nothing downstream knows the difference.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

from addressvlm.cities.districts import cells
from addressvlm.cities.extract import Extract, Feature, Tags
from addressvlm.cities.osm import BLOCK_PLACES, is_block, is_road, is_street
from addressvlm.errors import InputError
from addressvlm.names import normal, proper, spellings
from addressvlm.nearby import METRES_PER_DEGREE

Unit = Literal["auto", "streets", "blocks"]

ORDINARY = frozenset("primary secondary tertiary unclassified residential living_street pedestrian".split())
NAMED_SHARE = 0.2  # where fewer of the ordinary streets have a name, blocks are the addresses, if there are any
SAME_STREET_M = 50.0  # two spellings of one name belong to one street if their lines come this near


@dataclass(frozen=True)
class Network:
    """Named shapes in degrees, and other names of those names (without the names themselves).

    `shown` tells for each spelling of the file under which name it is shown.
    """

    names: list[str]
    shapes: list[BaseGeometry]
    variants: dict[str, list[str]]
    shown: dict[str, str]


def wanted(tags: Tags) -> bool:
    """What of an OpenStreetMap file is needed here: named streets, blocks, and how many ordinary streets have no name."""
    return (is_street(tags) and (named(tags) or tags.get("highway") in ORDINARY)) or (is_block(tags) and named(tags))


def named(tags: Tags) -> bool:
    """Whether there is a name in any language."""
    return any(key == "name" or key.startswith("name:") for key in tags)


def network(extract: Extract, path: str, language: str | None = None, unit: Unit = "auto") -> Network:
    """The streets (or blocks) of an extract or of a table, each with the name that is shown.

    All lines of a table count, and its areas and points too unless it has OpenStreetMap's `highway` or `place`, by which
    these are judged then.

    Raises:
        InputError: nothing of it has a name.
    """
    features = [f for f in extract.features if spellings(f.tags, language)[0]]
    of_osm = extract.osm or any("highway" in f.tags or "place" in f.tags for f in features)
    if unit == "blocks" or (unit == "auto" and of_osm and _few_names(extract)):
        chosen = _blocks(features, extract)
        if chosen or unit == "blocks":
            return _named(chosen, path, language)
    return _named([f for f in features if _counts(f, of_osm, extract.osm)], path, language)


def roads_of(extract: Extract, streets: Network, language: str | None = None) -> list[Feature]:
    """What tiles are drawn from: all that one can walk or drive on, and all lines of a table.

    The names are those of the streets; tags are `name`, `highway` and `alt_name` (the variants).
    """
    found = []
    for feature in extract.features:
        if is_road(feature.tags) if extract.osm or feature.dimension == 2 else feature.dimension == 1:
            written, others = spellings(feature.tags, language)
            name = streets.shown.get(written, written)
            variants = "; ".join(streets.variants.get(name, others))
            tags = {"name": name, "highway": feature.tags.get("highway", ""), "alt_name": variants}
            found.append(Feature({key: text for key, text in tags.items() if text}, feature.shape))
    return found


def variants_of(
    features: Sequence[Feature], language: str | None = None, shown: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Shown name -> all other names that objects of this name have; `shown` as in `Network`."""
    others: dict[str, dict[str, None]] = defaultdict(dict)
    for feature in features:
        written, more = spellings(feature.tags, language)
        others[(shown or {}).get(written, written)] |= dict.fromkeys([written, *more])
    found = {name: [other for other in more if other != name] for name, more in others.items() if name}
    return {name: more for name, more in found.items() if more}


def _counts(feature: Feature, of_osm: bool, chosen_by_us: bool) -> bool:
    """Whether a named object is a street; whoever made a table chose its lines."""
    if not of_osm or (feature.dimension == 1 and not chosen_by_us):
        return True
    return is_street(feature.tags) and (feature.dimension > 0 or feature.tags.get("place") == "square")


def _few_names(extract: Extract) -> bool:
    """Whether most ordinary streets have no name."""
    counts = Counter(named(f.tags) for f in extract.features if f.tags.get("highway") in ORDINARY)
    return counts[True] < NAMED_SHARE * counts.total()


def _blocks(features: Sequence[Feature], extract: Extract) -> list[Feature]:
    """The finest areas that an address can name; beside them, where there are only middles of such, the cells around these."""
    blocks = [f for f in features if is_block(f.tags)]
    areas = [f for f in blocks if f.dimension == 2]
    inner, outer = _intersecting([f.shape.representative_point() for f in areas], areas)
    coarse = {o for i, o in zip(inner, outer, strict=True) if areas[i].shape.area < 0.9 * areas[o].shape.area}
    finest = [area for i, area in enumerate(areas) if i not in coarse]
    points = [f for f in blocks if f.dimension == 0]
    covered = set(_intersecting([f.shape for f in points], finest)[0])
    free = [point for i, point in enumerate(points) if i not in covered]
    if free:
        kinds = Counter(point.tags["place"] for point in free)
        kind = max(BLOCK_PLACES, key=lambda place: kinds[place])
        rest = shapely.difference(shapely.box(*extract.bounds), shapely.union_all([f.shape for f in finest]))
        finest += cells([point for point in free if point.tags["place"] == kind], rest)
    return finest


def _intersecting(shapes: list[BaseGeometry], areas: Sequence[Feature]) -> NDArray[np.int64]:
    """Pairs (2, N) of a shape and an area that meet."""
    return shapely.STRtree([f.shape for f in areas]).query(np.array(shapes, dtype=object), predicate="intersects")


def _named(features: Sequence[Feature], path: str, language: str | None) -> Network:
    """Shapes by the name that is shown; a MultiLineString or such is taken apart.

    Raises:
        InputError: there are none.
    """
    if not features:
        raise InputError(
            f"{path} has no named street: it needs lines (or areas, or points) with the property `name`, or OpenStreetMap's "
            f"streets, squares or blocks with one."
        )
    written = [spellings(f.tags, language)[0] for f in features]
    local = [f.tags.get("name", "").strip() or shown for f, shown in zip(features, written, strict=True)]
    names = _translated(written, local, _one_spelling(local, [f.shape for f in features]))
    one = _one_spelling(names, [f.shape for f in features])
    shown = {spelling: one[name] for spelling, name in zip(written, names, strict=True)}
    parts, owner = shapely.get_parts([f.shape for f in features], return_index=True)
    return Network([shown[written[i]] for i in owner], list(parts), variants_of(features, language, shown), shown)


def _translated(shown: list[str], local: list[str], street: dict[str, str]) -> list[str]:
    """Where only some ways of a street have `name:<language>`, the others take it from them, by their `name`.

    `street` says of such names which are spellings of one.
    """
    said: dict[str, Counter[str]] = defaultdict(Counter)
    for name, of_place in zip(shown, local, strict=True):
        if name != of_place:
            said[street[of_place]][name] += 1
    return [
        said[street[of_place]].most_common(1)[0][0] if name == of_place and street[of_place] in said else name
        for name, of_place in zip(shown, local, strict=True)
    ]


def _one_spelling(names: Sequence[str], shapes: Sequence[BaseGeometry]) -> dict[str, str]:
    """For each spelling the one that is shown: of those with one normal form and touching lines the most frequent.

    Streets of one form in different parts of the city stay apart; so do `E Street` and `East Street`, which may well cross.
    """
    counts = Counter(names)
    forms: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts, key=lambda n: (-counts[n], -len(n), n)):
        forms[normal(name)].append(name)
    shown = {name: name for name in counts}
    several = [alike for alike in forms.values() if len(alike) > 1 and proper(alike[0])]
    if not several:
        return shown
    squeeze = np.cos(np.radians(np.mean(shapely.total_bounds(shapes)[1::2])))
    parts = defaultdict(list)
    doubtful = {name for alike in several for name in alike}
    for name, shape in zip(names, shapes, strict=True):
        if name in doubtful:
            parts[name].append(shapely.transform(shape, lambda c: c * METRES_PER_DEGREE * [squeeze, 1]))
    whole = {name: shapely.geometrycollections(found) for name, found in parts.items()}
    for alike in several:
        left = list(alike)
        while left:
            street = [left.pop(0)]
            for member in street:  # grows while it is gone through
                near = [name for name in left if shapely.dwithin(whole[member], whole[name], SAME_STREET_M)]
                street += near
                left = [name for name in left if name not in near]
            shown |= dict.fromkeys(street, street[0])
    return shown
