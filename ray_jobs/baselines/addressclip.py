"""AddressCLIP (paper 002) in a comparison: trained with Ray Train, then every photo is scored.

Writes below <storage>/<name>: models/<system> (the dual encoder), training/<system> (checkpoints, loss.jsonl) and
scores/<system>.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from addressvlm.baselines import addressclip
from addressvlm.baselines.addressclip import clip_licence
from addressvlm.baselines.addressclip_data import EXPLAINED, caption_texts
from addressvlm.baselines.dual_encoder import AddressIndex, build_dual_encoder, open_encoder
from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig
from addressvlm.storage import tables
from addressvlm.storage.remote_path import list_files, path_of
from addressvlm.storage.run_dir import begin_or_resume, is_done, mark_done
from ray_jobs import evaluation, label, prepare
from ray_jobs.baselines.system import ComparisonContext, System, SystemOutcome, worker_resources
from ray_jobs.cluster import wait_for_workers
from ray_jobs.common import absolute_path
from ray_jobs.evaluation import PhotoModel, Row
from ray_jobs.ray_train import CheckpointReporter, run_training, run_worker, training_workers


class AddressClipSystem(System[AddressClipConfig]):
    """A dual encoder whose nearest address text is the answer."""

    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        config, folder = context.config, context.run.model_dir(self.name)
        depends_on = settings(config, self.settings)
        if not is_done(folder, depends_on, redo):
            if self.settings.epochs:
                self.train(context, depends_on, redo)
            else:
                self.keep_untrained(context, depends_on)
        model, start = DualEncoderModel(str(folder), context.gazetteer, config), time.monotonic()
        outputs = evaluation.scores_of(context.task, self.name, model, context.ids)
        if evaluation.run_model(f"compare: {self.name}", config, context.run.photos, outputs, redo):
            cost = {"seconds": time.monotonic() - start, "photos": sum(map(len, context.ids.values()))}
            context.save_cost(self.name, "answering", {**cost, **worker_resources(config)})
        trained = addressclip.trained_parameters(folder)
        return SystemOutcome(
            scores=context.task.scores(self.name, context.ids),
            parameters=trained["parameters"],
            stored_bytes=sum(file.stat().st_size for file in list_files(folder, "*.safetensors")),
            licences={self.settings.base or config.model.base: clip_licence(config, self.settings) or "not stated"},
            notes={"steps": trained["steps"], "photos without a caption": trained["without_caption"]},
            model=folder,
        )

    def keep_untrained(self, context: ComparisonContext, depends_on: Row) -> None:
        """Save the base as it is."""
        config = context.config
        encoder = build_dual_encoder(self.settings.base, config.model.base, config.model.dtype, config.training_seed)
        figures = {"parameters": 0, "steps": 0, "without_caption": 0}
        addressclip.save_dual_encoder(config, self.settings, encoder, figures)
        mark_done(context.run.model_dir(self.name), depends_on)

    def train(self, context: ComparisonContext, depends_on: Row, redo: bool) -> None:
        """Train the dual encoder."""
        config, need, run = context.config, context.config.train, context.run
        wait_for_workers(training_workers(config, self.name), config.cluster.wait_s)
        caption_texts(run, self.settings.captions)
        begin_or_resume(run.training_dir(self.name), depends_on, redo)
        base = self.settings.base and absolute_path(self.settings.base)
        resources = {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}
        with context.measure_cost(self.name, "training", tables.count_rows(run.photos, "train"), resources):
            arguments = {"system": self.settings.model_copy(update={"base": base}).model_dump()}
            run_training(config, self.name, train_worker, arguments)
        mark_done(run.model_dir(self.name), depends_on)


def settings(config: Config, system: AddressClipConfig) -> dict[str, Any]:
    """What the trained model depends on."""
    labels = config.labels.model_copy(update={"prompt": "reasoning"}) if system.captions == "reasoning" else config.labels
    data = (label if system.captions in EXPLAINED else prepare).settings(config.model_copy(update={"labels": labels}))
    train = config.train.model_dump(include={"workers", "precision", "seed"}, exclude_none=True)
    return {**data, "base": config.model.base, "dtype": config.model.dtype, "train": train, "system": system.model_dump()}


def train_worker(arguments: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    system = AddressClipConfig.model_validate(arguments["system"])

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        addressclip.train_addressclip(config, system, checkpoint, CheckpointReporter(), device)

    run_worker(arguments, work)


class DualEncoderModel(PhotoModel):
    """A dual encoder, which compares photos with the addresses."""

    def load(self) -> AddressIndex:
        """The addresses, encoded by the dual encoder."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AddressIndex(open_encoder(path_of(self.model), self.config.model.dtype, device), self.city.addresses)

    def address_scores(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Similarities, float64 (images, addresses)."""
        scores: np.ndarray = self.loaded.scores(images)
        return scores
