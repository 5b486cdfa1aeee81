"""Write a toy city as input files: a manifest, photos, street and district files, a satellite GeoTIFF.

python -m addressvlm.demo.city alderbrook /tmp/alderbrook
"""

import csv
import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image, ImageDraw
from pyproj import Transformer
from rasterio.transform import from_origin

from addressvlm.demo.camera import ground_colour, photograph
from addressvlm.demo.world import Street, World, district_at, generate
from addressvlm.errors import InputError
from addressvlm.storage.files import atomic_write

TOY_CITIES = {"alderbrook": 1, "brinemouth": 2}  # name -> seed; the base model is trained on seeds from 1000
ORIGIN = (47.0, -38.0)  # degrees; in the Atlantic, where no real city is
UTM = "EPSG:32624"
SPACING = 20.0  # metres between places
FROM_CROSSING = 18.0  # metres from a place to the ends of its block, so that it is 25 m from the places of all others
VIEWS = 4  # per place
GROUND_PIXEL = 0.5  # metres per pixel
MARGIN = 130.0  # metres of imagery around the city
CITY_DISTANCE = 20_000.0  # metres between toy cities


def write_city(name: str, folder: Path) -> dict[str, str]:
    """Write a toy city to `folder`, unless it is there, and return the paths for a configuration.

    Raises:
        InputError: there is no toy city of that name.
    """
    folder = Path(folder)
    paths = {
        "manifest": folder / "manifest.csv",
        "photos": folder / "photos",
        "streets": folder / "streets.geojson",
        "districts": folder / "districts.geojson",
        "imagery": folder / "satellite.tif",
    }
    if not paths["manifest"].is_file():  # written last, atomically
        world = toy_world(name)
        paths["photos"].mkdir(parents=True, exist_ok=True)
        write_maps(world, paths)
        _write_photos(world, random.Random(TOY_CITIES[name]), paths["photos"], paths["manifest"])
    return {key: str(path) for key, path in paths.items()}


def toy_world(name: str) -> World:
    """The world of a toy city, at a location of its own.

    Raises:
        InputError: there is no toy city of that name.
    """
    if name not in TOY_CITIES:
        raise InputError(f"no toy city '{name}': city.toy is one of {', '.join(TOY_CITIES)}.")
    world = generate(TOY_CITIES[name])
    world.north = CITY_DISTANCE * list(TOY_CITIES).index(name)
    return world


def ground_frame() -> Transformer:
    """UTM coordinates -> longitude, latitude."""
    return Transformer.from_crs(UTM, "EPSG:4326", always_xy=True)


def origin(world: World) -> tuple[float, float]:
    """UTM coordinates of the city's centre, whole metres."""
    east, north = Transformer.from_crs("EPSG:4326", UTM, always_xy=True).transform(ORIGIN[1], ORIGIN[0])
    return float(round(east)), float(round(north)) + world.north


def to_degrees(world: World, points: np.ndarray) -> np.ndarray:
    """Plan frame (N, 2) in metres -> longitude, latitude (N, 2)."""
    ground = world.to_ground(points) + np.array(origin(world))
    return np.stack(ground_frame().transform(ground[:, 0], ground[:, 1]), 1)


def street_places(world: World) -> Iterator[tuple[Street, float, float]]:
    """(street, x, y) of the places to photograph along every street, plan frame; none at the crossings."""
    for street in world.streets:
        for along in np.arange(street.start + FROM_CROSSING, street.end, SPACING):
            x, y = street.point(float(along))
            block = street.block_at(x, y)
            if min(along - block.start, block.end - along) >= FROM_CROSSING:
                yield street, x, y


def view_headings(street: Street, rng: random.Random) -> list[float]:
    """Roughly along and across the street, radians counter-clockwise from the plan frame's x axis."""
    base = 0.0 if street.horizontal else math.pi / 2
    return [base + k * 2 * math.pi / VIEWS + rng.uniform(-0.2, 0.2) for k in range(VIEWS)]


def compass_heading(world: World, heading: float) -> float:
    """Plan frame heading (radians) -> degrees clockwise from north."""
    return (90 - math.degrees(heading + world.angle)) % 360


