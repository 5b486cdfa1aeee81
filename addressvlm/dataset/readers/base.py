"""The source of a city's photos (a table or a folder), and the interface of its readers."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Protocol

from addressvlm.config.city import CityConfig
from addressvlm.dataset.readers.rows import Row, clean_text
from addressvlm.dataset.readers.table import open_table
from addressvlm.errors import InputError
from addressvlm.storage.remote_path import is_remote, join, path_of, walk_files

SUFFIXES = frozenset(".jpg .jpeg .jpe .png .webp .bmp .gif .tif .tiff .jp2 .avif .heic .heif".split())
SAMPLE_ROWS = 20


@dataclass(frozen=True)
class SourceSample:
    """A first look at a source, enough to recognize its kind."""

    is_folder: bool
    files: list[str]  # all of a folder; of a table the first cells of the column `file`
    columns: frozenset[str]  # of a table under our names; empty for a folder

    @property
    def photos(self) -> list[str]:
        """The first photos among the files."""
        return list(islice((f for f in self.files if not self.is_folder or is_photo(f)), SAMPLE_ROWS))


class Reader(Protocol):
    """One kind of source. A new one is such a class, entered in `readers.READERS` and `CityConfig.reader`."""

    def recognizes(self, sample: SourceSample) -> bool:
        """Whether the source is of this kind."""

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """The rows as `table.to_photos` takes them, one per photo and always in the same order.

        Raises:
            InputError: the source as a whole can't be used; a single bad row has a `PROBLEM` instead.
        """


class Manifest:
    """CSV, TSV, JSONL, Parquet or JSON, local or in a store."""

    def recognizes(self, sample: SourceSample) -> bool:
        """Any table that no other reader recognizes."""
        return not sample.is_folder

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """The rows as they stand."""
        table = open_table(source_path(city))
        table.require(("file", "lat", "lon"))
        yield from table.rows


def source_path(city: CityConfig) -> str:
    """The table or folder that the photos are read from; InputError if neither is set."""
    source = city.manifest or city.photos
    if not source:
        raise InputError(
            "city.manifest is not set: set it to the CSV, JSONL or Parquet table of your photos, set city.photos to a folder "
            "of photos with GPS in them, or set city.toy."
        )
    return source


def photos_folder(city: CityConfig) -> str:
    """The folder that photo files are relative to: a URI, or an absolute path, the same on all machines that share it."""
    folder = path_of(city.photos or source_path(city))
    return str((folder if city.photos or folder.is_dir() else folder.parent).absolute())


def sample_source(city: CityConfig) -> SourceSample:
    """Look at the source; InputError if there is none, or it is no folder and no table."""
    source = source_path(city)
    path = path_of(source)
    if not path.suffix and not path.exists():
        raise InputError(f"nothing is at {source}: set city.manifest to a table or city.photos to a folder that exists.")
    if path.is_dir():
        return SourceSample(True, walk_files(source), frozenset())
    table = open_table(source)
    files = [clean_text(row.get("file")) for row in islice(table.rows, SAMPLE_ROWS)]
    return SourceSample(False, [f for f in files if f], frozenset(table.columns))


def list_photos(folder: str) -> list[str]:
    """The photos below a folder, sorted; InputError if there is no such folder or no photo in it."""
    if not path_of(folder).is_dir():
        raise InputError(f"no folder at {folder}: set city.photos to the folder of your photos.")
    photos = [file for file in walk_files(folder) if is_photo(file)]
    if not photos:
        raise InputError(f"the folder {folder} has no photos ({', '.join(sorted(SUFFIXES))}): set city.photos to another one.")
    return photos


class PhotoFiles:
    """The photos below a folder, found by the names that tables from elsewhere give them.

    A name may have its accents in another composition than the file (as on a Mac), be a path of Windows, or an absolute path
    of another machine; of a path the last parts are looked for, the more the better.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._named: dict[str, str] = {}  # file -> the name that a table gave it, where the two differ

    def find(self, file: str) -> str:
        """The file as the folder has it; the name itself if it is there, is a URI, or nothing fits.

        Raises:
            ValueError: another name was found to be the same file.
        """
        elsewhere = "\\" in file or (file.startswith("/") and not is_remote(self._folder))
        if "://" in file or (file.isascii() and not elsewhere):
            return file
        if not is_remote(self._folder) and Path(join(self._folder, file)).exists():
            return file
        return self.look_up(file)

    def look_up(self, file: str) -> str:
        """`find` in the list of the folder's photos."""
        parts = unicodedata.normalize("NFC", file).replace("\\", "/").split("/")
        below = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((self._paths[path] for path in below if path in self._paths), self._names.get(parts[-1]))
        if found is not None and self._named.setdefault(found, file) != file:
            raise ValueError(f"one photo for two names: {found} is {self._named[found]} and {file}")
        return found or file

    def by_stem(self, stem: str) -> str | None:
        """The photo with this name before its ending, for exports that name photos by id."""
        return self._stems.get(unicodedata.normalize("NFC", stem))

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Path with composed accents -> path."""
        files = walk_files(self._folder) if path_of(self._folder).is_dir() else []
        return {unicodedata.normalize("NFC", file): file for file in files if is_photo(file)}

    @cached_property
    def _names(self) -> dict[str, str]:
        """Names without the folders that only one file has."""
        counts = Counter(PurePosixPath(path).name for path in self._paths)
        return {name: file for path, file in self._paths.items() if counts[name := PurePosixPath(path).name] == 1}

    @cached_property
    def _stems(self) -> dict[str, str]:
        return {PurePosixPath(path).stem: file for path, file in self._paths.items()}


def is_photo(file: str) -> bool:
    """Whether the name ends like that of a photo."""
    return PurePosixPath(file).suffix.lower() in SUFFIXES
