"""Draw a map of where models believe a photo was taken: many answers at temperature 0.8, counted (paper 001, Fig. 3).

    python -m addressvlm.tools.belief_map --model before=runs/demo/models/stage-2-only/merged \\
        --model after=runs/demo/models/addressvlm/merged --photo photo.jpg --at 52.2053,0.1218 --out belief.png

A model that names no street of the city, such as one not trained on it, gets a second question with the streets that the
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

from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE, Gazetteer
from addressvlm.gazetteer.name_matcher import NameFinder, normalize_name
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.inference import Localizer
from addressvlm.questions import SUFFIXES, TEMPLATES
from addressvlm.storage.run_dir import parse_model_flag
from addressvlm.tools.map_drawing import draw_outline, new_figure, save_figure, set_extent, squeeze

QUESTION = TEMPLATES["street"][0]
BATCH_SIZE = 50  # answers generated together
MARGIN = 0.3  # around the named streets, share of the map's side


@dataclass(frozen=True)
class SampledAnswers:
    """How often each street was named.

    Attributes:
        counts: street of the gazetteer -> number of answers that name it and no other.
        answers: number of all answers.
        has_options: whether the question had the streets as options.
    """

    counts: Counter[str]
    answers: int
    has_options: bool = False

    @property
    def valid(self) -> float:
        """Share of the answers that name one street of the gazetteer."""
        return sum(self.counts.values()) / max(self.answers, 1)


def sample_answers(
    localizer: Localizer, image: Image.Image, gazetteer: Gazetteer, n: int = 100, temperature: float = 0.8, seed: int = 0,
    options: Sequence[str] = (),
) -> SampledAnswers:  # fmt: skip
    """Ask n times on which street a photo was taken."""
    suffix = SUFFIXES["choice"].format(options="; ".join(options)) if options else SUFFIXES["generation"]
    torch.manual_seed(seed)
    answers: list[str] = []
    while len(answers) < n:
        size = min(BATCH_SIZE, n - len(answers))
        answers += localizer.answer([image] * size, [f"{QUESTION} {suffix}"] * size, 24, temperature)
    finder = NameFinder(gazetteer.streets, gazetteer.variants)
    street_of = {normalize_name(street): street for street in gazetteer.streets}
    names = [finder.find(answer) for answer in answers]
    return SampledAnswers(Counter(street_of[name] for only in names if len(only) == 1 for name in only), n, bool(options))


def sample_all(
    localizers: Sequence[Localizer], image: Image.Image, gazetteer: Gazetteer, n: int, temperature: float, seed: int
) -> list[SampledAnswers]:
    """`sample_answers` of several models; those that name no street choose among the streets that the others named."""
    samples = [sample_answers(localizer, image, gazetteer, n, temperature, seed) for localizer in localizers]
    streets = sorted(set().union(*(sample.counts for sample in samples)))
    return [
        sample if sample.counts or not streets else sample_answers(localizer, image, gazetteer, n, temperature, seed, streets)
        for localizer, sample in zip(localizers, samples, strict=True)
    ]


def spread_m(sample: SampledAnswers, gazetteer: Gazetteer, lat: float, lon: float) -> float | None:
    """Mean distance of the named streets from the true place, in metres; None if none of them has a geometry."""
    scale = np.array([METRES_PER_DEGREE * squeeze(lat), METRES_PER_DEGREE])
    place = shapely.Point(np.array([lon, lat]) * scale)
    located = [(count, gazetteer.geometry[street]) for street, count in sample.counts.items() if street in gazetteer.geometry]
    if not located:
        return None
    counts, shapes = zip(*located, strict=True)
    metres = shapely.distance(place, shapely.transform(list(shapes), lambda lonlat: lonlat * scale))
    return float(np.average(metres, weights=counts))


def draw_belief_map(
    names: Sequence[str], samples: Sequence[SampledAnswers], gazetteer: Gazetteer, path: Path,
    at: tuple[float, float] | None = None, photo: Image.Image | None = None,
) -> None:  # fmt: skip
    """Write a figure: the photo and one map per model, with streets coloured by how often they were named.

    Args:
        at: latitude and longitude of the true place in degrees, drawn as a star.
    """
    panels = len(names) + (photo is not None)
    figure, axes = new_figure(panels, (5.2 * panels, 5.4))
    if photo is not None:
        axes[0].imshow(photo)
        axes[0].set_axis_off()
    highest = max((max(sample.counts.values(), default=0) / sample.answers for sample in samples), default=0) or 1.0
    view = _view(samples, gazetteer, at)
    for axis, name, sample in zip(axes[panels - len(names) :], names, samples, strict=True):
        mappable = _draw_map(axis, sample, gazetteer, at, highest, view)
        title = f"{name}, with options" if sample.has_options else name
        axis.set_title(f"{title}\n{_caption(sample, gazetteer, at)}", fontsize=11)
    figure.colorbar(
        mappable, ax=axes[-1], label="share of the answers", shrink=0.7, format=lambda share, _: f"{100 * share:g} %"
    )
    save_figure(figure, path, gazetteer.attribution)


def _draw_map(axis: Any, sample: SampledAnswers, gazetteer: Gazetteer, at: Any, highest: float, view: tuple[float, ...]) -> Any:
    """Draw one map and return the mappable for the colour bar."""
    from matplotlib import cm, colors

    scale = colors.Normalize(0, highest)
    mappable = cm.ScalarMappable(scale, "YlOrRd")
    for street, shape in gazetteer.geometry.items():
        draw_outline(axis, shape, "#d3d0c8", 1.0, 1)
        if sample.counts[street]:
            share = sample.counts[street] / sample.answers
            draw_outline(axis, shape, "#55504a", 4.4, 2)
            draw_outline(axis, shape, mappable.cmap(scale(share)), 3.2, 3 + share)
    for rank, (street, _) in enumerate(sample.counts.most_common(3)):
        if street in gazetteer.geometry:
            inside = shapely.clip_by_rect(gazetteer.geometry[street], *view)
            if not inside.is_empty:
                label = shapely.line_interpolate_point(max(shapely.get_parts(inside), key=shapely.length), 0.5, normalized=True)
                box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.85}
                axis.annotate(street, (label.x, label.y), fontsize=9 - rank, ha="center", bbox=box, zorder=6)
    if at:
        axis.plot(at[1], at[0], "*", markersize=17, color="#1668c7", markeredgecolor="white", zorder=7)
    set_extent(axis, *view)
    return mappable


def _view(samples: Sequence[SampledAnswers], gazetteer: Gazetteer, at: Any) -> tuple[float, float, float, float]:
    """The square around the named streets and the true place: degrees west, south, east, north."""
    named_shapes = [gazetteer.geometry[s] for sample in samples for s in sample.counts if s in gazetteer.geometry]
    shapes = named_shapes or list(gazetteer.geometry.values())
    west, south, east, north = shapely.total_bounds([*shapes, *([shapely.Point(at[1], at[0])] if at else [])])
    x, y = (west + east) / 2, (south + north) / 2
    half = max((east - west) * squeeze(y), north - south) * (1 + MARGIN) / 2
    return x - half / squeeze(y), y - half, x + half / squeeze(y), y + half


def _caption(sample: SampledAnswers, gazetteer: Gazetteer, at: tuple[float, float] | None) -> str:
    distance_m = spread_m(sample, gazetteer, *at) if at else None
    streets = f"{sample.valid:.0%} of {sample.answers} answers name a street, {len(sample.counts)} different"
    return streets if distance_m is None else f"{streets}\n{distance_m:,.0f} m from the place on average"


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
        raise InputError(
            f"--samples {args.samples} --temperature {args.temperature:g}: give at least 1 sample and a temperature above 0."
        )
    try:
        photo = Image.open(args.photo).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{args.photo} is not a photo that can be read ({error}): give another one.") from None
    at = None
    if args.at:
        try:
            lat, lon = map(float, args.at.split(","))
        except ValueError:
            raise InputError(f"--at {args.at}: write it as latitude,longitude in degrees.") from None
        at = (lat, lon)
    models = [parse_model_flag(flag) for flag in args.model]
    localizers = [Localizer(folder) for _, folder in models]
    city = Gazetteer.load(args.gazetteer) if args.gazetteer else next((m.gazetteer for m in localizers if m.gazetteer), None)
    if city is None or not city.geometry:
        raise InputError(f"no streets to draw: give --gazetteer, the dataset's {GAZETTEER_FILE}, or a trained model.")
    samples = sample_all(localizers, photo, city, args.samples, args.temperature, args.seed)
    names = [name for name, _ in models]
    draw_belief_map(names, samples, city, args.out, at, photo)
    for name, sample in zip(names, samples, strict=True):
        top = ", ".join(f"{street} {count / sample.answers:.0%}" for street, count in sample.counts.most_common(5))
        print(f"{name}: {_caption(sample, city, at).replace(chr(10), ', ')}: {top or 'none'}")
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
