"""One typed tree of settings: defaults < YAML file or preset < environment < command line.

    python ray_jobs/train.py --config demo --set train.workers=1
    ADDRESSVLM_TRAIN__WORKERS=1 python ray_jobs/train.py --config my_city.yaml

A preset is a commented YAML file in `addressvlm/presets/`; every key is described once, here or in `config_city.py`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from addressvlm.config_city import CityConfig, Strict
from addressvlm.errors import InputError

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT_PREFIX = "ADDRESSVLM_"

Part = Literal["vision", "adapter", "llm"]


class TilesConfig(Strict):
    """The tile of a place, and the photo grafted onto it (paper 001, Sec. 3.2)."""

    # GeoTIFF/COG, .mbtiles, .pmtiles or an XYZ address like https://host/{z}/{x}/{y}.png; without one: the rendered street map
    imagery: str | None = None
    zoom: int | None = Field(None, ge=0, le=23)  # of XYZ imagery; default: the first as fine as the tile's pixels
    cache: str | None = None  # folder of fetched XYZ tiles; default: <storage>/tile-cache
    per_second: float = Field(4.0, gt=0)  # requests to an XYZ server, all workers together
    user_agent: str = "addressvlm (set tiles.user_agent to your contact)"  # tile servers ask for a contact
    attribution: str | None = None  # of the imagery; written into the dataset's card
    side_m: float = Field(200.0, gt=0)  # side of the ground square shown, in metres
    pixels: int = Field(336, ge=32, le=2048)  # side of the tile and of the grafted image, in pixels
    names: bool = True  # street names written along the streets (off: paper 001 Table 2, "w/o road")
    font_px: float = Field(13.0, gt=0)  # height of the street names, in tile pixels
    font: str | None = None  # TTF or OTF file for names in scripts that DejaVu Sans Bold lacks (Japanese, Thai, Devanagari …)
    delta: float = Field(0.5, gt=0, le=0.5)  # longer side of the pasted photo / side of the tile
    jpeg_quality: int = Field(92, ge=30, le=100)


class LabelsConfig(Strict):
    """Who writes the alignment labels (paper 001, Sec. 3.2)."""

    labeler: Literal["template", "openai"] = "template"
    ask_address: bool = False  # begin each conversation about a grafted image with a stage 2 question for the address
    model: str = "gpt-4o-mini"  # for `openai`: the model's name at the endpoint; the key is in OPENAI_API_KEY
    base_url: str | None = None  # for `openai`: any compatible endpoint
    concurrency: int = Field(16, ge=1)  # requests in flight
    attempts: int = Field(3, ge=1)  # asks per row before falling back to a template marked as such
    timeout_s: float = Field(60.0, gt=0)  # of one request, in seconds
    retries: int = Field(5, ge=0)  # of a request that fails for now (429, 5xx, time-out); waits as long as the endpoint says
    max_tokens: int = Field(256, ge=16)


class PartConfig(Strict):
    """How one part of the model is tuned: LoRA, or all of its weights."""

    full: bool = False
    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0)


class ModelConfig(Strict):
    """The base model and the parts of it that LoRA is attached to."""

    base: str = "toy"  # folder or hub name of an AutoModelForImageTextToText; "toy" is the embedded one
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    vision: PartConfig = PartConfig(rank=64, alpha=16.0)  # xtuner's LLaVA default (assumed: the paper does not say)
    adapter: PartConfig = PartConfig(full=True)
    lora_dropout: float = Field(0.05, ge=0, lt=1)  # xtuner's default (assumed)
    llm: PartConfig = PartConfig()  # rank 128 as in paper 001; alpha is xtuner's default (assumed)


class StageConfig(Strict):
    """One tuning stage: which table, which parts, how long."""

    data: Literal["alignment", "photos"]
    parts: list[Part] = ["vision", "adapter", "llm"]
    rounds: Literal["conversation", "apart"] = "conversation"  # apart: no question about an image sees the other answers
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)  # stop here even if the epochs are not over
    batch_size: int = Field(16, ge=1)  # images per worker and step
    accumulate: int = Field(1, ge=1)  # optimizer step every so many batches
    learning_rate: float = Field(2e-4, gt=0)
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the steps
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)  # norm of the gradient


class SystemConfig(Strict):
    """A row of the table: the stages it goes through, none for zero-shot."""

    name: str
    stages: list[str] = []
    equal_steps_to: str | None = None  # the last stage runs as many steps as all stages of that system together


class TrainConfig(Strict):
    """Ray Train: workers, strategy, stages, and the systems to train with them."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    strategy: Literal["ddp", "zero2"] = "ddp"  # zero2 is DeepSpeed
    # Of the forward and backward pass; weights stay as they are. auto: bfloat16 where the processor has instructions for it
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: int = Field(50, ge=1)  # optimizer steps
    max_failures: int = Field(3, ge=0)  # lost workers tolerated per system
    stages: dict[str, StageConfig] = {
        "alignment": StageConfig(data="alignment"),
        "localization": StageConfig(data="photos"),
    }
    systems: list[SystemConfig] = [
        SystemConfig(name="zero-shot"),
        SystemConfig(name="stage 2 only", stages=["localization"]),
        SystemConfig(name="stage 2 only, equal steps", stages=["localization"], equal_steps_to="AddressVLM"),
        SystemConfig(name="AddressVLM", stages=["alignment", "localization"]),
    ]

    @model_validator(mode="after")
    def _names_exist(self) -> TrainConfig:
        names = [s.name for s in self.systems]
        for system in self.systems:
            for stage in system.stages:
                if stage not in self.stages:
                    raise ValueError(f"system '{system.name}' names the stage '{stage}', stages are {list(self.stages)}")
            if system.equal_steps_to and system.equal_steps_to not in names:
                raise ValueError(f"system '{system.name}' equals '{system.equal_steps_to}', systems are {names}")
        return self


