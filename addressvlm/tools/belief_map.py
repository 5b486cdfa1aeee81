"""Where models believe a photo was taken, drawn on the map (paper 001, Fig. 3): many answers at temperature 0.8, counted.

    python -m addressvlm.tools.belief_map --model before=runs/demo/models/stage-2-only/merged \\
        --model after=runs/demo/models/addressvlm/merged --photo photo.jpg --at 52.2053,0.1218 --out belief.png

A model that names no street of the city, as one that was never trained on it, is asked again with the streets that the
others named as options (paper 001, E.1).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from PIL import Image, UnidentifiedImageError
from shapely.geometry.base import BaseGeometry

from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.gazetteer.name_matcher import NameFinder, normalize_name
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.inference import Localizer
from addressvlm.questions import SUFFIXES, TEMPLATES
from addressvlm.storage.run_dir import parse_model_flag

QUESTION = TEMPLATES["street"][0]
AT_ONCE = 50  # answers generated together
MARGIN = 0.3  # around the streets that were named, of the picture's side


@dataclass(frozen=True)
class SampledAnswers:
    """How often each street was named.

    Attributes:
        counts: street of the gazetteer -> answers that name it alone.
        answers: how many there were.
        offered: whether the streets were given as options.
    """

    counts: Counter[str]
    answers: int
    offered: bool = False

    @property
    def valid(self) -> float:
        """Share of the answers that name one street of the gazetteer."""
        return sum(self.counts.values()) / max(self.answers, 1)


def sample_answers(
    localizer: Localizer, image: Image.Image, gazetteer: Gazetteer, n: int = 100, temperature: float = 0.8, seed: int = 0,
    options: Sequence[str] = (),
) -> SampledAnswers:  # fmt: skip
    """Ask n times on which street a photo was taken; the photo is read once, answers are generated together."""
    suffix = SUFFIXES["choice"].format(options="; ".join(options)) if options else SUFFIXES["generation"]
    torch.manual_seed(seed)
    answers: list[str] = []
    while len(answers) < n:
        some = min(AT_ONCE, n - len(answers))
        answers += localizer.answer([image] * some, [f"{QUESTION} {suffix}"] * some, 24, temperature)
    names, written = (
        NameFinder(gazetteer.streets, gazetteer.variants),
        {normalize_name(street): street for street in gazetteer.streets},
    )
    found = [names.find(answer) for answer in answers]
    return SampledAnswers(Counter(written[one.pop()] for one in found if len(one) == 1), n, bool(options))


def sample_all(
    localizers: Sequence[Localizer], image: Image.Image, gazetteer: Gazetteer, n: int, temperature: float, seed: int
) -> list[SampledAnswers]:
    """The same of several models; those that name no street of the city choose among what the others named."""
    first = [sample_answers(localizer, image, gazetteer, n, temperature, seed) for localizer in localizers]
    named = sorted(set().union(*(sampled.counts for sampled in first)))
    return [
        sampled if sampled.counts or not named else sample_answers(localizer, image, gazetteer, n, temperature, seed, named)
        for localizer, sampled in zip(localizers, first, strict=True)
    ]


def spread_m(sampled: SampledAnswers, gazetteer: Gazetteer, lat: float, lon: float) -> float | None:
    """Mean distance of the streets named from the true place, in metres; None if none with a known shape was named."""
    scale = _scale(lat)
    place = shapely.Point(np.array([lon, lat]) * scale)
    known = [(count, gazetteer.geometry[street]) for street, count in sampled.counts.items() if street in gazetteer.geometry]
    if not known:
        return None
    counts, shapes = zip(*known, strict=True)
    metres = shapely.distance(place, shapely.transform(list(shapes), lambda lonlat: lonlat * scale))
    return float(np.average(metres, weights=counts))


def draw_belief_map(
    names: Sequence[str], sampled: Sequence[SampledAnswers], gazetteer: Gazetteer, path: Path,
    at: tuple[float, float] | None = None, photo: Image.Image | None = None,
) -> None:  # fmt: skip
    """Write the picture: the photo, then one map a model, streets by how often they were named, the true place a star.

    Args:
        at: latitude and longitude of the true place, degrees.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = len(names) + (photo is not None)
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 5.4), squeeze=False, layout="constrained")
    if photo is not None:
        axes[0, 0].imshow(photo)
        axes[0, 0].set_axis_off()
    most = max((max(one.counts.values(), default=0) / one.answers for one in sampled), default=0) or 1.0
    view = _view(sampled, gazetteer, at)
    for axis, name, one in zip(axes[0, panels - len(names) :], names, sampled, strict=True):
        shown = _draw_map(axis, one, gazetteer, at, most, view)
        axis.set_title(f"{name}{', options given' if one.offered else ''}\n{_caption(one, gazetteer, at)}", fontsize=11)
    figure.colorbar(
        shown, ax=axes[0, -1], label="share of the answers", shrink=0.7, format=lambda share, _: f"{100 * share:g} %"
    )
    if gazetteer.attribution:
        figure.supxlabel("; ".join(gazetteer.attribution), fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_map(axis: Any, one: SampledAnswers, gazetteer: Gazetteer, at: Any, most: float, view: tuple[float, ...]) -> Any:
    """One map; what a colour bar is made of."""
    from matplotlib import cm, colors

    scale = colors.Normalize(0, most)
    shown = cm.ScalarMappable(scale, "YlOrRd")
    for street, shape in gazetteer.geometry.items():
        _line(axis, shape, "#d3d0c8", 1.0, 1)
        if one.counts[street]:
            share = one.counts[street] / one.answers
            _line(axis, shape, "#55504a", 4.4, 2)
            _line(axis, shape, shown.cmap(scale(share)), 3.2, 3 + share)
    for rank, (street, _) in enumerate(one.counts.most_common(3)):
        if street in gazetteer.geometry:
            inside = shapely.clip_by_rect(gazetteer.geometry[street], *view)
            if not inside.is_empty:
                where = shapely.line_interpolate_point(max(shapely.get_parts(inside), key=shapely.length), 0.5, normalized=True)
                box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85}
                axis.annotate(street, (where.x, where.y), fontsize=9 - rank, ha="center", bbox=box, zorder=6)
    if at:
        axis.plot(at[1], at[0], "*", markersize=17, color="#1668c7", markeredgecolor="white", zorder=7)
    axis.set_xlim(view[0], view[2])
    axis.set_ylim(view[1], view[3])
    axis.set_aspect(1 / _squeeze((view[1] + view[3]) / 2))
    axis.set_xticks([])
    axis.set_yticks([])
    return shown


