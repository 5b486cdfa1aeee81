"""Ray Data around `addressvlm.evaluation.asking`: workers that each hold a model, and the work cut in pieces for them."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from addressvlm import tables
from addressvlm.config import Config
from addressvlm.evaluation.asking import COLUMNS, ask
from ray_jobs.common import progress
from ray_jobs.heartbeat import Heartbeat
from ray_jobs.stream import person_error

BATCHES_AT_A_TIME = 2  # of questions, given to a worker together and sorted by length
RAW = pa.schema([field for field in tables.ANSWERS if field.name != "correct"])


def answers_of(config: Config, name: str, model: str, files: Sequence[Path], ids: Sequence[str]) -> list[dict[str, Any]]:
    """What a model answers to all questions about the photos `ids` of a table, rows of ANSWERS in the order they come.

    Raises:
        InputError: a worker can't load the model.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    need = config.evaluate
    total = _questions(files, set(ids))
    at_a_time = BATCHES_AT_A_TIME * need.batch_size * len(ids) // max(total, 1)
    units = list(_units(files, set(ids), max(1, min(at_a_time, -(-len(ids) // need.workers)))))
    asked = ray.data.from_arrow(units).map_batches(
        Asker,
        fn_constructor_args=(model, config),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(need.workers, len(units))),
        num_cpus=need.cpus_per_worker,
        num_gpus=need.gpus_per_worker,
    )
    rows: list[dict[str, Any]] = []
    try:
        with Heartbeat(lambda: f"evaluate: {name}: {len(rows):,}/{total:,} questions, working"):
            for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                rows += batch.to_pylist()
                progress(f"evaluate: {name}, questions", len(rows), total)
    except ray.exceptions.RayError as error:
        raise person_error(error) or error from None
    return rows


def _questions(files: Sequence[Path], ids: set[str]) -> int:
    """How many questions there are about the photos."""
    asked = pa.concat_tables([pq.read_table(file, columns=["id", "rounds"]) for file in files])
    chosen = asked.filter(pc.is_in(asked["id"], pa.array(ids)))
    return pc.sum(pc.list_value_length(chosen["rounds"])).as_py() or 0


class Asker:
    """The worker: a model that stays loaded, asked about photos that it reads from the table itself.

    It loads the model with the first photos, not when it is made: an error then reaches the job as what it is.
    """

    def __init__(self, model: str, config: Config) -> None:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from addressvlm.inference import Localizer

        torch.set_num_threads(max(1, int(config.evaluate.cpus_per_worker)))
        disable_progress_bar()
        self.config = config
        self.load = lru_cache(
            partial(Localizer, model, dtype=config.model.dtype, trust_remote_code=config.model.trust_remote_code)
        )
        self.read = lru_cache(maxsize=1)(_row_group)  # neighbouring units lie in one row group

    def __call__(self, unit: pa.Table) -> Iterator[pa.Table]:
        """A unit of `_units` -> rows of ANSWERS not judged yet, a batch of questions at a time."""
        for file, group, ids in zip(*(unit[name].to_pylist() for name in unit.column_names), strict=True):
            rows = self.read(file, group)
            photos = rows.filter(pc.is_in(rows["id"], pa.array(ids))).to_pylist()
            for batch in ask(self.load(), photos, self.config.evaluate, self.config.seed):
                yield pa.Table.from_pylist(batch, schema=RAW)


def _row_group(file: str, group: int) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, columns=COLUMNS)


def _units(files: Sequence[Path], ids: set[str], photos: int) -> Iterator[pa.Table]:
    """The work in pieces of up to `photos` photos: columns file, group, ids; one row each.

    Workers read the photos themselves: no read task competes with them for CPUs, and no image goes through Ray.
    """
    for file in files:
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                found = [i for i in parquet.read_row_group(group, columns=["id"])["id"].to_pylist() if i in ids]
                for start in range(0, len(found), photos):
                    yield pa.table({"file": [str(file)], "group": [group], "ids": [found[start : start + photos]]})
