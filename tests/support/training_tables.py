"""Small tables to train on: coloured squares whose colour is their street."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm.config import Config, validate
from addressvlm.config.train import TrainConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.checkpoint import TrainingCheckpoint
from addressvlm.training.metrics_logger import StepMetrics
from addressvlm.training.stages import Stage
from addressvlm.training.trainer import AdaptedModel, Report, Trainer

STREETS = {"Mill Street": "red", "Oak Avenue": "blue", "Lake Road": "green"}


def nothing(metrics: dict[str, Any], checkpoint: TrainingCheckpoint | None) -> None:
    """A report that keeps no checkpoint."""


def keeping(kept: list[Path], folder: Path) -> Report:
    """A report that writes every snapshot into a folder of its own and notes it."""

    def keep(metrics: dict, snapshot: TrainingCheckpoint | None) -> None:
        assert snapshot is not None
        kept.append(folder / f"checkpoint{len(kept)}")
        kept[-1].mkdir()
        snapshot.write(kept[-1])

    return keep


class Recorder:
    """Collects the metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []

    def log_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def sync(self) -> None:
        """There is no storage."""


def train_stage(
    model: AdaptedModel, stage: Stage, checkpoint: TrainingCheckpoint | None = None, **settings: Any
) -> list[StepMetrics]:
    """Train a model that is in memory through one stage."""
    trainer = Trainer(TrainConfig(**{"precision": "float32", **settings}), [stage], lambda: model, torch.device("cpu"))
    trainer.logger = recorder = Recorder()  # type: ignore[assignment]
    trainer.fit(checkpoint)
    return recorder.steps


class ListTable:
    """Rows that are in memory, as training reads them."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.starts, self.group_count = rows, np.array([0, len(rows)]), 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]

    def prefetch(self, indices: Iterable[int], keep: int) -> None:
        """They are here."""

    def epoch(self, seed: int, epoch: int, window: int = 1) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self.rows))


def picture(colour: str) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table_rows(count: int) -> list[dict]:
    """`count` rows of a table with the columns that training reads."""
    rows = []
    for number in range(count):
        street, colour = list(STREETS.items())[number % len(STREETS)]
        rounds = [
            {"level": "street", "kind": "generation", "question": "Which street is this?", "answer": street, "options": []},
            {
                "level": "street",
                "kind": "judgment",
                "question": "Is it?",
                "answer": "Yes" if number % 2 else "No",
                "options": [],
            },
        ]
        rows.append({"id": str(number), "place": str(number), "image": picture(colour), "rounds": rounds})
    return rows


def trained_config(tmp_path: Path, base: Path, rows: int = 24, **train: object) -> Config:
    """A run whose photos and alignment tables are written, ready to train on `base`."""
    stage = {"batch_size": 4, "learning_rate": 0.02, "epochs": 2}
    config = validate(
        {
            "name": "small",
            "storage": str(tmp_path / "runs"),
            "model": {
                "base": str(base),
                "vision": {"rank": 2, "alpha": 4},
                "llm": {"rank": 8, "alpha": 16},
                "lora_dropout": 0.1,
            },
            "train": {
                "workers": 1,
                "checkpoint_every": 2,
                "precision": "float32",  # so that runs of different workers agree
                "stages": {"alignment": {"data": "alignment", **stage}, "localization": {"data": "photos", **stage}},
                **train,
            },
        },
        "test",
    )
    run = Run(config)
    schema = tables.with_features(tables.pa.schema([*[tables.PHOTOS.field(c) for c in ("id", "place", "image", "rounds")]]))
    for folder in (run.photos, run.alignment):
        tables.write_table(folder, "train", table_rows(rows), schema)
    Gazetteer([Address(street, "Harbour") for street in STREETS]).save(run.gazetteer)
    return config
