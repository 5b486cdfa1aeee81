"""The card of a system without a model folder (retrieval, rag, likelihood, guess, …): parts, data, cost, metrics, limits.

Cards of models: `models.cards` and `baselines.addressclip`.
"""

from collections.abc import Mapping
from typing import Any

from addressvlm.config import Config
from addressvlm.config.compare import (
    BlindConfig,
    EncoderConfig,
    FusionConfig,
    GuessConfig,
    LikelihoodConfig,
    PriorConfig,
    RagConfig,
    RetrievalConfig,
)
from addressvlm.evaluation.likelihood import prior_words
from addressvlm.evaluation.result_tables import COSTS, cost_cells
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import ELSEWHERE, PEOPLE, attributed, front_matter, metrics_section
from addressvlm.storage import tables
from addressvlm.storage.run_dir import Run, slug

NOT_STATED = "not stated"
UNUSABLE = ("empty", "refused", "out of range", "swapped")  # what can be wrong with a language model's reply

Settings = LikelihoodConfig | RetrievalConfig | RagConfig | GuessConfig | BlindConfig | FusionConfig | PriorConfig
Notes = Mapping[str, Any]
Description = tuple[str, list[str], str]  # what the system is, a line for each of its parts, its limits


def system_card(config: Config, system: Settings, result: Mapping[str, Any], photos: str) -> str:
    """The card's text; `result`: what comparison.json holds of the system, `photos`: which photos its metrics are of."""
    run = Run(config)
    gazetteer = Gazetteer.load(run.gazetteer)
    city, addresses, licences = gazetteer.city or config.name, len(gazetteer.addresses), result["licences"]
    summary, parts, limits = _describe(config, system, result["notes"], addresses)
    different = set(licences.values())
    licence = different.pop() if len(different) == 1 else None
    costs = dict(zip(COSTS, cost_cells(result), strict=True))
    cost_lines = {
        "stored": "{} to store",
        "trained": "{} trained parameters",
        "training": "{} of training and making the index",
        "ms a photo": "{} ms a photo, the start of workers included",
    }
    sections = [
        front_matter({"tags": ["addressvlm", "image-geolocation", system.kind]}, None if licence == NOT_STATED else licence),
        f"# {city}: {system.name}",
        summary,
        "## Parts",
        "\n".join(f"- {part}" for part in parts),
        "## Data and licences",
        f"{tables.count_rows(run.photos, 'train'):,} training photos and {addresses:,} addresses. "
        + attributed(gazetteer.attribution),
        "Licences of its parts: " + ("; ".join(f"{part}: {name}" for part, name in licences.items()) or NOT_STATED) + ".",
        "## Cost",
        "\n".join(f"- {line.format(costs[key])}" for key, line in cost_lines.items() if costs[key] != "–") or "Not measured.",
        "## Metrics",
        metrics_section(result["metrics"], photos),
        "## Limits",
        f"{limits} {ELSEWHERE}. {PEOPLE}",
    ]
    return "\n\n".join(sections) + "\n"


