"""KartaView (OpenStreetCam): records of its API, versions 1 and 2, as JSON or JSONL.

Photos are found below city.photos by their `name`, their id, or `<sequence>_<index>`.
"""

from collections.abc import Iterator

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import SourceSample, photos_by_stem, source_path, stem
from addressvlm.dataset.readers.table import Row, clean_text, open_table

SEQUENCE = ("sequenceid", "sequence_id")
INDEX = ("sequenceindex", "sequence_index")
TELLING = frozenset((*INDEX, "shotdate", "shot_date", "matchlat", "match_lat", "fileurlproc", "lth_name"))
PROJECTIONS = ("projection", "imagepartprojection")


class KartaView:
    """One row per photo."""

    def recognizes(self, sample: SourceSample) -> bool:
        """Records with a position and a field that only this API has."""
        return {"lat", "lon"} <= sample.columns and bool(sample.columns & TELLING)

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Positions as measured, before they were matched to a road."""
        files = photos_by_stem(city)
        for cells in open_table(source_path(city)).rows:
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
        "fov_deg": None if clean_text(fov_deg) in ("0", "") else fov_deg,
        "panorama": _is_panorama(cells),
    }


def _is_panorama(cells: Row) -> bool | None:
    """None where the record does not say."""
    said = {clean_text(cells.get(column)).upper() for column in PROJECTIONS} - {""}
    return "SPHERE" in said if said else None


def _first(cells: Row, columns: tuple[str, ...]) -> str:
    return next((clean_text(cells[column]) for column in columns if clean_text(cells.get(column))), "")
