"""The card of a row of a comparison that has no model folder: what it is, what it is made of, data, cost, metrics, limits.

Such are rows of the kinds retrieval, rag, likelihood, fusion and prior. The others' cards: `baselines.clip_card`, `models.card`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from addressvlm.config import Config
from addressvlm.config.compare import EncoderConfig, FusionConfig, LikelihoodConfig, PriorConfig, RagConfig, RetrievalConfig
from addressvlm.evaluation.comparison import COSTS, costs
from addressvlm.evaluation.decoding_comparison import prior_words
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import ELSEWHERE, PEOPLE, attributed, front_matter, metrics_section
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, slug

NOT_SAID = "not said"
UNUSABLE = ("empty", "refused", "out of range", "swapped")  # what a reply of a language model can be, see `rag_reply`

Kind = LikelihoodConfig | RetrievalConfig | RagConfig | FusionConfig | PriorConfig
Notes = Mapping[str, Any]


@dataclass(frozen=True)
class SystemDescription:
    """What only one kind of row can say of itself.

    Attributes:
        what: it is.
        made_of: lines, one a part.
        limits: in sentences.
    """

    what: str
    made_of: list[str]
    limits: str


def system_card(config: Config, rival: Kind, told: Mapping[str, Any], photos: str) -> str:
    """The card's text.

    Args:
        told: what comparison.json holds of the row.
        photos: which photos its metrics are of.
    """
    run = Run(config)
    gazetteer = Gazetteer.load(run.gazetteer)
    city, addresses = gazetteer.city or config.name, len(gazetteer.addresses)
    of, licences = _about(config, rival, told["notes"], addresses), told["licences"]
    different = set(licences.values())
    licence = different.pop() if len(different) == 1 else None
    lines = [
        front_matter({"tags": ["addressvlm", "image-geolocation", rival.kind]}, None if licence == NOT_SAID else licence),
        f"# {city}: {rival.name}",
        of.what,
        "## Made of",
        "\n".join(f"- {part}" for part in of.made_of),
        "## Data and licences",
        f"{tables.count_rows(run.photos, 'train'):,} training photos and {addresses:,} addresses. "
        + attributed(gazetteer.attribution),
        "Licences of what it is made of: " + ("; ".join(f"{n}: {said}" for n, said in licences.items()) or NOT_SAID) + ".",
        "## Cost",
        _cost(told),
        "## Metrics",
        metrics_section(told["metrics"], photos),
        "## Limits",
        f"{of.limits} {ELSEWHERE}. {PEOPLE}",
    ]
    return "\n\n".join(lines) + "\n"


def _cost(told: Mapping[str, Any]) -> str:
    """What is known of it, a line each."""
    took = dict(zip(COSTS, costs(told), strict=True))
    lines = {
        "stored": "{} to keep",
        "trained": "{} numbers trained",
        "training": "{} of training and making the index",
        "ms a photo": "{} ms a photo, the start of workers included",
    }
    return "\n".join(f"- {line.format(took[of])}" for of, line in lines.items() if took[of] != "–") or "Not measured."


def _about(config: Config, rival: Kind, notes: Notes, addresses: int) -> SystemDescription:
    """What a row says of itself; `notes` as in comparison.json, `addresses`: how many the city has."""
    match rival:
        case LikelihoodConfig():
            return _scored(config, rival, addresses)
        case RetrievalConfig():
            return _retrieval(config, rival, notes)
        case RagConfig():
            return _rag(config, rival, notes)
        case FusionConfig():
            return _fusion(rival, notes)
        case PriorConfig():
            return _prior(rival, notes, addresses)


def _scored(config: Config, rival: LikelihoodConfig, addresses: int) -> SystemDescription:
    tuned = any(system.name == rival.of and system.stages for system in config.train.systems)
    base = f"`{config.model.base}`"
    tuned_model = [f"model: `models/{slug(rival.of)}/merged` of the run, which has a card of its own", f"base: {base}"]
    return SystemDescription(
        f"{rival.of}, answering by its probabilities of all addresses instead of its own words: two passes through the model a "
        "photo, from which generation, judgment and choice all follow.",
        tuned_model if tuned else [f"model: {base}, never tuned"],
        f"It always names one of {addresses:,} addresses.",
    )


def _retrieval(config: Config, rival: RetrievalConfig, notes: Notes) -> SystemDescription:
    found = "of the most similar training photo"
    if rival.neighbours > 1:
        found = f"of the {rival.neighbours} most similar training photos, each voting with its similarity"
    return SystemDescription(
        f"Image -> GPS -> address (paper 002, Sec. 6.5): the coordinates {found}, reverse geocoded.",
        [*_gallery(config, rival.encoder, notes), "reverse geocoder: the city's own map"],
        "It learns nothing; it answers with what is at the coordinates of a photo in the gallery, so it needs photos of every "
        "address.",
    )


def _rag(config: Config, rival: RagConfig, notes: Notes) -> SystemDescription:
    own = any(system.name == rival.model for system in config.train.systems)
    model = f"the system {rival.model} of the run" if own and not rival.endpoint else f"`{rival.model or config.model.base}`"
    unusable = ", ".join(f"{why} {notes[why]:,}" for why in UNUSABLE if notes.get(why)) or "none"
    listed = "addresses" if rival.ask == "addresses" else f"coordinates ({'degrees' if rival.degrees == 'dms' else 'decimal'})"
    sent = " Photos are sent to the endpoint." if rival.endpoint else ""
    return SystemDescription(
        "A language model that sees the photo and reads where similar and dissimilar training photos were taken (paper 004).",
        [
            f"model: {model}{', at an endpoint' if rival.endpoint else ''}",
            *_gallery(config, rival.encoder, notes),
            f"prompt: {rival.similar} similar and {rival.dissimilar} dissimilar ({rival.strategy}) photos, {rival.order}, as "
            f"{rival.form}; asked for {listed}",
            f"reply: at most {rival.max_new_tokens} tokens, temperature {rival.temperature:g}; of {notes.get('replies', 0):,} "
            f"replies not usable as they were: {unusable}",
        ],
        "It answers in its own words, which can't always be read. It is asked to name and not to judge or choose, so A, A_d "
        f"and A_s are not those of rows that are asked everything.{sent}",
    )


def _fusion(rival: FusionConfig, notes: Notes) -> SystemDescription:
    weights = {name.removeprefix("weight of "): weight for name, weight in notes.items() if name.startswith("weight of ")}
    return SystemDescription(
        f"{', '.join(rival.of[:-1])} and {rival.of[-1]} as one: ln p = sum of w ln p, weights fitted on the split val.",
        [f"{name}: weight {weight:.3g}" for name, weight in weights.items()],
        "It needs all of its rows, and a photo takes as long as in all of them together. The weights hold for these trainings "
        "in this city.",
    )


def _prior(rival: PriorConfig, notes: Notes, addresses: int) -> SystemDescription:
    off = " A GPS fix is drawn so that the place is within its radius in 95 of 100 photos." if rival.gps_m else ""
    return SystemDescription(
        f"{rival.of}, with something known of each photo beforehand: {prior_words(rival)} (paper 002, D.1, Table 12).",
        [
            f"scores of {rival.of}, which says what it is made of",
            f"prior: {prior_words(rival)}; it leaves {notes.get('addresses left', addresses):.1f} of {addresses:,} addresses on "
            f"average, rules out nothing for {notes.get('nothing ruled out', 0):,} photos and the true address of "
            f"{notes.get('true address ruled out', 0):,} photos",
        ],
        f"What is known is drawn from each photo's true address: the figures hold for someone who does know it.{off}",
    )


def _gallery(config: Config, encoder: EncoderConfig, notes: Notes) -> list[str]:
    aside = f" ({notes['set_aside']:,} set aside, which have no coordinates)" if notes.get("set_aside") else ""
    return [
        f"image encoder: `{encoder.base or config.model.base}`",
        f"gallery: {notes.get('gallery', 0):,} training photos{aside}",
    ]
