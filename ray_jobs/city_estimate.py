"""What many cities will take, before anything is done: photos, storage, money for labels, hours of training."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import torch

from addressvlm.config import Config
from addressvlm.config.world import World
from addressvlm.labels.costs import CHAT_TOKENS, image_tokens, text_tokens
from addressvlm.labels.prompt import configured_prompt
from addressvlm.models.loading import autocast
from addressvlm.storage import tables
from addressvlm.storage.remote_path import path_of
from addressvlm.storage.run_dir import Run
from addressvlm.training.memory_estimate import estimate_stages, model_shape
from addressvlm.training.metrics_logger import peak_flops
from ray_jobs import train

PHOTO_BYTES, GRAFT_BYTES, LABEL_BYTES = 64_236, 20_426, 20_458  # a row of each table, measured: docs/scale.md
FACTS_TOKENS = 200  # of the facts in a prompt, about


def count_photos(config: Config) -> int | None:
    """Photos of a city: those prepared, else the rows of its table; None where it would take reading all photos."""
    run = Run(config)
    if (run.photos / "card.json").is_file():
        return sum(tables.count_rows(run.photos, split) for split in ("train", "val", "test"))
    if config.city.toy or not config.city.manifest:
        return None
    path = path_of(config.city.manifest)
    if not path.is_file():
        return None
    if path.suffix == ".parquet":
        with path.open("rb") as file:
            return int(pq.read_metadata(file).num_rows)
    if path.suffix in (".csv", ".tsv") and isinstance(path, Path):
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return max(0, sum(1 for _ in csv.reader(file)) - 1)
    return None


def label_cost(config: Config) -> tuple[float, float | None]:
    """Tokens and dollars of one label, at most, if an endpoint writes them; None without prices."""
    labels = config.labels
    if labels.labeler != "openai":
        return 0.0, 0.0
    opening = "".join(message["content"] for message in configured_prompt(labels).opening_messages())
    pixels = config.tiles.pixels
    tokens_in = image_tokens(labels, pixels, pixels) + text_tokens(opening) + FACTS_TOKENS + CHAT_TOKENS
    if labels.usd_per_million_in is None or labels.usd_per_million_out is None:
        return tokens_in + labels.max_tokens, None
    usd = (labels.usd_per_million_in * tokens_in + labels.usd_per_million_out * labels.max_tokens) / 1e6
    return tokens_in + labels.max_tokens, usd


def print_world_estimate(world: World, names: Sequence[str], only: list[str] | None, photos: int | None) -> None:
    """Print the estimate.

    Args:
        photos: how many a city has where `count_photos` can't tell; None leaves such cities out.
    """
    counts = {name: count_photos(world.cities[name]) or photos for name in names}
    unknown = [name for name, count in counts.items() if count is None]
    known = {name: count for name, count in counts.items() if count is not None}
    for name, count in known.items():
        print(f"{name}: {count:,} photos", flush=True)
    if unknown:
        print(f"not counted: {', '.join(unknown)} (give --photos N for each of them)", flush=True)
    rows = {name: count * world.cities[name].city.split.train for name, count in known.items()}  # to train on
    total, training = sum(known.values()), sum(rows.values())
    storage = total * PHOTO_BYTES + training * (GRAFT_BYTES + LABEL_BYTES)
    cities = f"{len(known)} {'city' if len(known) == 1 else 'cities'}"
    print(f"{cities}: {total:,} photos, about {training:,.0f} to train on, {storage / 1e9:,.1f} GB of tables", flush=True)
    costs = {name: label_cost(world.cities[name]) for name in known}
    tokens = sum(rows[name] * cost for name, (cost, _) in costs.items())
    if any(usd is None for _, usd in costs.values()):
        money = "unknown cost without labels.usd_per_million_in and labels.usd_per_million_out"
    else:
        money = f"at most {sum(rows[name] * (usd or 0) for name, (_, usd) in costs.items()):,.4g} US dollars"
    print(f"labels: {tokens:,.0f} tokens, {money}, for one request a photo", flush=True)
    print(_training_hours(world, known, only), flush=True)


def _training_hours(world: World, counts: dict[str, int], only: list[str] | None) -> str:
    """PFLOP and hours of all trainings as a line, by the mean of the photo counts."""
    config, settings = world.base, world.base.train
    shape, systems = model_shape(config), train.select_systems(config, only)
    mean = round(sum(counts.values()) * config.city.split.train / max(len(counts), 1))
    device = torch.device("cuda" if settings.gpus_per_worker and torch.cuda.is_available() else "cpu")
    bfloat16 = autocast(device, getattr(torch, config.model.dtype), settings.precision)._enabled
    peak = peak_flops(device, torch.bfloat16 if bfloat16 else torch.float32, settings.peak_tflops)
    stages = [
        stage for system in systems for stage in estimate_stages(config, system, shape, mean, cpu=not settings.gpus_per_worker)
    ]
    flops = len(counts) * sum((stage.steps or 0) * stage.rows_per_step * stage.flops for stage in stages)
    unit = "GPU" if settings.gpus_per_worker else "worker"
    work = f"training: {len(counts)} times {', '.join(system.name for system in systems)}: {flops / 1e15:,.3g} PFLOP"
    if not peak:
        return f"{work}; set train.peak_tflops for hours"
    return f"{work}, about {flops / (settings.mfu * peak) / 3600:,.3g} {unit} hours at {settings.mfu:.0%} of the peak"
