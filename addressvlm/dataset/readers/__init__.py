"""Readers of the photos of a city: a table, a folder with GPS in its files or positions in its names, others' exports."""

from typing import Any

from addressvlm.config.city import CityConfig
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.readers.base import (
    Manifest,
    PhotoFiles,
    Reader,
    SourceSample,
    photos_folder,
    sample_source,
    source_path,
)
from addressvlm.dataset.readers.exif import Exif
from addressvlm.dataset.readers.exports import Ial, KartaView, Mapillary
from addressvlm.dataset.readers.file_names import Pitts, SfXl
from addressvlm.dataset.readers.rows import COLUMNS, to_photos
from addressvlm.errors import InputError
from addressvlm.storage.remote_path import filesystem, is_remote

__all__ = ["READERS", "Reader", "photos_folder", "read", "recognize", "source_path"]

READERS: dict[str, Reader] = {  # `auto` takes the first that recognizes the source
    "mapillary": Mapillary(),
    "kartaview": KartaView(),
    "ial": Ial(),
    "pitts": Pitts(),
    "sfxl": SfXl(),
    "manifest": Manifest(),
    "exif": Exif(),
}


def read(city: CityConfig) -> tuple[list[Photo], list[dict[str, Any]]]:
    """The good photos, and the bad rows as rows of `tables.REJECTS`; both in the order of the source.

    Prints which reader it takes, and which columns of a manifest have no meaning here.

    Raises:
        InputError: there is no such source, it is not of the kind that `city.reader` says, or it has no rows.
    """
    folder, source = photos_folder(city), source_path(city)
    if is_remote(folder):
        filesystem(folder)  # a missing package is one error here instead of one per photo
    name: str = city.reader
    if name == "auto":
        sample = sample_source(city)
        name = recognize(city, sample)
        ignored = ", ".join(sorted(sample.columns - COLUMNS - {""})) if name == "manifest" else ""
        print(f"prepare: {source} is read by {name}" + (f"; its columns {ignored} are not used" if ignored else ""), flush=True)
    photos, rejects = to_photos(READERS[name].rows(city), city.panorama, PhotoFiles(folder).find)
    if not photos and not rejects:
        raise InputError(f"the manifest {source} has no rows: it needs one per photo, with the columns file, lat, lon.")
    return photos, rejects


def recognize(city: CityConfig, sample: SourceSample | None = None) -> str:
    """The name of the reader for this city's source, by a first look at it."""
    sample = sample or sample_source(city)
    return next(name for name, reader in READERS.items() if reader.recognizes(sample))
