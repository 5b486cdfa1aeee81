"""What every row of a comparison is given, what it gives back, and what it cost."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

from safetensors import safe_open

from addressvlm.config import Config
from addressvlm.config.train import Part, SystemConfig
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.models.cards import base_licence
from addressvlm.models.loading import resolve_model
from addressvlm.models.parts import part_named
from addressvlm.storage.files import atomic_write, local_copy, local_model_copy
from addressvlm.storage.remote_path import AnyPath, list_files, path_of
from addressvlm.storage.run_dir import Run, slug
from ray_jobs import resolve_args

TEST = "test"  # the split that is judged

Row = dict[str, Any]


@dataclass(frozen=True)
class ComparisonContext:
    """The photos that all rows are asked about.

    Attributes:
        ids: split (`val`, to fit and to calibrate on; `test`, to judge) -> ids of `run.photos`, in the order of the table.
        gazetteer: the city's; scores are in the order of its addresses.
        costs: folder of a file of costs for each row.
        outcomes: of the rows before this one, by name.
    """

    config: Config
    run: Run
    ids: Mapping[str, list[str]]
    gazetteer: Gazetteer
    costs: AnyPath
    outcomes: "dict[str, SystemOutcome]" = field(default_factory=dict)

    @contextmanager
    def cost(self, name: str, what: str, photos: int, cpus: float, gpus: float = 0.0) -> Iterator[None]:
        """Note what a part of a row took; a part that is done and skipped later keeps its note.

        Args:
            name: of the row.
            what: `training`, `index` or `answering`.
            photos: how many it went over.
            cpus: held all the while, and gpus.
        """
        begun = time.monotonic()
        yield
        seconds = time.monotonic() - begun
        self.note(name, what, {"seconds": seconds, "photos": photos, "cpus": cpus, "gpus": gpus})

    def note(self, name: str, what: str, took: Row) -> None:
        """Note what a part took, known from elsewhere: `seconds`, `photos`, `cpus`, `gpus` as for `cost`."""
        noted = {**self.noted(name), what: took}
        self.costs.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.costs / f"{slug(name)}.json") as partial:
            partial.write_text(json.dumps(noted, indent=1), encoding="utf-8")

    def noted(self, name: str) -> dict[str, Any]:
        """What a row's parts took, as far as it is known."""
        file = self.costs / f"{slug(name)}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@dataclass
class SystemOutcome:
    """What a system makes of the photos.

    Attributes:
        scores: split -> rows of `tables.SCORES`, photo by photo as in `ComparisonContext.ids`; all answers then follow from them.
        answers: without scores: rows of `tables.ANSWERS` without `correct`, of the split test.
        coordinates: photo -> latitude and longitude in degrees where the system puts it, if that is what it does.
        parameters: how many numbers were trained.
        stored_bytes: what must be kept to answer: weights and index.
        licences: what it is made of -> its licence, as its files say.
        notes: further numbers worth showing, by name.
        model: the folder of a model that was trained for this row, whose cards get what is measured.
    """

    scores: dict[str, list[Row]] = field(default_factory=dict)
    answers: list[Row] = field(default_factory=list)
    coordinates: dict[str, tuple[float, float]] = field(default_factory=dict)
    parameters: int = 0
    stored_bytes: int = 0
    licences: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    model: AnyPath | None = None


def model_stats(config: Config, system: SystemConfig) -> SystemOutcome:
    """What a trained system is made of; without answers."""
    run = Run(config)
    folder = path_of(local_model_copy(resolve_model(resolve_args.model_of(config, run, system))))
    learning = {part for stage in system.stages for part in config.train.stages[stage].parts}
    return SystemOutcome(
        parameters=_numbers(run.model_dir(system.name) / "adapter", learning) if system.stages else 0,
        stored_bytes=sum(file.stat().st_size for file in list_files(folder, "*.safetensors")),
        licences={"base model": base_licence(config) or "not said"},
    )


def _numbers(folder: AnyPath, learning: set[Part]) -> int:
    """How many numbers of these parts the safetensors files of a folder hold; an adapter has all parts, trained or not."""
    total = 0
    for file in list_files(folder, "*.safetensors"):
        with safe_open(str(local_copy(file)), framework="np") as opened:
            total += sum(
                prod(opened.get_slice(name).get_shape())
                for name in opened.keys()  # noqa: SIM118
                if (part_named(name) or "llm") in learning
            )
    return total
