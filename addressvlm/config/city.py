"""The sections `city` and `tiles` of the configuration: photos, streets and addresses, and the map tile of a place."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from addressvlm.config.base import Section


class SplitShares(Section):
    """Shares of places (paper 001, Sec. 3.3: 7:2:1)."""

    train: float = Field(0.7, gt=0, lt=1)
    val: float = Field(0.2, ge=0, lt=1)
    test: float = Field(0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitShares:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, they are {self.train + self.val + self.test:g}")
        return self


class PanoramaConfig(Section):
    """How a panorama (equirectangular, 2:1) is cut into perspective views."""

    headings: list[float] = Field([0.0, 90.0, 180.0, 270.0], min_length=1)  # degrees clockwise from the panorama's own heading
    fov_deg: float = Field(90.0, gt=10, lt=150)  # horizontal field of view of a view
    pixels: int = Field(640, ge=64, le=4096)  # side of the square view


class GeocoderConfig(Section):
    """A reverse geocoder, queried for a sample of places; the rest take the answer of the nearest sampled one."""

    service: Literal["nominatim", "google"] = "nominatim"
    url: str | None = None  # default: the service's public address; your own Nominatim here
    share: float = Field(0.1, gt=0, le=1)  # of the places that are requested, drawn by seed
    per_second: float = Field(1.0, gt=0)  # Nominatim's public server allows one request a second
    timeout_s: float = Field(20.0, gt=0)
    retries: int = Field(4, ge=0)
    max_requests: int | None = Field(None, ge=1)  # at most so many requests a run (a paid service); cached answers are free
    user_agent: str = "addressvlm (set city.geocoder.user_agent to your contact)"
    cache: str | None = None  # SQLite file of answers, shared by all runs; default: <storage>/geocoder.sqlite


class PartitionConfig(Section):
    """Semantic address partition (paper 002, Sec. 4.1 and A.2): streets cut into sub-streets at intersections."""

    gap_m: float = Field(50.0, ge=0)  # an intersection nearer than this to the one before it is dropped
    min_places: int = Field(5, ge=1)  # sub-streets with fewer places are merged with a neighbour


class DensityConfig(Section):
    """How much of the training data is used (paper 001, Fig. 5); test places are never thinned."""

    blocks: float = Field(1.0, gt=0, le=1)  # share of the blocks with training places; the others have no photo at all
    places: float = Field(1.0, gt=0, le=1)  # share of training places
    views: float = Field(1.0, gt=0, le=1)  # share of the views of each training place, at least one


class CityConfig(Section):
    """Where a city comes from and how its photos get addresses."""

    name: str = "city"  # shown in the report and by the service
    toy: str | None = None  # name of an embedded toy city to generate first; the four paths below are then its files
    reader: Literal["auto", "manifest", "exif", "pitts", "sfxl", "ial", "mapillary", "kartaview"] = "auto"
    manifest: str | None = None  # table, annotation file or export that `reader` reads; a path or a URI (s3://, gs://)
    photos: str | None = None  # folder or URI that photo files are relative to; default: the manifest's own folder
    panorama: PanoramaConfig | None = None  # set it where photos are panoramas: each is cut into these views
    streets: str | None = None  # named lines: GeoJSON, shapefile, .osm.pbf, .osm or Overpass JSON
    districts: str | None = None  # the same kinds of file; may be the same OSM extract
    district_source: Literal["auto", "polygons", "admin", "place"] = "auto"  # what a district is in an OSM file
    admin_level: int | None = Field(None, ge=2, le=12)  # OSM admin boundaries of this level; default: the finest that covers
    unit: Literal["auto", "streets", "blocks"] = "auto"  # what an address names; auto: blocks where OSM's streets have no names
    encoding: str | None = None  # of names in shapefiles (cp1252, gbk, …); default: as the .cpg file says, else UTF-8
    language: str | None = None  # show `name:<language>` where OSM has it instead of `name`
    max_distance_m: float = Field(40.0, gt=0)  # a photo further than this from any named street is rejected
    # neighbours within this vote on a place's street (paper 002, A.2); 0: no vote
    neighbour_vote_radius_m: float = Field(0.0, ge=0)
    ambiguous_m: float = Field(15.0, ge=0)  # a second named street within this marks the address as ambiguous
    geocoder: GeocoderConfig | None = None  # an external one instead of the street map
    partition: PartitionConfig | None = None  # also name the sub-street of each place
    answer: Literal["street", "sub_street"] = "street"  # what questions mean by street; sub_street needs city.partition
    # blocks: stratified, with a buffer; random: place by place, as in the papers; table: the column `split` of the manifest
    split_method: Literal["blocks", "random", "table"] = "blocks"
    split_buffer_m: float = Field(25.0, ge=0)  # no training place is nearer than this to a test or validation place
    # places are split in blocks of this side, so that the buffer costs little; a column `block` of the manifest comes first
    split_block_m: float = Field(100.0, gt=0)
    split: SplitShares = SplitShares()
    density: DensityConfig = DensityConfig()
    rounds: int = Field(7, ge=1)  # questions about each training photo (paper 001: 7)
    # share of wrong names taken from the nearest ones, the others from anywhere
    hard_negative_share: float = Field(0.5, ge=0, le=1)
    max_megapixels: float = Field(100.0, gt=0)  # larger photos are rejected unread
    max_reject_share: float = Field(0.1, ge=0, le=1)  # the run stops when more rows than this are bad
    attribution: list[str] = []  # licences and sources of photos and maps; written into the dataset card
    license: str = "other"  # of the dataset, for its card: an identifier of the Hugging Face hub (cc-by-4.0, odbl, …)

    @model_validator(mode="after")
    def _require_partition(self) -> CityConfig:
        if self.answer == "sub_street" and self.partition is None:
            raise ValueError("answer is sub_street, so set city.partition (an empty {} takes its defaults)")
        return self


class MapRowsConfig(Section):
    """Training rows of what the map knows, without the photos of their places (ray_jobs/map_rows.py)."""

    spacing_m: float = Field(25.0, gt=0)  # between the points along a street
    named: float = Field(0.5, ge=0, le=1)  # share of tiles with names
    rounds: int = Field(3, ge=1)  # questions a tile, as those about photos


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
    map_rows: MapRowsConfig = MapRowsConfig()

    @property
    def covered(self) -> float:
        """Share of the tile's side that the photo covers, in its upper right corner."""
        return self.delta if self.layout == "graft" else 0.0
