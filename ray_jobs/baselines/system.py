"""The protocol of a system in a comparison: its input, its outcome and its cost."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Generic, TypeVar

from safetensors import safe_open

from addressvlm.config import Config
from addressvlm.config.compare import BaselineConfig, VariantConfig
from addressvlm.config.train import SystemConfig
from addressvlm.evaluation.likelihood import ScoreTables
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import base_licence
from addressvlm.models.families import part_of_any_family
from addressvlm.models.loading import resolve_model
from addressvlm.storage.files import atomic_write, local_copy, local_model_copy
from addressvlm.storage.remote_path import AnyPath, list_files, path_of
from addressvlm.storage.run_dir import Run, slug
from ray_jobs.evaluation import EvaluationTask, Row, trained_model

SettingsT = TypeVar("SettingsT", bound=SystemConfig | VariantConfig | BaselineConfig)


@dataclass(frozen=True)
class ComparisonContext:
    """What all systems of a comparison share.

    Attributes:
        run: the run that is compared; its photos are those of `task.data`.
        task: the photos of the split test, which all systems answer questions about.
        ids: split (`val`, to fit and to calibrate on; `test`, to judge) -> photos, in the order of the table.
        outcomes: of the systems before this one, by name.
    """

    run: Run
    task: EvaluationTask
    ids: Mapping[str, list[str]]
    outcomes: "dict[str, SystemOutcome]" = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The comparison's configuration."""
        return self.task.config

    @property
    def gazetteer(self) -> Gazetteer:
        """The city's; scores are in the order of its addresses."""
        return self.task.gazetteer

    @contextmanager
    def measure_cost(self, name: str, part: str, photos: int, resources: Mapping[str, float]) -> Iterator[None]:
        """Save the time that the block takes as the cost of a part of a system; a part that is skipped later keeps its cost.

        Args:
            name: of the system.
            part: `training`, `index` or `answering`.
            photos: how many it goes over.
            resources: `cpus` and `gpus` that are in use all the while.
        """
        start = time.monotonic()
        yield
        self.save_cost(name, part, {"seconds": time.monotonic() - start, "photos": photos, **resources})

    def save_cost(self, name: str, part: str, cost: Row) -> None:
        """Save the cost of a part of a system: `seconds`, `photos`, `cpus`, `gpus`."""
        costs = {**self.costs(name), part: cost}
        file = self._costs_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(costs, indent=1), encoding="utf-8")

    def costs(self, name: str) -> dict[str, Any]:
        """Part -> its cost, of the parts of a system that were measured."""
        file = self._costs_file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _costs_file(self, name: str) -> AnyPath:
        return self.run.folder / "costs" / f"{slug(name)}.json"


@dataclass
class SystemOutcome:
    """What a system makes of the photos.

    Attributes:
        scores: of the photos of `ComparisonContext.ids`, in their order; None if it has none.
        answered: its answers to the questions about the split test are stored; else all follow from its scores.
        coordinates: photo -> latitude and longitude in degrees where the system locates it, if that is what it does.
        parameters: how many were trained.
        stored_bytes: what must be kept to answer: weights and index.
        licences: part -> its licence, as its files name it.
        notes: further numbers to show, by name.
        model: the folder of a model that was trained for this system, whose cards get the metrics.
    """

    scores: ScoreTables | None = None
    answered: bool = False
    coordinates: dict[str, tuple[float, float]] = field(default_factory=dict)
    parameters: int = 0
    stored_bytes: int = 0
    licences: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    model: AnyPath | None = None


class System(ABC, Generic[SettingsT]):
    """One system of a comparison."""

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings
        self.name = settings.name

    @abstractmethod
    def run(self, context: ComparisonContext, redo: bool = False) -> SystemOutcome:
        """Train it if need be, and score or ask about the photos of `context.ids`; what is done is read.

        Raises:
            InputError: it can't be trained or evaluated.
        """


def worker_resources(config: Config) -> dict[str, float]:
    """`cpus` and `gpus` of all workers of an evaluation."""
    need = config.evaluate
    return {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}


def model_stats(config: Config, system: SystemConfig) -> SystemOutcome:
    """Trained parameters, stored bytes and licence of a trained system; without scores and answers."""
    folder = path_of(local_model_copy(resolve_model(trained_model(config, system))))
    trained_parts = {part for stage in system.stages for part in config.train.stages[stage].parts}
    parameters = 0
    for file in list_files(Run(config).model_dir(system.name) / "adapter", "*.safetensors") if system.stages else []:
        with safe_open(str(local_copy(file)), framework="np") as weights:  # of all parts, trained or not
            names = [name for name in weights.keys() if (part_of_any_family(name) or "llm") in trained_parts]  # noqa: SIM118
            parameters += sum(prod(weights.get_slice(name).get_shape()) for name in names)
    return SystemOutcome(
        parameters=parameters,
        stored_bytes=sum(file.stat().st_size for file in list_files(folder, "*.safetensors")),
        licences={"base model": base_licence(config) or "not stated"},
    )
