"""Photos and exports as people have them, for tests of the readers."""

import json
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from addressvlm.config.city import CityConfig
from addressvlm.dataset import readers
from addressvlm.dataset.photos import Photo

GPS = ExifTags.GPS
ALMADA = {
    GPS.GPSLatitudeRef: "N",
    GPS.GPSLatitude: (38.0, 40.0, 30.0),
    GPS.GPSLongitudeRef: "W",
    GPS.GPSLongitude: (9.0, 9.5, 0.0),
}


def read(**settings: Any) -> tuple[list[Photo], list[dict[str, Any]]]:
    return readers.read(CityConfig(**settings))


def write_file(folder: Path, content: Any, name: str = "export.json") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder / name)


def photo(
    path: Path, gps: dict[int, Any] | None = None, size: tuple[int, int] = (40, 30), focal_mm: int = 27, turned: int = 1,
    **options: Any,
) -> None:  # fmt: skip
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"  # Pillow writes no EXIF into a PNG without a tag of the first level
    exif[ExifTags.Base.Orientation] = turned
    if gps is not None:
        exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FocalLengthIn35mmFilm] = focal_mm
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "gray").save(path, exif=exif, **options)
