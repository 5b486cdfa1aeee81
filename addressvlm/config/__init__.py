"""The configuration, one typed tree. Sources by precedence: defaults < YAML file or preset < environment < command line.

    python ray_jobs/train.py --config demo --set train.workers=1
    ADDRESSVLM_TRAIN__WORKERS=1 python ray_jobs/train.py --config my_city.yaml

Presets are commented YAML files in `addressvlm/presets/`. The modules here describe the keys of each section.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from addressvlm.config.base import Section
from addressvlm.config.city import CityConfig, TilesConfig
from addressvlm.config.compare import CompareConfig, EvaluateConfig
from addressvlm.config.labels import LabelsConfig
from addressvlm.config.provenance import Source, error_sentences
from addressvlm.config.train import ClusterConfig, ModelConfig, TrainConfig
from addressvlm.errors import InputError

PRESETS = Path(__file__).parents[1] / "presets"
ENVIRONMENT_PREFIX = "ADDRESSVLM_"
REPLACED_SECTIONS = (("train", "stages"), ("train", "cities"))  # an extending file replaces them instead of merging


class Config(Section):
    """The configuration of a run."""

    name: str = "demo"  # of the run; it writes to <storage>/<name>
    storage: str = "runs"  # a folder, local or in an object store: s3://bucket/runs, gs://… (docs/storage.md)
    seed: int = 0
    city: CityConfig = CityConfig()
    tiles: TilesConfig = TilesConfig()
    labels: LabelsConfig = LabelsConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def training_seed(self) -> int:
        """Seed of random weights, the order of rows and dropout."""
        return self.seed if self.train.seed is None else self.train.seed


def load(source: str | Path = "demo", sets: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Read a preset or YAML file, then the environment, then the `key=value` strings of the command line.

    A file with `extends: <preset or file>` is merged into that file, key by key; lists, `train.stages` and `train.cities` are
    replaced.

    Raises:
        InputError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    tree, sources = read_sources(source, sets, environment)
    if "world" in tree:
        raise InputError(f"{source} names many cities (its section world): only ray_jobs/train.py takes such a file.")
    return validate(tree, str(source), sources)


def read_sources(
    source: str | Path = "demo", sets: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, Any], list[Source]]:
    """The tree of all settings, not yet checked, and where they come from: the later sources override the earlier.

    Raises:
        InputError: as `load`, but for unknown keys and wrong types.
    """
    tree, sources = _read(source)
    assigned = []
    for name, value in sorted(environment.items()):
        keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        if name.startswith(ENVIRONMENT_PREFIX) and keys[0] in Config.model_fields:
            assigned.append((f"{name}={value}", keys, value))
    for assignment in sets:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: write it as key=value, for instance train.workers=1.")
        assigned.append((f"--set {assignment}", key.strip().split("."), value))
    for name, keys, value in assigned:
        alone: dict[str, Any] = {}
        for target in (tree, alone):
            set_key(target, keys, value)
        sources.append(Source(name, alone))
    return tree, sources


def _read(source: str | Path, extending: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Source]]:
    """The tree of a preset or file, merged into the one it extends, and the files, the extended one first."""
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
    own = Source(str(path), tree)
    if (extended := tree.pop("extends", None)) is None:
        return deepcopy(tree), [own]
    if path in extending:
        raise InputError(f"{path} extends itself: remove `extends` from one of the files.")
    sibling = path.parent / str(extended)
    base, files = _read(sibling if sibling.is_file() else extended, (*extending, path))
    return _merge(base, deepcopy(tree)), [*files, own]


def _merge(base: dict[str, Any], override: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    tree = dict(base)
    for key, value in override.items():
        keys = (*path, key)
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict) and keys not in REPLACED_SECTIONS
        tree[key] = _merge(base[key], value, keys) if is_section else value
    return tree


def validate(tree: dict[str, Any], where: str, sources: Sequence[Source] = ()) -> Config:
    """Check a tree of plain values; errors name the source of a setting, or `where`.

    Raises:
        InputError: a key is unknown or a value has the wrong type; the message lists all problems.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise InputError(error_sentences(error.errors(), Config, where, sources)) from None


def set_key(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set a nested key to a value; a text is parsed as YAML (`null`, `3`, `[a, b]`)."""
    for key in keys[:-1]:
        child = tree.get(key)
        tree[key] = child if isinstance(child, dict) else {}
        tree = tree[key]
    try:
        tree[keys[-1]] = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        raise InputError(f"{'.'.join(keys)}={value}: the value is not YAML.") from None
