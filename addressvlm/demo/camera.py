"""Photograph a toy city from the street: one ray per image column against the walls, trees as upright discs."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from addressvlm.demo.world import FRONT, PAVINGS, ROAD_HALF, World

CAMERA_HEIGHT = 2.2  # metres
MAX_DISTANCE = 120.0  # metres
FIELD_OF_VIEW = np.pi / 2  # horizontal
SKY_TOP, SKY_LOW = np.array([112.0, 156, 214]), np.array([206.0, 220, 236])
YARD = np.array([128.0, 148, 96])
PAVEMENT = np.array([176.0, 172, 166])
CLASSES = ("sky", "yard", "pavement", "road", "building", "tree")


def photograph(world: World, x: float, y: float, heading: float, light: float, pixels: int = 160) -> Image.Image:
    """The street-view photo from (x, y) in the plan frame.

    Args:
        heading: radians counter-clockwise from the plan frame's x axis.
        light: brightness, about 0.8 to 1.15.
        pixels: side of the square image.
    """
    view = _cast_rays(world, x, y, heading, pixels)
    up = np.clip(-view.rows / (pixels / 2), 0, 1)[..., None]
    sky = np.broadcast_to(SKY_LOW * (1 - up) + SKY_TOP * up, (pixels, pixels, 3))
    image = np.where((view.rows > 0)[..., None], ground_colour(world, view.px, view.py), sky)
    image = np.where(view.is_wall[..., None], _walls(world, view), image)
    haze = np.clip(view.depth / MAX_DISTANCE, 0, 1)[None, :, None] * 0.45
    image = np.where(view.is_wall[..., None], image * (1 - haze) + SKY_LOW * haze, image)
    _draw_trees(world, x, y, heading, view.focal, view.depth, image)
    return Image.fromarray(np.clip(image * light, 0, 255).astype(np.uint8))


def segment(world: World, x: float, y: float, heading: float, pixels: int = 160) -> np.ndarray:
    """The class of each pixel of that photo, as an index into `CLASSES`: uint8 (pixels, pixels)."""
    view = _cast_rays(world, x, y, heading, pixels)
    ground = ground_colour(world, view.px, view.py)
    is_yard, is_pavement = ((ground == colour).all(axis=-1) for colour in (YARD, PAVEMENT))
    below = np.select([is_yard, is_pavement], [CLASSES.index("yard"), CLASSES.index("pavement")], CLASSES.index("road"))
    classes = np.where(view.rows > 0, below, CLASSES.index("sky"))
    classes = np.where(view.is_wall, CLASSES.index("building"), classes)
    trees = np.zeros((pixels, pixels, 3))
    _draw_trees(world, x, y, heading, view.focal, view.depth, trees)
    return np.where(trees.any(axis=-1), CLASSES.index("tree"), classes).astype(np.uint8)


@dataclass(frozen=True)
class _View:
    """Where the rays of a photo end; arrays over columns, or rows x columns."""

    focal: float  # pixels
    rows: np.ndarray  # pixels below the horizon, a column vector
    depth: np.ndarray  # columns, metres along the viewing direction
    wall: np.ndarray  # columns, index of the building or -1
    along: np.ndarray  # columns, metres along the wall
    light: np.ndarray  # columns, brightness of the wall
    height: np.ndarray  # metres, of the wall at a pixel
    is_wall: np.ndarray
    px: np.ndarray  # x and y of the ground at a pixel, plan frame
    py: np.ndarray


def _cast_rays(world: World, x: float, y: float, heading: float, pixels: int) -> _View:
    focal = pixels / 2 / np.tan(FIELD_OF_VIEW / 2)
    columns = np.arange(pixels) - (pixels - 1) / 2
    rays = heading - np.arctan2(columns, focal)
    cosine = np.cos(np.arctan2(columns, focal))
    direction = np.stack([np.cos(rays), np.sin(rays)], 1)

    distance, wall, along, light = _first_wall(world, x, y, direction)
    depth = distance * cosine
    rows = np.arange(pixels)[:, None] - (pixels - 1) / 2
    height = CAMERA_HEIGHT - rows * depth[None] / focal
    is_wall = (wall >= 0)[None] & (height >= 0) & (height <= world.heights[wall][None])
    range_ = CAMERA_HEIGHT * focal / np.maximum(rows, 0.5) / cosine[None]
    px, py = x + range_ * direction[None, :, 0], y + range_ * direction[None, :, 1]
    return _View(focal, rows, depth, wall, along, light, height, is_wall, px, py)


def _first_wall(world: World, x: float, y: float, direction: np.ndarray) -> tuple[np.ndarray, ...]:
    """First wall of each ray: distance (m), building or -1, metres along the wall, and its brightness."""
    boxes = world.boxes
    position = np.array([x, y])
    near = (boxes[:, :2] < position + MAX_DISTANCE) & (boxes[:, 2:] > position - MAX_DISTANCE)
    index = np.flatnonzero(near.all(axis=1))
    b = boxes[index]
    safe = np.where(np.abs(direction) < 1e-6, 1e-6, direction)
    tx = np.sort((b[None, :, [0, 2]] - x) / safe[:, None, :1], axis=2)
    ty = np.sort((b[None, :, [1, 3]] - y) / safe[:, None, 1:], axis=2)
    enter = np.maximum(tx[..., 0], ty[..., 0])
    leave = np.minimum(tx[..., 1], ty[..., 1])
    enter = np.where((enter < leave) & (enter > 0.05), enter, np.inf)
    first = enter.argmin(1)
    pick = np.arange(len(direction))
    distance = enter[pick, first]
    is_hit = np.isfinite(distance) & (distance < MAX_DISTANCE)
    distance = np.where(is_hit, distance, MAX_DISTANCE)
    faces_x = tx[pick, first, 0] >= ty[pick, first, 0]
    point = position + distance[:, None] * direction
    along = np.where(faces_x, point[:, 1], point[:, 0])
    light = np.where(faces_x, 0.84, 1.0)
    return distance, np.where(is_hit, index[first], -1), along, light


def _walls(world: World, view: _View) -> np.ndarray:
    """Facade colour with windows and a darker ground floor; rows x columns x RGB."""
    wall, height = view.wall, view.height
    gap = world.windows[wall]
    colour = np.broadcast_to(world.facades[wall][None], (*height.shape, 3)) * view.light[None, :, None]
    in_window = (np.mod(view.along, gap) > 0.35 * gap)[None] & (np.mod(height, 3.1) > 1.0) & (np.mod(height, 3.1) < 2.5)
    glass = np.array([70.0, 86, 108])
    colour = np.where(in_window[..., None], colour * 0.25 + glass * 0.75, colour)
    shop = (height < 3.1)[..., None] & ~in_window[..., None]
    colour = np.where(shop, colour * 0.8, colour)
    eaves = height > world.heights[wall][None] - 0.5
    return np.where(eaves[..., None], world.roofs[wall][None], colour)


def ground_colour(world: World, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Colour of road, pavement or yard at points of the plan frame: (*px.shape, 3)."""
    colour = np.broadcast_to(YARD, (*px.shape, 3)).copy()
    spans = []
    for street in world.streets:
        across, along = (py, px) if street.horizontal else (px, py)
        spans.append((street, np.abs(across - street.at), (along > street.start) & (along < street.end), along))
    for _, off, inside, _ in spans:
        colour[inside & (off < FRONT)] = PAVEMENT
    for street, off, inside, along in spans:
        road = inside & (off < ROAD_HALF)
        for block in street.blocks:
            colour[road & (along >= block.start) & (along < block.end)] = PAVINGS[block.character.paving]
        colour[road & (off < 0.15) & (np.mod(along, 6) < 3)] = (238, 238, 230)
    return colour


