"""Tables that others publish: Image Address Localization annotations, Mapillary and KartaView."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, ClassVar

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import PhotoFiles, SourceSample, photos_folder, source_path
from addressvlm.dataset.readers.file_names import parse_file_name
from addressvlm.dataset.readers.rows import Row, clean_text
from addressvlm.dataset.readers.table import open_table
from addressvlm.gazetteer.names import split_names
from addressvlm.storage.remote_path import join, path_of


def _first(cells: Row, columns: tuple[str, ...]) -> Any:
    """The first of these cells that is not empty."""
    return next((cells[c] for c in columns if clean_text(cells.get(c))), None)


class Ial:
    """Annotations of paper 002 (Sec. 5.1 and A.2), one row per image: position, street, neighbourhood, cross streets.

    JSON (a list of records, or file name -> record), JSONL, CSV or Parquet. Columns may be called by any of the names below;
    a position may stand in one column, or in the photo's name as SF-XL writes it. The sub-street is the main street plus the
    one or two streets that bound it.
    """

    CROSS_STREETS = ("cross_streets", "cross_street", "cross", "intersections", "intersecting_streets", "between")
    ADDRESS: ClassVar = {
        "street": ("street", "main_street", "mainstreet", "road", "route"),
        "district": ("district", "neighborhood", "neighbourhood", "area"),
        "sub_street": ("sub_street", "substreet"),
    }
    POSITION = ("gps", "coordinates", "coordinate", "location", "latlon", "lat_lon", "geometry")
    PHOTO = ("file", "id", "place", "lat", "lon", "heading", "fov_deg", "panorama", "block", "split")
    UNIQUE = frozenset(("neighborhood", "neighbourhood", "main_street", *CROSS_STREETS))  # no other table has these
    SEPARATOR = re.compile(r"[&;|,]|(?<=\s)and(?=\s)")

    def recognizes(self, sample: SourceSample) -> bool:
        """A table with a column that only such annotations have, unless it is a manifest without it."""
        return bool(sample.columns & self.UNIQUE) and not {"file", "lat", "lon", "district"} <= sample.columns

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Address and position as annotated."""
        table = open_table(source_path(city))
        table.require(("file",))
        yield from table.read_as(self.parse)

    def parse(self, cells: Row) -> Row:
        """One annotation under the names of `Photo`."""
        if isinstance(cells.get("address"), dict):
            cells = cells | {str(key).lower(): value for key, value in cells["address"].items()}
        row: Row = {column: cells[column] for column in self.PHOTO if column in cells}
        if "lat" not in row or "lon" not in row:
            row |= _position(_first(cells, self.POSITION))
        if "lat" not in row and "@" in clean_text(cells.get("file")):
            row = parse_file_name(clean_text(cells["file"])) | row
        row |= {column: _first(cells, names) for column, names in self.ADDRESS.items()}
        streets = split_names(row["street"])
        if streets and row["sub_street"] is None:
            value = _first(cells, self.CROSS_STREETS)
            names = value if isinstance(value, (list, tuple)) else self.SEPARATOR.split(clean_text(value))
            row["sub_street"] = sub_street(streets[0], [text for name in names if (text := clean_text(name))])
        return row


def sub_street(street: str, bounds: list[str]) -> str:
    """The name of the part of a street between one or two cross streets, "" without any."""
    bounds = list(dict.fromkeys(bounds))
    if len(bounds) < 2:
        return f"{street} from {bounds[0]} on" if bounds else ""
    first, last = sorted((bounds[0], bounds[-1]))
    return f"{street} between {first} and {last}"


def _position(value: Any) -> Row:
    """Latitude and longitude from [lat, lon], "lat, lon", {lat, lng} or a GeoJSON point (which has longitude first)."""
    if isinstance(value, dict):
        if isinstance(value.get("coordinates"), (list, tuple)):
            return _position(list(value["coordinates"])[1::-1])
        lower = {str(key).lower(): number for key, number in value.items()}
        lat, lon = _first(lower, ("lat", "latitude")), _first(lower, ("lon", "lng", "longitude"))
        return {} if lat is None or lon is None else {"lat": lat, "lon": lon}
    if isinstance(value, (list, tuple)):
        return {"lat": value[0], "lon": value[1]} if len(value) >= 2 else {}
    parts = re.split(r"[,;\s]+", clean_text(value).strip("()[] "))
    return {"lat": parts[0], "lon": parts[1]} if len(parts) == 2 else {}  # of four, each may be half of a number


