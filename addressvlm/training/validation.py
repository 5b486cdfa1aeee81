"""The metrics of evaluation on a few photos of the split `val`, asked of the model as it stands in the middle of training."""

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
from addressvlm.models.loading import resolve_model
from addressvlm.models.lora import freeze_batchnorm
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run
from addressvlm.training.loss import autocast

FEWEST_RESAMPLES = 1  # intervals are left to evaluation


class Validation:
    """Asks all questions of `train.validate_photos` photos, each worker those of its share.

    Raises:
        InputError: the run has no photos of the split `val`.
    """

    def __init__(self, config: Config, processor: Any, alike: bool = False) -> None:
        """Draw the photos.

        Args:
            alike: every worker asks about all photos, for a model whose weights are cut is run by all workers together.
        """
        run = Run(config)
        ids = sorted(tables.read_table(run.photos, "val", ["id"])["id"].to_pylist())
        drawn = set(random.Random(config.seed).sample(ids, min(config.train.validate_photos, len(ids))))
        self.photos = [row for row in tables.iter_rows(run.photos, "val", COLUMNS) if row["id"] in drawn]
        gazetteer = Gazetteer.load(run.gazetteer)
        self.judge = Judge(gazetteer.streets, gazetteer.districts, gazetteer.variants)
        self.config, self.processor, self.alike = config, processor, alike

    def __call__(self, model: Any) -> dict[str, float]:
        """The metrics that were asked about, shares between 0 and 1; every worker calls it and gets the same."""
        alone = self.alike or not dist.is_initialized()
        rank, world = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        device = str(next(model.parameters()).device)
        asked = self.config.evaluate.model_copy(update={"answers": "free", "temperature": 0.0})
        side = self.processor.tokenizer.padding_side
        model.eval()
        try:
            localizer = Localizer(
                resolve_model(self.config.model.base), device, loaded=(model.get_base_model(), self.processor)
            )
            with torch.inference_mode(), autocast(torch.device(device), localizer.model.dtype, self.config.train.precision):
                rows = [row for batch in run_questions(localizer, self.photos[rank::world], asked, 0) for row in batch]
        finally:
            self.processor.tokenizer.padding_side = side
            model.train()
            freeze_batchnorm(model)
        answers = _gathered(judge_answers(rows, self.judge), world)
        found = compute_metrics(answers, FEWEST_RESAMPLES)
        return {name: float(cell["value"]) for name, cell in found.items() if cell["value"] is not None}


def _gathered(rows: list[Any], world: int) -> list[Any]:
    if world == 1:
        return rows
    of_all: list[Any] = [None] * world
    dist.all_gather_object(of_all, rows)
    return [row for of_one in of_all for row in of_one]
