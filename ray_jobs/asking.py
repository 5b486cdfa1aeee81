"""Ray Data around `addressvlm.evaluation`: workers that each hold a model, and the work cut in pieces for them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from addressvlm import tables
from addressvlm.addresses import Gazetteer
from addressvlm.config import Config
from addressvlm.evaluation import asking, scores
from addressvlm.files import parquet
from addressvlm.stores import AnyPath, path_of
from ray_jobs.common import progress
from ray_jobs.heartbeat import Heartbeat
from ray_jobs.stream import person_error

BATCHES_AT_A_TIME = 2  # of questions, given to a worker together and sorted by length
PHOTOS_SCORED = 16  # given to a worker together
RAW = pa.schema([field for field in tables.ANSWERS if field.name != "correct"])

Row = dict[str, Any]


def answers_of(
    config: Config, name: str, model: str, files: Sequence[AnyPath], ids: Sequence[str], city: Gazetteer, kinds: Sequence[str]
) -> list[Row]:
    """What a model answers to the questions of some kinds about the photos `ids` of a table, rows of ANSWERS as they come.

    `city` has the names that constrained answers may say, where the model's folder has no gazetteer.

    Raises:
        InputError: a worker can't load the model.
    """
    need = config.evaluate
    total = _questions(files, set(ids), kinds)
    at_a_time = BATCHES_AT_A_TIME * need.batch_size * len(ids) // max(total, 1)
    units = list(units_of(files, set(ids), max(1, min(at_a_time, -(-len(ids) // need.workers)))))
    return rows_of(config, units, Asker, (model, city, config, kinds), f"evaluate: {name}, questions", total)


def scores_of(
    config: Config, name: str, model: str, files: Sequence[AnyPath], ids: Sequence[str], city: Gazetteer,
    scorer: "type[Holder] | None" = None,
) -> list[Row]:  # fmt: skip
    """The scores that a model gives every address for the photos `ids` of a table, rows of SCORES in the order they come.

    `scorer` holds it where it is no vision-language model.

    Raises:
        InputError: a worker can't load the model, or neither it nor the data has a gazetteer.
    """
    units = list(units_of(files, set(ids), max(1, min(PHOTOS_SCORED, -(-len(ids) // config.evaluate.workers)))))
    return rows_of(config, units, scorer or Scorer, (model, city, config), f"evaluate: {name}, photos scored", len(ids))


def rows_of(config: Config, units: list[pa.Table], worker: type, given: tuple[Any, ...], step: str, total: int) -> list[Row]:
    """What workers, each made of what is given, make of the units; with progress."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    need = config.evaluate
    made = ray.data.from_arrow(units).map_batches(
        worker,
        fn_constructor_args=given,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(need.workers, len(units))),
        num_cpus=need.cpus_per_worker,
        num_gpus=need.gpus_per_worker,
    )
    rows: list[Row] = []
    try:
        with Heartbeat(lambda: f"{step}: {len(rows):,}/{total:,}, working"):
            for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                rows += batch.to_pylist()
                progress(step, len(rows), total)
    except ray.exceptions.RayError as error:
        raise person_error(error) or error from None
    return rows


def _questions(files: Sequence[AnyPath], ids: set[str], kinds: Sequence[str]) -> int:
    """How many questions of these kinds there are about the photos."""
    asked = pa.concat_tables([tables.read_file(file, ["id", "rounds"]) for file in files])
    chosen = asked.filter(pc.is_in(asked["id"], pa.array(ids)))
    found = pc.struct_field(pc.list_flatten(chosen["rounds"].combine_chunks()), "kind")
    return pc.sum(pc.is_in(found, pa.array(kinds))).as_py() or 0


class Holder(ABC):
    """A worker: a model that stays loaded, and photos that it reads from the table itself.

    It loads the model with the first photos, not when it is made: an error then reaches the job as what it is.
    """

    columns: Sequence[str]
    schema: pa.Schema

    def __init__(self, model: str, city: Gazetteer, config: Config, kinds: Sequence[str] = asking.KINDS) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        disable_progress_bar()
        self.config, self.kinds = config, kinds
        self.load = lru_cache(partial(self.opened, model, city, config))
        self.read = lru_cache(maxsize=1)(partial(_row_group, list(self.columns)))  # neighbouring units lie in one row group

    def __call__(self, unit: pa.Table) -> Iterator[pa.Table]:
        """A unit of `units_of` -> rows of the schema, some at a time."""
        for file, group, ids in zip(*(unit[name].to_pylist() for name in unit.column_names), strict=True):
            rows = self.read(file, group)
            for batch in self.work(rows.filter(pc.is_in(rows["id"], pa.array(ids))).to_pylist()):
                yield pa.Table.from_pylist(batch, schema=self.schema)

    @staticmethod
    def opened(model: str, city: Gazetteer, config: Config) -> Any:
        """The model in a folder, loaded."""
        return _load(model, city, config)

    @abstractmethod
    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """What is made of some photos."""


class Asker(Holder):
    """Asks all questions about its photos; rows of ANSWERS not judged yet, a batch of questions at a time."""

    columns, schema = asking.COLUMNS, RAW

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The answers."""
        return asking.ask(self.load(), photos, self.config.evaluate, self.config.seed, self.kinds)


class Scorer(Holder):
    """Scores the addresses for its photos; rows of SCORES."""

    columns, schema = scores.COLUMNS, tables.SCORES

    def work(self, photos: list[Row]) -> Iterable[list[Row]]:
        """The scores."""
        return scores.score(self.load().address_scores, photos, PHOTOS_SCORED)


def _load(model: str, city: Gazetteer, config: Config) -> Any:
    from addressvlm.inference import Localizer

    made = Localizer(model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code, memory_mb=0)
    made.gazetteer = made.gazetteer or city
    return made


def _row_group(columns: list[str], file: str, group: int) -> pa.Table:
    with parquet(path_of(file)) as opened:
        return opened.read_row_group(group, columns=columns)


def units_of(files: Sequence[AnyPath], ids: set[str], photos: int) -> Iterator[pa.Table]:
    """The work in pieces of up to `photos` photos: columns file, group, ids; one row each.

    Workers read the photos themselves: no read task competes with them for CPUs, and no image goes through Ray.
    """
    for file in files:
        with parquet(file) as opened:
            for group in range(opened.num_row_groups):
                found = [i for i in opened.read_row_group(group, columns=["id"])["id"].to_pylist() if i in ids]
                for start in range(0, len(found), photos):
                    yield pa.table({"file": [str(file)], "group": [group], "ids": [found[start : start + photos]]})