def _draw_trees(world: World, x: float, y: float, heading: float, focal: float, depth: np.ndarray, image: np.ndarray) -> None:
    """Draw trunks and crowns, far to near, where no wall is nearer; changes `image`."""
    pixels = image.shape[0]
    offset = world.trees[:, :2] - np.array([x, y], np.float32)
    forward = offset @ np.array([np.cos(heading), np.sin(heading)])
    right = offset @ np.array([np.sin(heading), -np.cos(heading)])
    visible = np.flatnonzero((forward > 2.5) & (forward < 60) & (np.abs(right) < forward + 3))
    centre = (pixels - 1) / 2
    for i in visible[np.argsort(-forward[visible])]:
        scale = focal / forward[i]
        cx, radius = centre + right[i] * scale, world.trees[i, 2] * scale
        cy = centre + (CAMERA_HEIGHT - 2.6 - world.trees[i, 2]) * scale
        x0, x1 = max(0, int(cx - radius)), min(pixels, int(cx + radius) + 2)
        if x0 >= x1:
            continue
        open_columns = depth[x0:x1] > forward[i]
        y0, y1 = max(0, int(cy - radius)), min(pixels, int(cy + radius) + 2)
        if y0 < y1:
            grid = ((np.arange(y0, y1)[:, None] - cy) ** 2 + (np.arange(x0, x1)[None] - cx) ** 2) / radius**2
            shade = 1.08 - 0.25 * np.clip(grid, 0, 1)
            inside = (grid < 1) & open_columns[None]
            region = image[y0:y1, x0:x1]
            region[inside] = (world.crowns[i] * shade[..., None])[inside]
        t0, t1 = max(0, int(cx - 0.18 * scale)), min(pixels, int(cx + 0.18 * scale) + 1)
        top, foot = int(min(max(cy + 0.8 * radius, 0), pixels)), int(min(centre + CAMERA_HEIGHT * scale, pixels))
        if t0 < t1 and top < foot:
            image[top:foot, t0:t1][:, depth[t0:t1] > forward[i]] = (88, 66, 50)
