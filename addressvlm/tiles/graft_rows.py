"""Rows of photos -> rows of grafted images with what can be said about them."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from addressvlm.config import TilesConfig
from addressvlm.errors import InputError
from addressvlm.grafting import encode_pair, graft_photo
from addressvlm.labels.facts import graft_facts
from addressvlm.storage.shards import Rows, ShardResult
from addressvlm.tiles.renderer import Tile, TileRenderer

KEPT_TILES = 128  # of the last places; a 336 px tile is 0.3 MB

Spot = tuple[float, float, str]


def graft_batch(streets: str | None, imagery: str | None, tiles: str, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> rows of GRAFTS, and rejects where there is no image, by a Grafter that the process keeps between calls.

    `tiles` is a TilesConfig as JSON.
    """
    good, rejects = [], []
    for row in _kept_grafter(streets, imagery, tiles).rows(photos):
        reason = row.pop("reason")
        if reason is None:
            good.append(row)
        else:
            rejects.append({"file": row["image"]["path"], "row": None, "id": row["id"], "reason": reason})
    return ShardResult({"train": good}, rejects)


def graft_photos_batch(streets: str | None, imagery: str | None, tiles: str, split: str, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> the same rows of the same split with the graft for their image, and rejects as `graft_batch`."""
    made = graft_batch(streets, imagery, tiles, photos)
    grafts = {row["id"]: row["image"] for row in made.tables["train"]}
    return ShardResult({split: [{**row, "image": grafts[row["id"]]} for row in photos if row["id"] in grafts]}, made.rejects)


@cache
def _kept_grafter(streets: str | None, imagery: str | None, tiles: str) -> "Grafter":
    return Grafter(streets, imagery, TilesConfig.model_validate_json(tiles))


class Grafter:
    """Grafts the photos of one city; a place's tile is drawn once."""

    def __init__(self, streets: str | None, imagery: str | None, config: TilesConfig) -> None:
        """Open the sources of the tiles.

        Raises:
            InputError: a file is missing or is not what it should be.
        """
        self.config = config
        self.renderer = TileRenderer(streets, imagery, config)
        self._tiles: OrderedDict[Spot, Tile | InputError] = OrderedDict()

    def rows(self, photos: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For each row of PHOTOS a row of GRAFTS with `reason` None, or with `reason` saying why there is no image."""
        for photo in photos:
            row = {key: photo[key] for key in ("id", "place", "street", "district")}
            try:
                yield {**row, **self._graft(photo), "reason": None}
            except InputError as error:
                path = photo["image"]["path"]
                yield {
                    **row,
                    "image": {"bytes": None, "path": path},
                    "tile": None,
                    "names": [],
                    "facts": "",
                    "reason": str(error),
                }

    def _graft(self, photo: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        tile = self._tile((photo["lat"], photo["lon"], photo["main_street"]))
        encoded, path, beneath = photo["image"]["bytes"], photo["image"]["path"], None
        if config.layout == "two":
            image, beneath, small = encode_pair(tile.image, encoded, config.jpeg_quality)
        else:
            image, small = graft_photo(tile.image, encoded, config.covered, config.jpeg_quality)
        facts = graft_facts(
            photo["street"],
            photo["district"],
            photo["lat"],
            photo["lon"],
            photo["heading"],
            small,
            tile,
            self.renderer.roads,
            config.covered,
            imagery=self.renderer.imagery is not None,
            main_street=photo["main_street"],
        )
        return {
            "image": {"bytes": image, "path": path},
            "tile": beneath and {"bytes": beneath, "path": None},
            "names": tile.names,
            "facts": facts.to_json(),
        }

    def _tile(self, spot: Spot) -> Tile:
        """The tile of a spot, kept for the next photos there; so is the reason why there is none."""
        if spot not in self._tiles:
            try:
                self._tiles[spot] = self.renderer.tile(*spot)
            except InputError as error:
                self._tiles[spot] = error
            if len(self._tiles) > KEPT_TILES:
                self._tiles.popitem(last=False)
        self._tiles.move_to_end(spot)
        tile = self._tiles[spot]
        if isinstance(tile, InputError):
            raise tile
        return tile
