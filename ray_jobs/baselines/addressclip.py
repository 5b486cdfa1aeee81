"""AddressCLIP (paper 002) as a row of a comparison: trained with Ray Train, then every photo's scores with Ray Data.

Writes below <storage>/<name>: models/<row> (the dual encoder), training/<row> (checkpoints, loss.jsonl), rivals/scores/<row>.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from addressvlm.baselines import addressclip
from addressvlm.baselines.addressclip import clip_licence
from addressvlm.baselines.addressclip_data import caption_texts
from addressvlm.baselines.dual_encoder import AddressIndex, open_encoder
from addressvlm.config import Config
from addressvlm.config.compare import AddressClipConfig
from addressvlm.evaluation import likelihood
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.storage import tables
from addressvlm.storage.remote_path import list_files, path_of
from addressvlm.storage.run_dir import begin_or_resume, is_done, mark_done, slug
from ray_jobs import evaluation, label, prepare
from ray_jobs.baselines.context import ComparisonContext, Row, SystemOutcome
from ray_jobs.common import absolute_path
from ray_jobs.evaluation import PHOTOS_SCORED, ModelWorker, model_digest
from ray_jobs.ray_train import CheckpointReporter, require_workers, run_training, run_worker


def run(work: ComparisonContext, rival: AddressClipConfig, redo: bool = False) -> SystemOutcome:
    """Train the dual encoder if it is not, and score the photos.

    Raises:
        InputError: the model or the captions are missing, the cluster is too small, or nothing can be learnt.
    """
    config, folder = work.config, work.run.model_dir(rival.name)
    made_from = settings(config, rival)
    if not is_done(folder, made_from, redo):
        _train(work, rival, made_from, redo)
    need = config.evaluate
    photos, workers = sum(map(len, work.ids.values())), need.workers
    out = work.run.folder / "rivals"
    asked = {"model": model_digest(str(folder)), "gazetteer": [address.text() for address in work.gazetteer.addresses]}
    given = (config, out, rival.name, str(folder), work.run.photos, work.ids, asked, work.gazetteer)
    done = is_done(out / "scores" / slug(rival.name), {**asked, "photos": {s: len(ids) for s, ids in work.ids.items()}}, redo)
    if done:
        found = evaluation.score_addresses(*given, redo=False, scorer=AddressClipScorer)
    else:
        with work.cost(rival.name, "answering", photos, workers * need.cpus_per_worker, workers * need.gpus_per_worker):
            found = evaluation.score_addresses(*given, redo=redo, scorer=AddressClipScorer)
    learnt = addressclip.trained_parameters(folder)
    return SystemOutcome(
        scores=found,
        parameters=learnt["parameters"],
        stored_bytes=sum(file.stat().st_size for file in list_files(folder, "*.safetensors")),
        licences={rival.base or config.model.base: clip_licence(config, rival) or "not said"},
        notes={"steps": learnt["steps"], "photos without a caption": learnt["without_caption"]},
        model=folder,
    )


def settings(config: Config, rival: AddressClipConfig) -> dict[str, Any]:
    """What the trained model depends on."""
    made_from = (label if rival.captions == "alignment" else prepare).settings(config)
    train = config.train.model_dump(include={"workers", "precision", "seed"}, exclude_none=True)
    return {**made_from, "base": config.model.base, "dtype": config.model.dtype, "train": train, "rival": rival.model_dump()}


def _train(work: ComparisonContext, rival: AddressClipConfig, made_from: dict[str, Any], redo: bool) -> None:
    config, need = work.config, work.config.train
    require_workers(config, rival.name)
    caption_texts(work.run, rival.captions)
    begin_or_resume(work.run.training_dir(rival.name), made_from, redo)
    given = rival.model_copy(update={"base": rival.base and absolute_path(rival.base)}).model_dump()
    photos = tables.count_rows(work.run.photos, "train")
    cpus, gpus = need.workers * need.cpus_per_worker, need.workers * need.gpus_per_worker
    with work.cost(rival.name, "training", photos, cpus, gpus):
        run_training(config, rival.name, train_worker, {"rival": given})
    mark_done(work.run.model_dir(rival.name), made_from)


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    rival = AddressClipConfig.model_validate(given["rival"])

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        addressclip.train_addressclip(config, rival, checkpoint, CheckpointReporter(), device)

    run_worker(given, work)


class AddressClipScorer(ModelWorker):
    """Compares its photos with the addresses; rows of SCORES."""

    columns, schema = likelihood.COLUMNS, tables.SCORES

    @staticmethod
    def opened(model: str, city: Gazetteer, config: Config) -> Any:
        """The addresses, with the dual encoder that encoded them."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return AddressIndex(open_encoder(path_of(model), config.model.dtype, device), city.addresses)

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The scores."""
        return likelihood.score_photos(self.load().scores, photos, PHOTOS_SCORED)