def _describe(config: Config, system: Settings, notes: Notes, addresses: int) -> Description:
    """What depends on the kind of system; `notes`: of comparison.json, `addresses`: how many the city has."""
    match system:
        case LikelihoodConfig():
            parts = [f"model: `{config.model.base}`, not trained"]
            if any(other.name == system.of and other.stages for other in config.train.systems):
                model = f"model: `models/{slug(system.of)}/merged` of the run, which has its own card"
                parts = [model, f"base: `{config.model.base}`"]
            return (
                f"{system.of}, answering by its probabilities of all addresses instead of its own words: two forward passes a "
                "photo, from which generation, judgment and choice all follow.",
                parts,
                f"It always names one of {addresses:,} addresses.",
            )
        case RetrievalConfig():
            source = "of the most similar training photo"
            if system.neighbours > 1:
                source = f"of the {system.neighbours} most similar training photos, each voting with its similarity"
            return (
                f"Image -> GPS -> address (paper 002, Sec. 6.5): the coordinates {source}, reverse geocoded.",
                [*_gallery(config, system.encoder, notes), "reverse geocoder: the city's own map"],
                "It is not trained; it answers with the address of a gallery photo, so it needs photos of every address.",
            )
        case RagConfig():
            return _describe_rag(config, system, notes)
        case GuessConfig():
            rule = "random ones" if system.by == "random" else "the commonest in training, claims by each name's share of Yes"
            return (
                f"Answers that no photo was looked at for: {rule}.",
                ["no model"],
                "It knows nothing of any photo: what it gets right follows from how the questions are made.",
            )
        case BlindConfig():
            return (
                f"{system.of} with a grey picture instead of each photo.",
                [f"model: that of {system.of}, see its own card"],
                "It knows nothing of any photo: what it gets right is what the model believes of the city as a whole.",
            )
        case FusionConfig():
            prefix = "weight of "
            weights = {name.removeprefix(prefix): weight for name, weight in notes.items() if name.startswith(prefix)}
            return (
                f"{', '.join(system.of[:-1])} and {system.of[-1]} as one: ln p = sum of w ln p, weights fitted on val.",
                [f"{name}: weight {weight:.3g}" for name, weight in weights.items()],
                "It needs all of its systems, and a photo takes as long as in all of them together. The weights hold for these "
                "trained systems in this city.",
            )
        case PriorConfig():
            fix = " A GPS fix is drawn so that the place is within its radius in 95 of 100 photos." if system.gps_m else ""
            return (
                f"{system.of}, with prior information about each photo: {prior_words(system)} (paper 002, D.1, Table 12).",
                [
                    f"scores of {system.of}, see its own card",
                    f"prior: {prior_words(system)}; it leaves {notes.get('addresses left', addresses):.1f} of {addresses:,} "
                    f"addresses on average, rules out nothing for {notes.get('nothing ruled out', 0):,} photos and the true "
                    f"address of {notes.get('true address ruled out', 0):,} photos",
                ],
                "The prior is drawn from each photo's true address: the figures hold for someone who does have this "
                f"information.{fix}",
            )


def _describe_rag(config: Config, system: RagConfig, notes: Notes) -> Description:
    of_run = any(other.name == system.model for other in config.train.systems)
    model = (
        f"the system {system.model} of the run" if of_run and not system.endpoint else f"`{system.model or config.model.base}`"
    )
    unusable = ", ".join(f"{why} {notes[why]:,}" for why in UNUSABLE if notes.get(why)) or "none"
    listed = (
        "addresses" if system.ask == "addresses" else f"coordinates ({'degrees' if system.degrees == 'dms' else 'decimal'})"
    )
    sent = " Photos are sent to the endpoint." if system.endpoint else ""
    return (
        "A language model that sees the photo and reads where similar and dissimilar training photos were taken (paper 004).",
        [
            f"model: {model}{', at an endpoint' if system.endpoint else ''}",
            *_gallery(config, system.encoder, notes),
            f"prompt: {system.similar} similar and {system.dissimilar} dissimilar ({system.strategy}) photos, {system.order}, "
            f"as {system.form}; the question is for {listed}",
            f"reply: at most {system.max_new_tokens} tokens, temperature {system.temperature:g}; of "
            f"{notes.get('replies', 0):,} replies not usable as they came: {unusable}",
        ],
        "Its free text can't always be parsed. It only names and does not judge or choose, so A, A_d and A_s are not those "
        f"of systems that answer every question.{sent}",
    )


def _gallery(config: Config, encoder: EncoderConfig, notes: Notes) -> list[str]:
    aside = f" ({notes['set_aside']:,} set aside, which have no coordinates)" if notes.get("set_aside") else ""
    return [
        f"image encoder: `{encoder.base or config.model.base}`",
        f"gallery: {notes.get('gallery', 0):,} training photos{aside}",
    ]
