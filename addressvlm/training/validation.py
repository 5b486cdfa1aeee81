"""Validation in the middle of training: evaluation's metrics on a few photos of the split `val`."""

import random
from typing import Any

import torch
import torch.distributed as dist

from addressvlm.config import Config
from addressvlm.evaluation.metrics import compute_metrics
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import COLUMNS, judge_answers, run_questions
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.inference import Localizer
from addressvlm.models.loading import autocast, resolve_model
from addressvlm.models.lora import freeze_batchnorm
from addressvlm.storage.run_dir import Run
from addressvlm.training.dataset import TableRows

RESAMPLES = 1  # intervals are left to evaluation


class Validation:
    """Asks all questions about `train.validate_photos` photos of the split `val`.

    Raises:
        InputError: the run has no photos of that split.
    """

    def __init__(self, config: Config, whole_split: bool = False) -> None:
        """Draw the photos.

        Args:
            whole_split: every worker asks about all photos, since a model with sharded weights is run by all workers together;
                otherwise the workers divide them.
        """
        run = Run(config)
        table = TableRows(run.photos, "val", tuple(COLUMNS))
        drawn = sorted(random.Random(config.seed).sample(range(len(table)), min(config.train.validate_photos, len(table))))
        divided = dist.is_initialized() and not whole_split
        rank, world = (dist.get_rank(), dist.get_world_size()) if divided else (0, 1)
        self.photos = [table[row] for row in drawn[rank::world]]
        gazetteer = Gazetteer.load(run.gazetteer)
        self.judge = Judge(gazetteer.streets, gazetteer.districts, gazetteer.variants)
        self.config, self.world = config, world

    def __call__(self, model: Any, processor: Any) -> dict[str, float]:
        """The metrics as shares, 0 to 1; every worker calls it and gets the same."""
        device = next(model.parameters()).device
        settings = self.config.evaluate.model_copy(update={"answers": "free", "temperature": 0.0})
        padding_side = processor.tokenizer.padding_side
        model.eval()
        try:
            base = resolve_model(self.config.model.base)
            localizer = Localizer(base, str(device), loaded=(model.get_base_model(), processor))
            with torch.inference_mode(), autocast(device, localizer.model.dtype, self.config.train.precision):
                batches = run_questions(localizer, self.photos, settings, 0)
                answers = judge_answers([row for batch in batches for row in batch], self.judge)
        finally:
            processor.tokenizer.padding_side = padding_side
            model.train()
            freeze_batchnorm(model)
        by_worker: list[Any] = [answers]
        if self.world > 1:
            by_worker = [None] * self.world
            dist.all_gather_object(by_worker, answers)
        metrics = compute_metrics([row for rows in by_worker for row in rows], RESAMPLES)
        return {name: float(cell["value"]) for name, cell in metrics.items() if cell["value"] is not None}