class EvaluateConfig(Strict):
    """Answers on the test split and what is computed from them."""

    workers: int = Field(2, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    batch_size: int = Field(64, ge=1)  # questions at a time
    max_new_tokens: int = Field(24, ge=1)
    temperature: float = Field(0.0, ge=0)  # 0 is greedy; paper 001 uses 0.1
    max_photos: int | None = Field(None, ge=1)  # score only this many, drawn by seed
    bootstrap: int = Field(1000, ge=100)  # resamples of places for the 95 % intervals


class Config(Strict):
    """The whole tree."""

    name: str = "demo"  # the run: everything it writes is in <storage>/<name>
    storage: str = "runs"
    seed: int = 0
    city: CityConfig = CityConfig()
    tiles: TilesConfig = TilesConfig()
    labels: LabelsConfig = LabelsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load(source: str | Path = "demo", sets: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Read a preset's name or a YAML file, then the environment, then `key=value` strings of the command line.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    path = PRESETS / f"{source}.yaml" if not str(source).endswith((".yaml", ".yml")) else Path(source)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise InputError(f"no configuration '{source}': give a .yaml file that exists, or one of the presets {known}.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} must hold `key: value` lines, not {type(tree).__name__}.")
    for name, value in sorted(environment.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
            if keys[0] in Config.model_fields:
                _put(tree, keys, value)
    for assignment in sets:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: write it as key=value, for instance train.workers=1.")
        _put(tree, key.strip().split("."), value)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], where: str) -> Config:
    """Check a tree of plain values; `where` names its source in errors.

    Raises:
        InputError: a key is unknown or a value has the wrong type; all problems are in the one sentence.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise InputError(f"{where}: {problems}.") from None


def _put(tree: dict[str, Any], keys: list[str], text: str) -> None:
    """Set a nested key from text, read as a YAML value (so `null`, `3` and `[a, b]` mean what they look like)."""
    for key in keys[:-1]:
        child = tree.get(key)
        tree[key] = child if isinstance(child, dict) else {}
        tree = tree[key]
    try:
        tree[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{'.'.join(keys)}={text}: the value is not YAML.") from None


def _problem(error: Any) -> str:
    """One pydantic error in words, with the nearest known key for an unknown one."""
    location = ".".join(str(part) for part in error["loc"]) or "the tree"
    if error["type"] == "extra_forbidden":
        section: Any = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
        known = sorted(getattr(section, "model_fields", {}))
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key '{location}'" + (f", did you mean '{near[0]}'?" if near else f", known are {', '.join(known)}")
    message = error["msg"].removeprefix("Value error, ")
    return f"'{location}' is {error['input']!r}: {message}" if error["type"] != "value_error" else f"'{location}': {message}"
