"""The card that travels with a trained dual encoder: base, data, licences, how it was trained, how to use it."""

from addressvlm import tables
from addressvlm.addresses import Gazetteer
from addressvlm.config import Config
from addressvlm.config_compare import AddressClipConfig
from addressvlm.models.card import ELSEWHERE, PEOPLE, attributed, base_licence, front, unmeasured
from addressvlm.run import Run

USE = """from pathlib import Path

from PIL import Image

from addressvlm.addresses import Gazetteer
from addressvlm.answers.beliefs import Beliefs
from addressvlm.baselines.candidates import Candidates
from addressvlm.baselines.dual_encoder import open_encoder

folder = Path("<this folder>")
city = Gazetteer.load(folder / "gazetteer.geojson")
scores = Candidates(open_encoder(folder), city.addresses).scores([Image.open("photo.jpg").convert("RGB")])
print(Beliefs(city.addresses, scores[0]).ranked(3))"""


def licence_of(config: Config, rival: AddressClipConfig) -> str | None:
    """The licence of the model that it was made of, as its own card says."""
    base = rival.base or config.model.base
    return base_licence(config.model_copy(update={"model": config.model.model_copy(update={"base": base})}))


def card(config: Config, rival: AddressClipConfig, steps: int, parameters: int) -> str:
    """The card's text."""
    run = Run(config)
    gazetteer, base = Gazetteer.load(run.gazetteer), rival.base or config.model.base
    city = gazetteer.city or config.name
    head = {"library_name": "transformers", "base_model": base, "tags": ["addressvlm", "image-geolocation", "addressclip"]}
    trained = " and ".join(name for name, on in (("image", rival.train_image), ("text", rival.train_text)) if on) or "neither"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in rival.weights.model_dump().items())
    lines = [
        front(head, licence_of(config, rival)),
        f"# {city}: a photo and its address as neighbouring vectors",
        f"`{base}`, taught {city} by AddressCLIP's losses ({weights}; captions: {rival.captions}). It compares a photo with "
        f"the texts of the {len(gazetteer.addresses):,} addresses that it is given. It knows no other city.",
        "## Data",
        f"{tables.count(run.photos, 'train'):,} photos. {attributed(gazetteer.attribution)}",
        "## Training",
        f"{steps:,} steps of {rival.batch_size * config.train.workers:,} photos, encoders trained: {trained}, learning rate "
        f"{rival.learning_rate:g}, of new projections {rival.projection_learning_rate:g}; {parameters:,} numbers learnt, seed "
        f"{config.training_seed}. All settings are in `_done.json`.",
        "## Metrics",
        unmeasured("compare"),
        "## Use",
        f"```python\n{USE}\n```",
        f"{ELSEWHERE}. {PEOPLE}",
    ]
    return "\n\n".join(lines) + "\n"
