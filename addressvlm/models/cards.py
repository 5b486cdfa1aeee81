"""Model cards of an adapter and a merged model: base, data, licences, training, metrics; and the sections all cards share."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from addressvlm.config import Config
from addressvlm.config.train import StageConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import Run

BEGIN, END = "<!-- metrics -->", "<!-- end of metrics -->"
UNKNOWN = "Not measured yet: `python ray_jobs/{job}.py` writes them here."
ELSEWHERE = "Photos from elsewhere get an address of this city all the same"
PEOPLE = "Do not use it to find people."
ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "<this folder>")"""
MERGED = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("<this folder>")
processor = AutoProcessor.from_pretrained("<this folder>")"""


def write_cards(config: Config, system: str, model: Path) -> None:
    """Write README.md into `adapter` and `merged` of a system's model folder."""
    for folder, code in (("adapter", ADAPTER), ("merged", MERGED)):
        (model / folder / "README.md").write_text(
            model_card(config, system, code, adapter=folder == "adapter"), encoding="utf-8"
        )


def model_card(config: Config, system: str, code: str, adapter: bool) -> str:
    """The card's text."""
    runs = [Run(config.model_copy(update={"name": name})) for name in config.train.cities or {config.name: 1.0}]
    gazetteers = [Gazetteer.load(run.gazetteer) for run in runs]
    cities = " + ".join(gazetteer.city or run.folder.name for gazetteer, run in zip(gazetteers, runs, strict=True))
    stages = _stages(config, system)
    course = "one stage" if len(stages) == 1 else f"{len(stages)} stages, one after the other"
    head = {
        "library_name": "peft" if adapter else "transformers",
        "base_model": config.model.base,
        "pipeline_tag": "image-text-to-text",
        "tags": ["addressvlm", "image-geolocation", *(["lora"] if adapter else [])],
    }
    sources = dict.fromkeys(source for gazetteer in gazetteers for source in gazetteer.attribution)
    lines = [
        front_matter(head, base_licence(config)),
        f"# {cities}: from a street-level photo to its address",
        f"`{config.model.base}`, taught {cities} in {course}: it names the street and the district of a "
        "photo, judges and chooses between them. It knows no other city.",
        "## Data",
        "\n".join(_data(run, gazetteer) for run, gazetteer in zip(runs, gazetteers, strict=True)),
        attributed(sources),
        "## Training",
        "\n".join(_stage(name, stage) for name, stage in stages) or "None.",
        f"Weights in {config.model.dtype}, seed {config.training_seed}, {config.train.workers} workers "
        f"({config.train.strategy}). All settings are in `_done.json` of the model's folder.",
        "## Metrics",
        no_metrics_section("evaluate"),
        "## Use",
        f"```python\n{code.format(base=config.model.base)}\n```",
        f"{ELSEWHERE}: mind the confidence. {PEOPLE}",
    ]
    return "\n\n".join(lines) + "\n"


def front_matter(head: Mapping[str, Any], licence: str | None) -> str:
    """The YAML at the beginning of a card, which model hubs read."""
    fields = {**head, **({"license": licence} if licence else {})}
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def attributed(sources: Iterable[str]) -> str:
    """The attribution of photos and maps."""
    return f"Photos, maps and base model keep their own licences. Attribution: {'; '.join(sources) or 'none was given'}."


def no_metrics_section(job: str) -> str:
    """The placeholder for metrics that a job in ray_jobs/ will write."""
    return f"{BEGIN}\n{UNKNOWN.format(job=job)}\n{END}"


def metrics_section(table: Mapping[str, Mapping[str, Any]], photos: str) -> str:
    """Metrics as a table; those without a value are left out. Arguments as for `set_metrics`."""
    rows = [
        f"| {name} | {100 * cell['value']:.1f} | {100 * cell['low']:.1f} to {100 * cell['high']:.1f} |"
        for name, cell in table.items()
        if cell["value"] is not None
    ]
    return "\n".join([f"Percent on {photos}, with 95 % intervals:", "", "| | | |", "|---|---:|---:|", *rows])


def set_metrics(model: AnyPath, table: Mapping[str, Mapping[str, Any]], photos: str) -> None:
    """Write metrics into the cards of a model folder (its own, `adapter`'s, `merged`'s) that have a placeholder.

    Args:
        table: metric -> value, low, high as shares, see `evaluation.metrics.score`.
        photos: which photos these are of.
    """
    text = metrics_section(table, photos)
    for readme in (folder / "README.md" for folder in (model, model / "adapter", model / "merged")):
        if readme.is_file() and BEGIN in (before := readme.read_text(encoding="utf-8")):
            head, rest = before.split(BEGIN, 1)
            readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def _stages(config: Config, system: str) -> list[tuple[str, StageConfig]]:
    match = next((s for s in config.train.systems if s.name == system), None)
    return [(name, config.train.stages[name]) for name in match.stages] if match else []


def _data(run: Run, gazetteer: Gazetteer) -> str:
    photos, labels = tables.count_rows(run.photos, "train"), tables.count_rows(run.alignment, "train")
    names = (
        f"{len(gazetteer.streets):,} streets, {len(gazetteer.districts):,} districts, {len(gazetteer.addresses):,} addresses"
    )
    city = gazetteer.city or run.folder.name
    return f"- {city}: {photos:,} photos with questions, {labels:,} grafted images with labels; {names}."


def _stage(name: str, stage: StageConfig) -> str:
    return (
        f"- {name}: {' and '.join(stage.tables)}; trains {', '.join(stage.parts)}; {stage.epochs:g} epochs"
        f"{f' (at most {stage.max_steps:,} steps)' if stage.max_steps else ''}, "
        f"{stage.batch_size * stage.gradient_accumulation_steps} images a worker and step, learning rate "
        f"{stage.learning_rate:g}."
    )


def base_licence(config: Config) -> str | None:
    """The licence that the base model's own card names, if its folder has one."""
    readme = path_of(resolve_model(config.model.base)) / "README.md"
    if not readme.is_file():
        return None
    pieces: Sequence[str] = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    try:
        head = yaml.safe_load(pieces[1]) if len(pieces) == 3 else None
    except yaml.YAMLError:
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else json.dumps(licence) if licence else None
