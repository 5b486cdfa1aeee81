"""Ray Data as the jobs use it: rows of a table, in order, through a plain function in Ray tasks."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from addressvlm import InputError, tables
from ray_jobs.heartbeat import Heartbeat

Rows = list[dict[str, Any]]

STOP = "_stop"  # column of the sentence with which a task stops the job; an exception would lose its type on the way


def mapped(
    step: str,
    folder: Path,
    split: str,
    columns: list[str],
    function: Callable[[Rows], Rows],
    schema: pa.Schema,
    batch_size: int,
    tasks: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of a table through `function`, at most `tasks` batches at a time; the order is kept.

    Args:
        step: what to call it in the line that is printed now and then while nothing comes back.
        function: gets up to `batch_size` rows of these columns, returns rows of `schema`.

    Raises:
        InputError: one that `function` raised.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    result = pa.schema([*schema, (STOP, pa.string())])

    def on_batch(batch: pa.Table) -> pa.Table:
        try:
            rows = function(batch.to_pylist())
        except InputError as error:
            rows = [{STOP: str(error)}]
        return pa.Table.from_pylist(rows, schema=result)

    files = [str(file) for file in tables.files(folder, split)]
    dataset = ray.data.read_parquet(files, columns=columns).map_batches(
        on_batch, batch_size=batch_size, batch_format="pyarrow", concurrency=tasks
    )
    done = 0
    with Heartbeat(lambda: f"{step}: {done:,} rows so far, working"):
        for batch in dataset.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.to_pylist():
                stop = row.pop(STOP)
                if stop is not None:
                    raise InputError(stop)
                done += 1
                yield row


def person_error(error: BaseException) -> InputError | None:
    """The InputError that Ray wrapped on its way from a worker, None if it was another error.

    Ray keeps the sentence, but not always the exception: then it is the last line of the worker's traceback.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, InputError) and not isinstance(link, ray.exceptions.RayError):
            return link
        link = link.__cause__ or getattr(link, "cause", None)
    said = re.findall(rf"^(?:{re.escape(InputError.__module__)}\.)?InputError: (.+)$", str(error), re.MULTILINE)
    return InputError(said[-1]) if said else None
