"""Mapillary: records of its Graph API (JSON, JSONL, GeoJSON) or `mapillary_image_description.json` of mapillary_tools.

Photos are named by their id, `<id>.jpg`, anywhere below city.photos.
"""

from collections.abc import Iterator
from typing import Any

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import SourceSample, photos_by_stem, source_path, stem
from addressvlm.dataset.readers.table import Row, clean_text, open_table
from addressvlm.storage import remote_path

DESCRIPTION = "mapillary_image_description.json"
TELLING = frozenset(
    "captured_at compass_angle computed_compass_angle computed_geometry camera_type is_pano sequence_id sfm_cluster".split()
)
ROUND = ("spherical", "equirectangular")  # camera types of panoramas


class Mapillary:
    """One row per image."""

    def recognizes(self, sample: SourceSample) -> bool:
        """The tools' description, or records with a geometry and a field of the API."""
        if sample.is_folder:
            return DESCRIPTION in sample.files
        return "maplatitude" in sample.columns or (
            bool(sample.columns & {"geometry", "computed_geometry"}) and bool(sample.columns & TELLING)
        )

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Positions and headings as reconstructed where Mapillary could, else as measured."""
        source = source_path(city)
        if remote_path.path_of(source).is_dir():
            source = remote_path.join(source, DESCRIPTION)
        files = photos_by_stem(city)
        for cells in open_table(source).rows:
            if "PROBLEM" in cells:
                yield cells
            elif cells.keys() & {"maplatitude", "filetype", "error"}:
                yield from_description(cells, files)
            else:
                yield from_record(cells, files)


def from_record(cells: Row, files: dict[str, str]) -> Row:
    """One image of the Graph API; `files` are the photos there are, by name without ending."""
    identifier = clean_text(cells.get("id"))
    lon, lat = _coordinates(cells.get("computed_geometry")) or _coordinates(cells.get("geometry")) or (None, None)
    heading = cells.get("computed_compass_angle")
    return {
        "id": identifier,
        "file": clean_text(cells.get("file")) or files.get(identifier) or (f"{identifier}.jpg" if identifier else ""),
        "lat": lat,
        "lon": lon,
        "heading": cells.get("compass_angle") if heading is None else heading,
        "panorama": _is_panorama(cells),
    }


def from_description(cells: Row, files: dict[str, str]) -> Row:
    """One image of mapillary_tools; it writes absolute paths of the machine it ran on, so the name is what counts."""
    written = clean_text(cells.get("file"))
    file = files.get(stem(written), written)
    if "error" in cells:
        error = cells["error"] if isinstance(cells["error"], dict) else {}
        return {"file": file, "PROBLEM": f"mapillary_tools could not use it: {clean_text(error.get('message'))}"}
    if clean_text(cells.get("filetype")) not in ("", "image"):
        return {"file": file, "PROBLEM": f"not a photo: mapillary_tools calls it {clean_text(cells['filetype'])}"}
    compass = cells.get("mapcompassheading")
    heading = compass.get("TrueHeading") if isinstance(compass, dict) else None
    return {"file": file, "lat": cells.get("maplatitude"), "lon": cells.get("maplongitude"), "heading": heading}


def _coordinates(geometry: Any) -> tuple[Any, Any] | None:
    """Longitude and latitude of a GeoJSON point."""
    found = geometry.get("coordinates") if isinstance(geometry, dict) else None
    return (found[0], found[1]) if isinstance(found, (list, tuple)) and len(found) >= 2 else None


def _is_panorama(cells: Row) -> bool | None:
    """None where the record does not say."""
    if clean_text(cells.get("camera_type")):
        return clean_text(cells["camera_type"]) in ROUND
    return cells.get("is_pano")
