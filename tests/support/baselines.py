"""A tiny image encoder, and a run whose photos are coloured by their address, for tests of the systems compared."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from addressvlm.config import Config, validate
from addressvlm.evaluation.parsing import Judge
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import evaluation_rounds
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from ray_jobs import evaluation
from ray_jobs.baselines.system import ComparisonContext
from ray_jobs.evaluation import EvaluationTask
from tests.support.training_tables import STREETS, picture

DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "mlp_ratio": 2}
ADDRESSES = [Address(street, "Harbour") for street in STREETS]
GAZETTEER = Gazetteer(ADDRESSES)


def tiny_dino(folder: Path, seed: int = 0) -> Path:
    """Write a random DINOv2 and its image processor into `folder` and return it."""
    torch.manual_seed(seed)
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    return folder


def where(address: int, place: int) -> tuple[float, float]:
    """Addresses are a kilometre apart, places on one eleven metres."""
    return 52.2 + address / 100 + place / 10_000, 0.12


def photo(split: str, number: int, known: bool = True) -> dict[str, Any]:
    """A row of `tables.PHOTOS` whose colour is its street."""
    import random

    at = number % len(ADDRESSES)
    lat, lon = where(at, number) if known else (None, None)
    return {
        "id": f"{split}{number}", "place": f"{split}{number}", "lat": lat, "lon": lon,
        "image": picture(STREETS[ADDRESSES[at].street]), "street": ADDRESSES[at].street, "district": "Harbour",
        "rounds": evaluation_rounds(ADDRESSES[at], GAZETTEER, random.Random(number)),
    }  # fmt: skip


def comparison_in(folder: Path, base: Path | str, training: list[dict[str, Any]], **settings: Any) -> ComparisonContext:
    """A prepared run of coloured photos: six to ask about, and those to train on."""
    config = validate(
        {"name": "r", "storage": str(folder), "model": {"base": str(base)}, "city": {"manifest": "none.csv"}, **settings},
        "test",
    )
    run = Run(config)
    test = [photo("test", number) for number in range(6)]
    for split, rows in (("train", training), ("test", test)):
        tables.write_table(run.photos, split, rows, tables.PHOTOS)
    GAZETTEER.save(run.gazetteer)
    task = evaluation.open_task(config, run.photos, "test", run.folder)
    return ComparisonContext(run, task, {"test": task.ids})


def run_in(folder: Path, **evaluate: Any) -> Config:
    """A run of coloured photos: 30 to learn from, 12 held out, 9 to test on."""
    config = validate({"name": "r", "storage": str(folder), "seed": 3, "evaluate": evaluate}, "test")
    for split, count in (("train", 30), ("val", 12), ("test", 9)):
        tables.write_table(Run(config).photos, split, [photo(split, number) for number in range(count)], tables.PHOTOS)
    GAZETTEER.save(Run(config).gazetteer)
    return config


def task_of(config: Config, **changes: Any) -> EvaluationTask:
    run = Run(config)
    values = {"config": config, "data": run.photos, "split": "test", "out": run.folder, "ids": [f"test{n}" for n in range(9)]}
    return EvaluationTask(**{**values, "gazetteer": GAZETTEER, "judge": Judge([], []), **changes})


def scores_of(config: Config, split: str, wrong: float = 0.2, seed: int = 0) -> list[dict[str, Any]]:
    """Scores that are mostly right."""
    rng, rows = np.random.default_rng(seed), []
    for row in tables.iter_rows(Run(config).photos, split, ["id", "place", "lat", "lon", "street", "district"]):
        at = GAZETTEER.addresses.index(Address(row["street"], row["district"]))
        result = rng.normal(size=3) + (np.arange(3) == (at + (rng.random() < wrong)) % 3)
        rows.append({**row, "scores": result.tolist()})
    return rows
