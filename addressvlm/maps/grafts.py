"""Rows of photos -> rows of grafted images with what can be said about them."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from addressvlm.config import TilesConfig
from addressvlm.errors import InputError
from addressvlm.grafting import decode_photo, encode, graft
from addressvlm.labels.facts import facts_of
from addressvlm.maps.tiles import Tile, TileRenderer

KEPT_TILES = 128  # of the last places; a 336 px tile is 0.3 MB

Spot = tuple[float, float, str]


def graft_rows(
    streets: str | None, imagery: str | None, tiles: str, photos: Iterable[dict[str, Any]], language: str | None = None
) -> list[dict[str, Any]]:
    """`Grafter.rows` with a Grafter that the process keeps between calls; `tiles` is a TilesConfig as JSON."""
    return list(_kept_grafter(streets, imagery, tiles, language).rows(photos))


@cache
def _kept_grafter(streets: str | None, imagery: str | None, tiles: str, language: str | None) -> "Grafter":
    return Grafter(streets, imagery, TilesConfig.model_validate_json(tiles), language)


class Grafter:
    """Grafts the photos of one city; a place's tile is drawn once."""

    def __init__(self, streets: str | None, imagery: str | None, config: TilesConfig, language: str | None = None) -> None:
        """Open the sources of the tiles; `language` as in `TileRenderer`.

        Raises:
            InputError: a file is missing or is not what it should be.
        """
        self.config = config
        self.renderer = TileRenderer(streets, imagery, config, language)
        self._tiles: OrderedDict[Spot, Tile | InputError] = OrderedDict()

    def rows(self, photos: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For each row of PHOTOS a row of GRAFTS with `reason` None, or with `reason` saying why there is no image."""
        for photo in photos:
            row = {key: photo[key] for key in ("id", "place", "street", "district")}
            try:
                yield {**row, **self._graft(photo), "reason": None}
            except InputError as error:
                path = photo["image"]["path"]
                yield {**row, "image": {"bytes": None, "path": path}, "names": [], "facts": "", "reason": str(error)}

    def _graft(self, photo: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        tile = self._tile((photo["lat"], photo["lon"], photo["street"]))
        small = decode_photo(photo["image"]["bytes"], round(config.delta * config.pixels))
        facts = facts_of(
            photo["street"],
            photo["district"],
            photo["lat"],
            photo["lon"],
            photo["heading"],
            small,
            tile,
            self.renderer.roads,
            config.delta,
            imagery=self.renderer.imagery is not None,
        )
        image = encode(graft(tile.image, small, config.delta), config.jpeg_quality)
        return {
            "image": {"bytes": image, "path": photo["image"]["path"]},
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
