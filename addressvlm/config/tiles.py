"""The section `tiles` of the configuration: the map tile of a place and how the photo is grafted onto it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from addressvlm.config.city import Section


class TilesConfig(Section):
    """The tile of a place, and the photo grafted onto it (paper 001, Sec. 3.2)."""

    # GeoTIFF or COG, .mbtiles, .pmtiles or an XYZ address like https://host/{z}/{x}/{y}.png; null: a street map is rendered;
    # `none`: the same for a toy city, which has imagery
    imagery: str | None = None
    zoom: int | None = Field(None, ge=0, le=23)  # of XYZ imagery; default: the first as fine as the tile's pixels
    cache: str | None = None  # folder of downloaded XYZ tiles; default: <storage>/tile-cache
    per_second: float = Field(4.0, gt=0)  # requests per second to an XYZ server, all workers together
    user_agent: str = "addressvlm (set tiles.user_agent to your contact)"  # tile servers ask for a contact
    attribution: str | None = None  # of the imagery; written into the dataset's card
    side_m: float = Field(200.0, gt=0, le=4000)  # side of the square of ground, in metres
    pixels: int = Field(336, ge=32, le=2048)  # side of the tile and of the grafted image, in pixels
    names: bool = True  # write street names (off: paper 001, Table 2, "w/o road")
    font_px: float = Field(13.0, gt=0)  # height of the street names, in tile pixels
    font: str | None = None  # TTF or OTF file for names in scripts that DejaVu Sans Bold lacks (Japanese, Thai, Devanagari …)
    # graft: the photo in the tile's corner. For comparison, beside: both in one image, each at half its width; two: the photo
    # and the tile as two images of a conversation
    layout: Literal["graft", "beside", "two"] = "graft"
    delta: float = Field(0.5, gt=0, lt=1)  # longer side of the pasted photo / side of the tile; above 0.5 it covers the place
    jpeg_quality: int = Field(92, ge=30, le=100)

    @property
    def covered(self) -> float:
        """Share of the tile's side that the photo covers, in its upper right corner."""
        return self.delta if self.layout == "graft" else 0.0
