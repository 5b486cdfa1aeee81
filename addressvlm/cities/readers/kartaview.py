"""KartaView (OpenStreetCam): records of its API, versions 1 and 2, as JSON or JSONL.

Photos are found below city.photos by their `name`, their id, or `<sequence>_<index>`.
"""

from collections.abc import Iterator

from addressvlm.cities.readers.rows import text
from addressvlm.cities.readers.source import Sample, photos_by_stem, stem, where
from addressvlm.cities.readers.table import Row, open_table
from addressvlm.config_city import CityConfig

SEQUENCE = ("sequenceid", "sequence_id")
INDEX = ("sequenceindex", "sequence_index")
TELLING = frozenset((*INDEX, "shotdate", "shot_date", "matchlat", "match_lat", "fileurlproc", "lth_name"))
PROJECTIONS = ("projection", "imagepartprojection")


class KartaView:
    """One row per photo."""

    def recognizes(self, sample: Sample) -> bool:
        """Records with a position and a field that only this API has."""
        return {"lat", "lon"} <= sample.columns and bool(sample.columns & TELLING)

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Positions as measured, before they were matched to a road."""
        files = photos_by_stem(city)
        for cells in open_table(where(city)).rows:
            yield cells if "PROBLEM" in cells else from_record(cells, files)


def from_record(cells: Row, files: dict[str, str]) -> Row:
    """One photo; `files` are those there are, by name without ending."""
    identifier = _first(cells, ("id", "photo_id"))
    name = _first(cells, ("file", "name"))
    numbered = f"{_first(cells, SEQUENCE)}_{_first(cells, INDEX)}"
    known = next((files[s] for s in (stem(name), identifier, numbered) if s and s in files), None)
    fov_deg = cells.get("fieldofview")
    return {
        "id": identifier,
        "file": known or name or (f"{identifier}.jpg" if identifier else ""),
        "lat": cells.get("lat"),
        "lon": cells.get("lon"),
        "heading": _first(cells, ("heading", "headers")),
        "fov_deg": None if text(fov_deg) in ("0", "") else fov_deg,
        "panorama": _is_panorama(cells),
    }


def _is_panorama(cells: Row) -> bool | None:
    """None where the record does not say."""
    said = {text(cells.get(column)).upper() for column in PROJECTIONS} - {""}
    return "SPHERE" in said if said else None


def _first(cells: Row, columns: tuple[str, ...]) -> str:
    return next((text(cells[column]) for column in columns if text(cells.get(column))), "")
