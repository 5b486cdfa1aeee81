"""Photos to try on the page, of places that training never saw: the test split of the run that the model is from."""

from functools import cached_property

from addressvlm.storage.remote_path import AnyPath, list_files
from addressvlm.storage.tables import iter_rows

MAX_SAMPLES = 6
MAX_ROWS = 200  # that are looked at
MAX_BYTES = 1_000_000  # of a photo


class SamplePhotos:
    """A city's sample photos, one of each street, read on first use.

    Args:
        folder: of the model, `<run>/models/<system>/merged` or `…/adapter`, or the run's `photos`.
    """

    def __init__(self, folder: AnyPath) -> None:
        self.folder = folder

    @cached_property
    def photos(self) -> list[bytes]:
        """JPEGs; none where the run's photos are not beside the model."""
        parents = list(self.folder.parents)[:3]
        for folder in (self.folder, *(parent / "photos" for parent in parents)):
            if list_files(folder, "test-*.parquet"):
                return self._first_of_each_street(folder)
        return []

    def _first_of_each_street(self, folder: AnyPath) -> list[bytes]:
        photos: dict[str, bytes] = {}
        for number, row in enumerate(iter_rows(folder, "test", ["street", "image"])):
            if number == MAX_ROWS or len(photos) == MAX_SAMPLES:
                break
            data = (row["image"] or {}).get("bytes") or b""
            if data.startswith(b"\xff\xd8") and len(data) <= MAX_BYTES:
                photos.setdefault(row["street"], data)
        return list(photos.values())
