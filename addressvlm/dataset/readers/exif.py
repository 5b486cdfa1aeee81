"""A folder of photos with their position in EXIF, as phones and cameras write it; pixels are not decoded."""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from PIL import ExifTags, Image

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.base import SourceSample, list_photos, source_path
from addressvlm.dataset.readers.rows import Row
from addressvlm.errors import InputError
from addressvlm.pictures import name_of_kind, orientation
from addressvlm.storage import remote_path

GPS = ExifTags.GPS
HEMISPHERES = {"N": 1, "S": -1, "E": 1, "W": -1}
CHUNK, THREADS = 1024, 16  # reading waits for the disk or the store
OTHER_DATUM = re.compile(r"TOKYO|NAD.?27|ED.?50|OSGB|PULKOVO|GCJ|BD.?09")  # 100 m and more away from WGS84
FILM_DIAGONAL_MM = 43.27  # a 35 mm equivalent focal length compares diagonals
PANORAMA = re.compile(rb"GPano:ProjectionType\W+equirectangular\b")
PANORAMA_HEADING = re.compile(rb"GPano:PoseHeadingDegrees[^-+\d]{1,3}(\d+\.?\d*)")


class Exif:
    """One row per photo, in the order of their paths; a place is where photos share a position to about a metre."""

    def recognizes(self, sample: SourceSample) -> bool:
        """Any folder."""
        return sample.is_folder

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """Position, direction and field of view; directions from magnetic north are used as they are, with a notice."""
        folder = source_path(city)
        files = list_photos(folder)
        magnetic = 0
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(files), CHUNK):
                chunk = files[start : start + CHUNK]
                rows = pool.map(read_gps, [remote_path.join(folder, file) for file in chunk])
                for file, cells in zip(chunk, rows, strict=True):
                    magnetic += cells.pop("magnetic", False)
                    yield {"file": file} | cells
        if magnetic:
            print(f"prepare: {magnetic:,} directions are from magnetic north and used as they are", flush=True)


def read_gps(file: str) -> Row:
    """Cells lat, lon, heading, fov_deg, panorama, magnetic of one photo (path or URI), or its `PROBLEM`."""
    try:
        with remote_path.path_of(file).open("rb") as stream:
            kind = name_of_kind(stream.read(64))
            stream.seek(0)
            with Image.open(stream) as image:
                exif, turned, xmp = image.getexif(), orientation(image) >= 5, image.info.get("xmp", b"")
                width, height = image.size[::-1] if turned else image.size  # of the upright picture
                gps, camera = exif.get_ifd(ExifTags.IFD.GPSInfo), {}
                with suppress(Exception):  # not worth a photo
                    camera = exif.get_ifd(ExifTags.IFD.Exif)
    except InputError as error:
        return {"PROBLEM": f"photo unreadable: {error}"}
    except OSError as error:  # Pillow raises one for a file that is no picture
        if isinstance(error, Image.UnidentifiedImageError):
            return {"PROBLEM": f"not a photo: {file} is {kind or 'not a picture'}"}
        return {"PROBLEM": f"photo unreadable: {remote_path.error_text(error)}"}
    except Exception as error:  # decoders raise anything on arbitrary bytes
        return {"PROBLEM": f"EXIF damaged: {file} ({error})"}
    try:
        if _text(gps.get(GPS.GPSStatus)).startswith("V"):
            raise ValueError("no GPS: EXIF calls the position void (status V)")
        if OTHER_DATUM.search(_text(gps.get(GPS.GPSMapDatum))):
            raise ValueError(f"GPS datum: the position is in {_text(gps[GPS.GPSMapDatum])}, not in WGS84")
        cells: Row = {
            "lat": _degrees(gps, GPS.GPSLatitude, GPS.GPSLatitudeRef, "NS"),
            "lon": _degrees(gps, GPS.GPSLongitude, GPS.GPSLongitudeRef, "EW"),
        }
    except ValueError as error:
        return {"PROBLEM": str(error)}
    heading = _number(gps.get(GPS.GPSImgDirection))
    if heading is not None:
        cells |= {"heading": heading, "magnetic": _text(gps.get(GPS.GPSImgDirectionRef)).startswith("M")}
    if isinstance(xmp, bytes) and PANORAMA.search(xmp):
        pose = PANORAMA_HEADING.search(xmp)
        return cells | {"panorama": True} | ({"heading": float(pose[1]), "magnetic": False} if pose else {})
    focal_mm = _number(camera.get(ExifTags.Base.FocalLengthIn35mmFilm))
    if focal_mm is not None and focal_mm > 0:
        half_width_mm = FILM_DIAGONAL_MM / 2 * width / math.hypot(width, height)
        cells["fov_deg"] = math.degrees(2 * math.atan(half_width_mm / focal_mm))
    return cells


def _degrees(gps: dict[int, Any], tag: int, reference: int, letters: str) -> float:
    """Degrees, minutes, seconds and a letter as signed degrees; ValueError if they are missing or wrong."""
    name = GPS(tag).name.removeprefix("GPS").lower()
    if tag not in gps:
        raise ValueError(f"no GPS: EXIF holds no {name}")
    parts = gps[tag] if isinstance(gps[tag], tuple) else (gps[tag],)
    values = [_number(part) for part in parts]
    if not 1 <= len(values) <= 3 or any(value is None or value < 0 for value in values):
        raise ValueError(f"GPS damaged: the {name} in EXIF is {parts}")
    for unit, value in zip(("minutes", "seconds"), values[1:], strict=False):
        if value is not None and value >= 60:
            raise ValueError(f"GPS damaged: the {name} in EXIF has {value:g} {unit}")
    letter = _text(gps.get(reference))[:1]
    if letter not in letters or not letter:
        raise ValueError(f"GPS damaged: EXIF does not say whether the {name} is {' or '.join(letters)}")
    return HEMISPHERES[letter] * sum(value / 60**i for i, value in enumerate(values) if value is not None)


def _number(value: Any) -> float | None:
    """A rational as a finite number, None if it is none (cameras write 0/0 for unknown)."""
    try:
        result = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return result if math.isfinite(result) else None


def _text(value: Any) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
    return text.strip("\0 ").upper()
