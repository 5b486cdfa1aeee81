"""AddressCLIP (paper 002) as a row of a comparison: trained with Ray Train, then every photo's scores with Ray Data.

Writes below <storage>/<name>: models/<row> (the dual encoder), training/<row> (checkpoints, loss.jsonl), rivals/scores/<row>.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from addressvlm import tables
from addressvlm.addresses import Gazetteer
from addressvlm.baselines import addressclip
from addressvlm.baselines.candidates import Candidates
from addressvlm.baselines.captions import captions_of
from addressvlm.baselines.clip_card import licence_of
from addressvlm.baselines.dual_encoder import open_encoder
from addressvlm.config import Config
from addressvlm.config_compare import AddressClipConfig
from addressvlm.evaluation import scores
from addressvlm.run import claim, is_done, mark_done, slug
from addressvlm.stores import files_in, path_of
from ray_jobs import label, prepare, scoring
from ray_jobs.answering import model_digest
from ray_jobs.asking import PHOTOS_SCORED, Holder
from ray_jobs.common import absolute
from ray_jobs.fitting import Reporter, fit, guarded, require_workers
from ray_jobs.rivals.work import Outcome, Row, Work


def run(work: Work, rival: AddressClipConfig, redo: bool = False) -> Outcome:
    """Train the dual encoder if it is not, and score the photos.

    Raises:
        InputError: the model or the captions are missing, the cluster is too small, or nothing can be learnt.
    """
    config, folder = work.config, work.run.model(rival.name)
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
        found = scoring.score(*given, redo=False, scorer=Scorer)
    else:
        with work.cost(rival.name, "answering", photos, workers * need.cpus_per_worker, workers * need.gpus_per_worker):
            found = scoring.score(*given, redo=redo, scorer=Scorer)
    learnt = addressclip.learnt_of(folder)
    return Outcome(
        scores=found,
        parameters=learnt["parameters"],
        stored_bytes=sum(file.stat().st_size for file in files_in(folder, "*.safetensors")),
        licences={rival.base or config.model.base: licence_of(config, rival) or "not said"},
        notes={"steps": learnt["steps"], "photos without a caption": learnt["without_caption"]},
        model=folder,
    )


def settings(config: Config, rival: AddressClipConfig) -> dict[str, Any]:
    """What the trained model depends on."""
    made_from = (label if rival.captions == "alignment" else prepare).settings(config)
    train = config.train.model_dump(include={"workers", "precision", "seed"}, exclude_none=True)
    return {**made_from, "base": config.model.base, "dtype": config.model.dtype, "train": train, "rival": rival.model_dump()}


def _train(work: Work, rival: AddressClipConfig, made_from: dict[str, Any], redo: bool) -> None:
    config, need = work.config, work.config.train
    require_workers(config, rival.name)
    captions_of(work.run, rival.captions)
    claim(work.run.journal(rival.name), made_from, redo)
    given = rival.model_copy(update={"base": rival.base and absolute(rival.base)}).model_dump()
    photos = tables.count(work.run.photos, "train")
    cpus, gpus = need.workers * need.cpus_per_worker, need.workers * need.gpus_per_worker
    with work.cost(rival.name, "training", photos, cpus, gpus):
        fit(config, rival.name, train_worker, {"rival": given})
    mark_done(work.run.model(rival.name), made_from)


def train_worker(given: dict[str, Any]) -> None:
    """What each worker of the group runs."""
    rival = AddressClipConfig.model_validate(given["rival"])

    def work(config: Config, checkpoint: Path | None, device: torch.device) -> None:
        addressclip.train(config, rival, checkpoint, Reporter(), device)

    guarded(given, work)


class Scorer(Holder):
    """Compares its photos with the addresses; rows of SCORES."""

    columns, schema = scores.COLUMNS, tables.SCORES

    @staticmethod
    def opened(model: str, city: Gazetteer, config: Config) -> Any:
        """The addresses, with the dual encoder that encoded them."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Candidates(open_encoder(path_of(model), config.model.dtype, device), city.addresses)

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The scores."""
        return scores.score(self.load().scores, photos, PHOTOS_SCORED)
