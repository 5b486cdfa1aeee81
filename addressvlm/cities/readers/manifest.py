"""A table with one row per photo: file, lat and lon, and as many of `Photo`'s other fields as are known."""

from collections.abc import Iterator

from addressvlm.cities.readers.source import Sample, where
from addressvlm.cities.readers.table import Row, open_table
from addressvlm.config_city import CityConfig

REQUIRED = ("file", "lat", "lon")


class Manifest:
    """CSV, TSV, JSONL, Parquet or JSON, here or in a store."""

    def recognizes(self, sample: Sample) -> bool:
        """Any table that no other reader knows."""
        return not sample.is_folder

    def rows(self, city: CityConfig) -> Iterator[Row]:
        """The rows as they stand."""
        table = open_table(where(city))
        table.require(REQUIRED)
        yield from table.rows
