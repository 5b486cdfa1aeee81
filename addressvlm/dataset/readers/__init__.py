"""Photos of a city from what people have: a table, a folder with GPS in the files, names that tell, others' exports."""

from typing import Any

from addressvlm.config.city import CityConfig
from addressvlm.dataset.photos import Photo
from addressvlm.dataset.readers.base import Manifest, Reader, base, peek_source, source_path
from addressvlm.dataset.readers.exif import Exif
from addressvlm.dataset.readers.file_names import Pitts, SfXl
from addressvlm.dataset.readers.ial import Ial
from addressvlm.dataset.readers.kartaview import KartaView
from addressvlm.dataset.readers.mapillary import Mapillary
from addressvlm.dataset.readers.table import to_photos
from addressvlm.errors import InputError
from addressvlm.storage import remote_path

__all__ = ["READERS", "Reader", "base", "read", "recognize", "source_path"]

READERS: dict[str, Reader] = {  # in the order in which `auto` asks them
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

    Raises:
        InputError: there is no such source, it is not of the kind that `city.reader` says, or it has no rows.
    """
    if remote_path.is_remote(base(city)):
        remote_path.filesystem(base(city))  # a missing package is told here rather than by every photo
    reader = READERS[recognize(city) if city.reader == "auto" else city.reader]
    photos, rejects = to_photos(reader.rows(city), city.panorama)
    if not photos and not rejects:
        raise InputError(
            f"the manifest {source_path(city)} has no rows: it needs one per photo, with the columns file, lat, lon."
        )
    return photos, rejects


def recognize(city: CityConfig) -> str:
    """The name of the reader for this city's source.

    Raises:
        InputError: there is no such source, or it is no table and no folder.
    """
    seen = peek_source(city)
    return next(name for name, reader in READERS.items() if reader.recognizes(seen))
