"""Rows that teach a model what the map knows: tiles of points along all streets, and photos to be matched with tiles.

    list(street_points(roads, gazetteer, spacing_m=25))

Stage 1 of paper 001 shows only places that were photographed, with their names on the tile. The map is public and everywhere:
here are tiles of points without photos, with names and without, and the questions of stage 2 about them. In the second kind of
rows the photo's place is not at the tile's centre and half of the tiles have no names, so that the photo must be matched.
"""

import math
import random
from collections.abc import Iterator
from functools import cache, lru_cache
from typing import Any

import pyarrow as pa
import pyproj
import shapely

from addressvlm.config.city import TilesConfig
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.grafting import encode_jpeg, graft_photo
from addressvlm.labels.facts import tile_colours
from addressvlm.labels.lexicon import join_words
from addressvlm.labels.templates import FROM_ABOVE
from addressvlm.questions import SUFFIXES, training_rounds
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.shards import Rows, ShardResult
from addressvlm.tiles.renderer import TileRenderer
from addressvlm.tiles.roads import Roads

POINTS = pa.schema(
    [("id", pa.string()), ("lat", pa.float64()), ("lon", pa.float64()), ("street", pa.string()), ("district", pa.string())]
)
LOOKS = ["What does this place look like from above?", "Describe the ground and the roofs around the centre."]
MATCHES = ["Was the photo taken at a place on this map?", "Do the photo and the map show the same place?"]
OFF_CENTRE = 0.2  # of the tile's side, the most that a matched photo's place is away from the centre in either direction
MATCH_SHARE = 0.3  # of the matching rows that ask whether photo and tile belong together; half of them do not

Row = dict[str, Any]


def street_points(roads: Roads, gazetteer: Gazetteer, spacing_m: float) -> Iterator[Row]:
    """Rows of POINTS: every so many metres along every street of the gazetteer, where it knows street and district together.

    Raises:
        InputError: no street of the map is one of the gazetteer's with a district around it.
    """
    to_degrees = pyproj.Transformer.from_crs(roads.crs, "EPSG:4326", always_xy=True).transform
    districts, known, count = list(gazetteer.district_geometry.items()), set(gazetteer.addresses), 0
    tree = shapely.STRtree([shape for _, shape in districts])
    for road in roads.roads:
        street = gazetteer.find_street(road.name) if road.name else None
        if street is None:
            continue
        for part in shapely.get_parts(road.line):
            for number in range(int(part.length // spacing_m) + 1):
                at = part.interpolate(min((number + 0.5) * spacing_m, part.length))
                lon, lat = to_degrees(at.x, at.y)
                inside = tree.query(shapely.Point(lon, lat), predicate="intersects")
                address = Address(street, districts[inside.min()][0]) if len(inside) else None
                if address in known:
                    yield {"id": f"map-{count:07d}", "lat": lat, "lon": lon, "street": street, "district": address.district}
                    count += 1
    if not count:
        raise InputError(
            "map rows: no street of city.streets is one of the addresses with a district around it: set city.streets and "
            "city.districts (map rows can't be made of sub-streets)."
        )


def map_batch(
    streets: str, imagery: str | None, tiles: str, gazetteer: tuple[str, str], seed: int, points: Rows
) -> ShardResult:
    """Rows of POINTS -> rows of ALIGNMENT: tiles with questions of stage 2 and what they look like from above.

    Args:
        tiles: a TilesConfig as JSON; `map_rows` says how often names are written and how many questions are asked.
        gazetteer: path and fingerprint of the one that wrong names come from.
    """
    config, names, rows = TilesConfig.model_validate_json(tiles), _load_gazetteer(*gazetteer), []
    for point in points:
        rng = random.Random(f"{seed}:{point['id']}")
        tile = _renderer(streets, imagery, tiles, rng.random() < config.map_rows.named).tile(
            point["lat"], point["lon"], point["street"]
        )
        rounds = training_rounds(Address(point["street"], point["district"]), names, rng, config.map_rows.rounds)
        if imagery and (colours := tile_colours(tile.image, 0.0)):
            answer = rng.choice(FROM_ABOVE).format(colours=join_words(colours[:2]))
            rounds.append(_round("alignment", "explanation", rng.choice(LOOKS), answer))
        image = {"bytes": encode_jpeg(tile.image, config.jpeg_quality), "path": None}
        rows.append(_row(point, point["id"], image, rounds))
    return ShardResult({"train": rows})


def matching_batch(
    streets: str, imagery: str | None, tiles: str, gazetteer: tuple[str, str], seed: int, photos: Rows
) -> ShardResult:
    """Rows of PHOTOS -> rows of ALIGNMENT: each photo on a tile around its place, off the centre, with or without names.

    Most ask what stage 2 asks; the rest ask whether photo and tile belong together. Arguments as for `map_batch`.
    """
    config, names = TilesConfig.model_validate_json(tiles), _load_gazetteer(*gazetteer)
    rows, rejects = [], []
    for photo in photos:
        rng = random.Random(f"{seed}:{photo['id']}")
        renderer = _renderer(streets, imagery, tiles, rng.random() < config.map_rows.named)
        far = [other for other in photos if _metres(photo, other) > config.side_m]
        question = rng.random() < MATCH_SHARE
        wrong = question and bool(far) and rng.random() < 0.5
        at = rng.choice(far) if wrong else photo
        reach = OFF_CENTRE * config.side_m / METRES_PER_DEGREE
        lat = at["lat"] + rng.uniform(-reach, reach)
        lon = at["lon"] + rng.uniform(-reach, reach) / max(math.cos(math.radians(lat)), 0.01)
        try:
            tile = renderer.tile(lat, lon, at["main_street"])
            image, _ = graft_photo(tile.image, photo["image"]["bytes"], config.delta, config.jpeg_quality)
        except InputError as error:
            rejects.append({"file": photo["image"]["path"], "row": None, "id": photo["id"], "reason": str(error)})
            continue
        if question:
            text = f"{rng.choice(MATCHES)} {SUFFIXES['judgment']}"
            rounds = [_round("alignment", "judgment", text, "No" if wrong else "Yes")]
        else:
            address = Address(photo["street"], photo["district"])
            rounds = training_rounds(address, names, rng, config.map_rows.rounds)
        rows.append(_row(photo, photo["place"], {"bytes": image, "path": photo["image"]["path"]}, rounds))
    return ShardResult({"train": rows}, rejects)


def _row(source: Row, place: str, image: Row, rounds: list[Row]) -> Row:
    columns = {key: source[key] for key in ("id", "street", "district")}
    return {**columns, "place": place, "image": image, "tile": None, "rounds": rounds, "source": "map", "attempts": 1}


def _round(level: str, kind: str, question: str, answer: str) -> Row:
    return {"level": level, "kind": kind, "question": question, "answer": answer, "options": []}


def _metres(one: Row, other: Row) -> float:
    squeeze = math.cos(math.radians(one["lat"]))
    return math.hypot(one["lat"] - other["lat"], (one["lon"] - other["lon"]) * squeeze) * METRES_PER_DEGREE


@cache
def _renderer(streets: str, imagery: str | None, tiles: str, named: bool) -> TileRenderer:
    config = TilesConfig.model_validate_json(tiles)
    return TileRenderer(streets, imagery, config.model_copy(update={"names": config.names and named}))


@lru_cache(maxsize=2)
def _load_gazetteer(path: str, fingerprint: str) -> Gazetteer:
    return Gazetteer.load(path_of(path))