def _line(axis: Any, shape: BaseGeometry, colour: Any, width: float, order: float) -> None:
    for part in shapely.get_parts(shape):
        points = shapely.get_coordinates(part)
        if len(points) > 1:
            axis.plot(points[:, 0], points[:, 1], color=colour, linewidth=width, solid_capstyle="round", zorder=order)


def _view(sampled: Sequence[SampledAnswers], gazetteer: Gazetteer, at: Any) -> tuple[float, float, float, float]:
    """What the maps show, degrees west, south, east, north: the streets named and the true place, made square."""
    named = [gazetteer.geometry[s] for one in sampled for s in one.counts if s in gazetteer.geometry]
    shapes = named or list(gazetteer.geometry.values())
    west, south, east, north = shapely.total_bounds([*shapes, *([shapely.Point(at[1], at[0])] if at else [])])
    squeeze = _squeeze((south + north) / 2)
    half = max((east - west) * squeeze, north - south) * (1 + MARGIN) / 2
    x, y = (west + east) / 2, (south + north) / 2
    return x - half / squeeze, y - half, x + half / squeeze, y + half


def _caption(one: SampledAnswers, gazetteer: Gazetteer, at: tuple[float, float] | None) -> str:
    far = spread_m(one, gazetteer, *at) if at else None
    streets = f"{one.valid:.0%} of {one.answers} answers name a street, {len(one.counts)} different"
    return streets if far is None else f"{streets}\n{far:,.0f} m from the place on average"


def _squeeze(lat: float) -> float:
    return float(np.cos(np.radians(lat)))


def _scale(lat: float) -> np.ndarray:
    return np.array([METRES_PER_DEGREE * _squeeze(lat), METRES_PER_DEGREE])


def _city(localizers: Sequence[Localizer], given: Path | None) -> Gazetteer:
    """The gazetteer given, else that of the first model that has one.

    Raises:
        InputError: there is none with shapes of streets.
    """
    found = Gazetteer.load(given) if given else next((one.gazetteer for one in localizers if one.gazetteer), None)
    if found is None or not found.geometry:
        raise InputError(f"no streets to draw on: give --gazetteer, the dataset's {GAZETTEER_FILE}, or a trained model.")
    return found


def _place(text: str | None) -> tuple[float, float] | None:
    if not text:
        return None
    try:
        lat, lon = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--at {text}: write it as latitude,longitude in degrees.") from None
    return lat, lon


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]FOLDER", help="repeatable")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--at", metavar="LAT,LON", help="the true place")
    parser.add_argument("--gazetteer", type=Path, help="default: that of the first trained model")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("belief.png"))
    args = parser.parse_args(argv)
    if args.samples < 1 or args.temperature <= 0:
        raise InputError(f"--samples {args.samples} --temperature {args.temperature:g}: give 1 or more, and above 0.")
    try:
        photo = Image.open(args.photo).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{args.photo} is not a photo that can be read ({error}): give another one.") from None
    at, named = _place(args.at), [parse_model_flag(flag) for flag in args.model]
    localizers = [Localizer(folder) for _, folder in named]
    city = _city(localizers, args.gazetteer)
    sampled = sample_all(localizers, photo, city, args.samples, args.temperature, args.seed)
    names = [name for name, _ in named]
    draw_belief_map(names, sampled, city, args.out, at, photo)
    for name, one in zip(names, sampled, strict=True):
        top = ", ".join(f"{street} {count / one.answers:.0%}" for street, count in one.counts.most_common(5))
        print(f"{name}: {_caption(one, city, at).replace(chr(10), ', ')}: {top or 'none'}")
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
