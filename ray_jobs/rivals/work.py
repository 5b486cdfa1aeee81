"""What every row of a comparison is given, what it gives back, and what it cost."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from addressvlm.addresses import Gazetteer
from addressvlm.config import Config
from addressvlm.files import whole
from addressvlm.run import Run, slug
from addressvlm.stores import AnyPath

TEST = "test"  # the split that is judged

Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
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
    outcomes: "dict[str, Outcome]" = field(default_factory=dict)

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
        with whole(self.costs / f"{slug(name)}.json") as partial:
            partial.write_text(json.dumps(noted, indent=1), encoding="utf-8")

    def noted(self, name: str) -> dict[str, Any]:
        """What a row's parts took, as far as it is known."""
        file = self.costs / f"{slug(name)}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@dataclass
class Outcome:
    """What a system makes of the photos.

    Attributes:
        scores: split -> rows of `tables.SCORES`, photo by photo as in `Work.ids`; all answers then follow from them.
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