def _write_photos(world: World, rng: random.Random, folder: Path, manifest: Path) -> None:
    rows = []
    numbers = {block: str(n) for n, block in enumerate(block for street in world.streets for block in street.blocks)}
    for number, (street, x, y) in enumerate(street_places(world)):
        block = numbers[street.block_at(x, y)]
        x, y = x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5)
        lon, lat = to_degrees(world, np.array([[x, y]]))[0]
        for view, heading in enumerate(view_headings(street, rng)):
            file = f"{number:04d}_{view}.jpg"
            photograph(world, x, y, heading, rng.uniform(0.8, 1.12)).save(folder / file, quality=88)
            rows.append((file, f"{number:04d}", f"{lat:.7f}", f"{lon:.7f}", f"{compass_heading(world, heading):.1f}", block))
    with atomic_write(manifest) as path, path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("file", "place", "lat", "lon", "heading", "block"), *rows])


def write_maps(world: World, paths: dict[str, Path]) -> None:
    """Write the `streets` and `districts` (GeoJSON) and the `imagery` (GeoTIFF) of a world to these paths."""
    streets = [
        _feature("LineString", to_degrees(world, np.array([s.point(s.start), s.point(s.end)])).round(7).tolist(), s.name)
        for s in world.streets
    ]
    districts = []
    for district in world.districts:
        x0, y0, x1, y1 = district.box
        ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
        districts.append(_feature("Polygon", [to_degrees(world, ring).round(7).tolist()], district.name))
    for key, features in (("streets", streets), ("districts", districts)):
        paths[key].write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    image, west, north = satellite(world)
    with rasterio.open(
        paths["imagery"], "w", driver="GTiff", height=image.shape[0], width=image.shape[1], count=3, dtype="uint8", crs=UTM,
        transform=from_origin(west, north, GROUND_PIXEL, GROUND_PIXEL), compress="deflate", tiled=True,
    ) as out:  # fmt: skip
        out.write(image.transpose(2, 0, 1))


def _feature(kind: str, coordinates: list, name: str) -> dict:
    return {"type": "Feature", "properties": {"name": name}, "geometry": {"type": kind, "coordinates": coordinates}}


def satellite(world: World) -> tuple[np.ndarray, float, float]:
    """The city from above: H x W x RGB, and the UTM coordinates of its upper left corner."""
    half = np.hypot(*world.size) / 2 + MARGIN
    side = int(2 * half / GROUND_PIXEL)
    metres = (np.arange(side) + 0.5) * GROUND_PIXEL - half
    east, north = np.meshgrid(metres, -metres)
    c, s = np.cos(world.angle), np.sin(world.angle)
    plan_x = east * c + north * s + world.size[0] / 2
    plan_y = -east * s + north * c + world.size[1] / 2
    image = Image.fromarray(ground_colour(world, plan_x, plan_y).astype(np.uint8))
    draw = ImageDraw.Draw(image)

    def pixel(points: np.ndarray) -> list[tuple[float, float]]:
        ground = world.to_ground(points)
        return [((e + half) / GROUND_PIXEL, (half - n) / GROUND_PIXEL) for e, n in ground]

    for (x0, y0, x1, y1), roof, facade in zip(world.boxes, world.roofs, world.facades, strict=False):
        outline = pixel(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]))
        draw.polygon(outline, fill=tuple(int(v) for v in roof), outline=tuple(int(v * 0.7) for v in facade))
        ridge = [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2)] if x1 - x0 > y1 - y0 else [((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)]
        draw.line(pixel(np.array(ridge)), fill=tuple(int(v * 0.85) for v in roof), width=1)
    for (x, y, radius), crown in zip(world.trees, world.crowns, strict=False):
        (px, py), r = pixel(np.array([(x, y)]))[0], radius / GROUND_PIXEL
        draw.ellipse((px - r, py - r, px + r, py + r), fill=tuple(int(v) for v in crown))
    east0, north0 = origin(world)
    return np.asarray(image), east0 - half, north0 + half


def address_at(world: World, street: Street, x: float, y: float) -> tuple[str, str]:
    """Street and district of a place in the plan frame."""
    return street.name, district_at(world, x, y).name


if __name__ == "__main__":
    write_city(sys.argv[1], Path(sys.argv[2]))
