"""Draw a map of how similar photos are to a text: a street, a district, or any words (paper 002, Sec. 6.4 and Fig. 6).

    python -m addressvlm.tools.similarity_map runs/demo/models/addressclip runs/demo "Mill Street" "Harbour"

Each point is a place; brighter means more similar. The street or district that the text names is outlined in red.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from addressvlm.baselines.dual_encoder import DualEncoder, open_encoder
from addressvlm.errors import InputError
from addressvlm.evaluation.run_questions import photo_image
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.tools.map_drawing import draw_outline, new_figure, save_figure, set_extent, squeeze

COLUMNS = ["id", "place", "lat", "lon", "image"]
BATCH_SIZE = 32  # photos encoded together
NAMED_COLOUR = "#d62728"  # of the street or district that the text names

Row = dict[str, Any]


@dataclass(frozen=True)
class PhotoSimilarity:
    """Similarity of photos, in the order of the table, to texts.

    Attributes:
        places: of each photo.
        lonlat: degrees, float64 (photos, 2).
        similarity: cosines, float32 (photos, texts).
    """

    ids: list[str]
    places: list[str]
    lonlat: np.ndarray
    similarity: np.ndarray

    def by_place(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean positions (places, 2) and mean similarities (places, texts)."""
        members: dict[str, list[int]] = defaultdict(list)
        for number, place in enumerate(self.places):
            members[place].append(number)
        rows = list(members.values())
        return np.stack([self.lonlat[r].mean(0) for r in rows]), np.stack([self.similarity[r].mean(0) for r in rows])


def photo_similarity(encoder: DualEncoder, photos: Sequence[Row], texts: Sequence[str]) -> PhotoSimilarity:
    """Similarity of photos, rows of `tables.PHOTOS` with COLUMNS, to texts.

    Raises:
        InputError: there is no photo with coordinates, or no text.
    """
    located = [photo for photo in photos if photo["lat"] is not None and photo["lon"] is not None]
    if not located or not all(text.strip() for text in texts):
        raise InputError("a map needs photos with coordinates and a text that is not empty.")
    vectors = encoder.encode_texts(texts)
    batches = []
    for start in range(0, len(located), BATCH_SIZE):
        images = [photo_image(photo) for photo in located[start : start + BATCH_SIZE]]
        batches.append((encoder.encode_images(images) @ vectors.T).cpu().numpy())
    lonlat = np.array([[photo["lon"], photo["lat"]] for photo in located])
    ids, places = [photo["id"] for photo in located], [photo["place"] for photo in located]
    return PhotoSimilarity(ids, places, lonlat, np.concatenate(batches))


def named_shapes(text: str, gazetteer: Gazetteer) -> list[Any]:
    """Geometry of the street that a text names, else of the district."""
    street, district = gazetteer.find_street(text), gazetteer.find_district(text)
    if street in gazetteer.geometry:
        return [gazetteer.geometry[street]]
    return [gazetteer.district_geometry[district]] if district in gazetteer.district_geometry else []


def draw_similarity_map(texts: Sequence[str], photos: PhotoSimilarity, gazetteer: Gazetteer, path: Path) -> None:
    """Write one map per text, side by side, as SVG, PNG or PDF by the file's suffix."""
    lonlat, similarity = photos.by_place()
    extent = map_extent(lonlat)
    figure, axes = new_figure(len(texts))
    for number, (axis, text) in enumerate(zip(axes, texts, strict=True)):
        values = similarity[:, number]
        order = np.argsort(values)
        axis.set_facecolor("#1d1f27")
        for shape in gazetteer.geometry.values():
            draw_outline(axis, shape, "#4a4e5c", 1.0, 1.1)
        for shape in named_shapes(text, gazetteer):
            draw_outline(axis, shape, NAMED_COLOUR, 2.4, 1.24)
        points = axis.scatter(*lonlat[order].T, c=values[order], cmap="viridis", s=26, zorder=3, edgecolors="none")
        axis.set_title(text, fontsize=11)
        set_extent(axis, *extent)
        figure.colorbar(points, ax=axis, shrink=0.7, label="similarity")
    west, south, east, north = extent
    height = (north - south) / (east - west) / squeeze((south + north) / 2)
    figure.set_size_inches(5 * len(texts), 0.9 + 4 * min(height, 2))
    save_figure(figure, path, gazetteer.attribution)


def map_extent(lonlat: np.ndarray) -> tuple[float, float, float, float]:
    """The part of a map (west, south, east, north) with these places (N, 2) and a margin of 5 %."""
    (west, south), (east, north) = lonlat.min(axis=0), lonlat.max(axis=0)
    width = squeeze((south + north) / 2)
    pad = max((east - west) * width, north - south, 1e-4) / 20
    return west - pad / width, south - pad, east + pad / width, north + pad


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained dual encoder")
    parser.add_argument("run", help="folder of a run, or of its photos")
    parser.add_argument("text", nargs="+")
    parser.add_argument("--split", default="test", help="of the photos (default: test)")
    parser.add_argument("--out", type=Path, default=Path("similarity.svg"))
    args = parser.parse_args(argv)
    if args.out.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--out {args.out}: end it in .svg, .png or .pdf.")
    data: AnyPath = path_of(args.run)
    data = data / "photos" if (data / "photos").is_dir() else data
    gazetteer, encoder = Gazetteer.load(data / GAZETTEER_FILE), open_encoder(path_of(args.model))
    photos = photo_similarity(encoder, list(tables.iter_rows(data, args.split, COLUMNS)), args.text)
    draw_similarity_map(args.text, photos, gazetteer, args.out)
    for number, text in enumerate(args.text):
        best = np.argsort(-photos.similarity[:, number])[:5]
        ranking = ", ".join(f"{photos.ids[i]} {photos.similarity[i, number]:.2f}" for i in best)
        print(f"{text}: most similar photos {ranking}")
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
