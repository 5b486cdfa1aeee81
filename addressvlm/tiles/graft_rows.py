"""Turn rows of photos into rows of grafted images with the facts about them."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from addressvlm.config.city import TilesConfig
from addressvlm.errors import InputError
from addressvlm.grafting import encode_pair, graft_photo
from addressvlm.labels.facts import graft_facts
from addressvlm.storage.shards import Rows, ShardResult
from addressvlm.tiles.renderer import Tile, TileRenderer

CACHED_TILES = 128  # of the last places; a 336 px tile is 0.3 MB

Place = tuple[float, float, str]  # lat, lon, street


def graft_batch(streets: str | None, imagery: str | None, tiles: str, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> rows of GRAFTS, and rejects for photos without a graft.

    `tiles` is a TilesConfig as JSON. The process keeps its Grafter for the next call.
    """
    grafts, rejects = [], []
    for row in _cached_grafter(streets, imagery, tiles).graft_rows(photos):
        reason = row.pop("reason")
        if reason is None:
            grafts.append(row)
        else:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": reason})
    return ShardResult({"train": grafts}, rejects)


def graft_photos_batch(streets: str | None, imagery: str | None, tiles: str, split: str, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> the same rows of a split with the graft as their image, and rejects as `graft_batch`."""
    result = graft_batch(streets, imagery, tiles, photos)
    images = {row["id"]: row["image"] for row in result.tables["train"]}
    return ShardResult({split: [{**row, "image": images[row["id"]]} for row in photos if row["id"] in images]}, result.rejects)


@cache
def _cached_grafter(streets: str | None, imagery: str | None, tiles: str) -> "Grafter":
    return Grafter(streets, imagery, TilesConfig.model_validate_json(tiles))


class Grafter:
    """Grafts the photos of one city; the photos of a place share one tile."""

    def __init__(self, streets: str | None, imagery: str | None, config: TilesConfig) -> None:
        """Open the sources of the tiles.

        Raises:
            InputError: a file is missing or invalid.
        """
        self.config = config
        self.renderer = TileRenderer(streets, imagery, config)
        self._tiles: OrderedDict[Place, Tile | InputError] = OrderedDict()

    def graft_rows(self, photos: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For each row of PHOTOS a row of GRAFTS; its `reason` is None, or says why there is no image."""
        for photo in photos:
            row = {key: photo[key] for key in ("id", "place", "street", "district")}
            try:
                yield {**row, **self._graft(photo), "reason": None}
            except InputError as error:
                image = {"bytes": None, "path": photo["image"]["path"]}
                yield {**row, "image": image, "tile": None, "names": [], "facts": "", "reason": str(error)}

    def _graft(self, photo: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        tile = self._tile((photo["lat"], photo["lon"], photo["main_street"]))
        encoded, path, encoded_tile = photo["image"]["bytes"], photo["image"]["path"], None
        if config.layout == "two":
            image, encoded_tile, decoded = encode_pair(tile.image, encoded, config.jpeg_quality)
        else:
            image, decoded = graft_photo(tile.image, encoded, config.covered, config.jpeg_quality)
        facts = graft_facts(
            photo["street"], photo["district"], photo["lat"], photo["lon"], photo["heading"], decoded, tile,
            self.renderer.roads, config.covered, imagery=self.renderer.imagery is not None, main_street=photo["main_street"],
        )  # fmt: skip
        return {
            "image": {"bytes": image, "path": path},
            "tile": encoded_tile and {"bytes": encoded_tile, "path": None},
            "names": tile.names,
            "facts": facts.to_json(),
        }

    def _tile(self, place: Place) -> Tile:
        """The tile of a place, or the error why there is none, from a cache of the last places."""
        if place not in self._tiles:
            try:
                self._tiles[place] = self.renderer.tile(*place)
            except InputError as error:
                self._tiles[place] = error
            if len(self._tiles) > CACHED_TILES:
                self._tiles.popitem(last=False)
        self._tiles.move_to_end(place)
        tile = self._tiles[place]
        if isinstance(tile, InputError):
            raise tile
        return tile