class KartaView:
    """Records of KartaView's API (OpenStreetCam), versions 1 and 2, as JSON or JSONL, one row per photo.

    Photos are looked up below city.photos by their `name`, their id, or `<sequence>_<index>`.
    """

    # no other table has these
    UNIQUE = frozenset("sequenceindex sequence_index shotdate shot_date matchlat match_lat fileurlproc lth_name".split())

    def recognizes(self, sample: SourceSample) -> bool:
        """Records with a position and a field that only this API has; it has no column `file`."""
        return {"lat", "lon"} <= sample.columns and "file" not in sample.columns and bool(sample.columns & self.UNIQUE)

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Positions as measured, before they were matched to a road."""
        files = PhotoFiles(photos_folder(city))
        yield from open_table(source_path(city)).read_as(lambda cells: self.parse(cells, files))

    def parse(self, cells: Row, files: PhotoFiles) -> Row:
        """One photo."""
        identifier, name = (clean_text(_first(cells, columns)) for columns in (("id", "photo_id"), ("file", "name")))
        sequence, index = (clean_text(_first(cells, (f"sequence{end}", f"sequence_{end}"))) for end in ("id", "index"))
        stems = (PurePosixPath(name).stem, identifier, f"{sequence}_{index}")
        fov_deg = cells.get("fieldofview")
        projections = {clean_text(cells.get(column)).upper() for column in ("projection", "imagepartprojection")} - {""}
        return {
            "id": identifier,
            "file": next(filter(None, map(files.by_stem, stems)), None) or name or (f"{identifier}.jpg" if identifier else ""),
            "lat": cells.get("lat"),
            "lon": cells.get("lon"),
            "heading": _first(cells, ("heading", "headers")),
            "fov_deg": None if clean_text(fov_deg) == "0" else fov_deg,
            "panorama": "SPHERE" in projections if projections else None,
        }


class Mapillary:
    """Records of Mapillary's Graph API (JSON, JSONL, GeoJSON), or the description that mapillary_tools writes.

    Photos are named by their id, `<id>.jpg`, anywhere below city.photos.
    """

    DESCRIPTION = "mapillary_image_description.json"
    UNIQUE = frozenset(
        "captured_at compass_angle computed_compass_angle computed_geometry camera_type is_pano sequence_id sfm_cluster".split()
    )  # no other table has these

    def recognizes(self, sample: SourceSample) -> bool:
        """The tools' description, or records with a geometry and a field of the API."""
        if sample.is_folder:
            return self.DESCRIPTION in sample.files
        has_geometry = bool(sample.columns & {"geometry", "computed_geometry"})
        return "maplatitude" in sample.columns or (has_geometry and bool(sample.columns & self.UNIQUE))

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Positions and headings as reconstructed where Mapillary could, else as measured."""
        source = source_path(city)
        if path_of(source).is_dir():
            source = join(source, self.DESCRIPTION)
        files = PhotoFiles(photos_folder(city))

        def parse(cells: Row) -> Row:
            described = cells.keys() & {"maplatitude", "filetype", "error"}
            return self.parse_description(cells, files) if described else self.parse_record(cells, files)

        yield from open_table(source).read_as(parse)

    def parse_record(self, cells: Row, files: PhotoFiles) -> Row:
        """One image of the Graph API."""
        identifier = clean_text(cells.get("id"))
        points = (cells.get(column) for column in ("computed_geometry", "geometry"))
        position = next((p for p in map(_position, points) if p), {})
        heading, camera = cells.get("computed_compass_angle"), clean_text(cells.get("camera_type"))
        return {
            "id": identifier,
            "file": clean_text(cells.get("file")) or files.by_stem(identifier) or (f"{identifier}.jpg" if identifier else ""),
            **position,
            "heading": cells.get("compass_angle") if heading is None else heading,
            "panorama": camera in ("spherical", "equirectangular") if camera else cells.get("is_pano"),
        }

    def parse_description(self, cells: Row, files: PhotoFiles) -> Row:
        """One image of mapillary_tools, whose paths are absolute ones, maybe of another machine."""
        file = clean_text(cells.get("file"))
        try:
            file = files.look_up(file)
        except ValueError as twice:
            return {"file": file, "PROBLEM": str(twice)}
        if "error" in cells:
            error = cells["error"] if isinstance(cells["error"], dict) else {}
            return {"file": file, "PROBLEM": f"mapillary_tools could not use it: {clean_text(error.get('message'))}"}
        if clean_text(cells.get("filetype")) not in ("", "image"):
            return {"file": file, "PROBLEM": f"not a photo: mapillary_tools calls it {clean_text(cells['filetype'])}"}
        compass = cells.get("mapcompassheading")
        heading = compass.get("TrueHeading") if isinstance(compass, dict) else None
        return {"file": file, "lat": cells.get("maplatitude"), "lon": cells.get("maplongitude"), "heading": heading}
