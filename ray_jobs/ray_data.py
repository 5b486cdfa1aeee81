"""Run a function over the shards of a table with Ray Data; the tasks read and write the files themselves.

Image bytes stay inside a task; only the shards' summaries return. Ray Data's own checkpoints also resume by row, but pass all
bytes through the object store and number their files in the order in which tasks end.
"""

import json
import re
from typing import Any

import ray
import ray.data

from addressvlm import InputError
from addressvlm.config.train import ClusterConfig
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.shards import MARKS_DIR, Shard, ShardWork, Summary, process_shard, remove_stale_files
from ray_jobs.cluster import Workers, wait_for_workers
from ray_jobs.common import heartbeat, progress

STOP = "stop"  # key of the message with which a task stops the job; Ray does not keep the type of an exception
MAX_GROUP = 8  # shards per task; their summaries return together


def run_shards(
    step: str,
    shards: list[Shard],
    folder: AnyPath,
    work: ShardWork,
    tasks: int | None = None,
    actor: dict[str, float] | None = None,
) -> list[Summary]:
    """Process all shards that are not done yet, at most `tasks` at a time; summaries in the order of the shards.

    Args:
        step: its name in the progress lines.
        folder: output folder, visible to all nodes.
        actor: resources (`num_cpus`, `num_gpus`) of each of `tasks` actors, which keep their models loaded; None: plain tasks.

    Raises:
        InputError: the first one that the work raised.
    """
    remove_stale_files(folder, len(shards))
    total = sum(shard.rows for shard in shards)
    progress(step, 0, total)
    if not shards:
        return []
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # a task of a model on a slow GPU may take longer than the default half hour

    if not actor:
        wait_for_workers(Workers(step, 1, 1.0, 0.0), ClusterConfig().wait_s)  # the first node; Ray Data asks for more
    groups = _groups(len(shards), tasks or int(ray.cluster_resources()["CPU"]), 1 if actor else MAX_GROUP)
    items = ray.data.from_items(groups, override_num_blocks=len(groups))
    if actor:
        pool = ray.data.ActorPoolStrategy(size=min(tasks or 1, len(groups)))
        dataset = items.flat_map(_GroupWorker, fn_constructor_args=(shards, folder, work), compute=pool, **actor)
    else:
        dataset = items.flat_map(_GroupWorker(shards, folder, work).__call__, concurrency=tasks)
    done, summaries = 0, []
    with heartbeat(lambda: f"{step}: {sum(1 for _ in (folder / MARKS_DIR).iterdir()):,} of {len(shards):,} shards, working"):
        for row in dataset.iter_rows():
            summary = json.loads(row["summary"])
            if STOP in summary:
                raise InputError(summary[STOP])
            done += summary["rows"]
            progress(step, done, total)
            summaries.append(summary)
    remove_stale_files(folder, len(shards), summaries)  # workers of a killed job may have written for a moment longer
    return sorted(summaries, key=lambda summary: summary["number"])


class _GroupWorker:
    """Processes groups of shards, in a task or an actor."""

    def __init__(self, shards: list[Shard], folder: AnyPath, work: ShardWork) -> None:
        self.shards, self.folder, self.work = shards, folder, work

    def __call__(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The summaries of a group, as JSON; an InputError ends the group and is returned as a summary."""
        summaries: list[Summary] = []
        try:
            for shard in self.shards[row["first"] : row["last"]]:
                summaries.append(process_shard(shard, self.folder, self.work))
        except InputError as error:
            summaries.append({STOP: str(error)})
        return [{"summary": json.dumps(summary)} for summary in summaries]


def _groups(shards: int, workers: int, largest: int) -> list[dict[str, int]]:
    """Ranges of shards, one per task: long ones first, because a task costs a fifth of a second, then shorter and shorter ones,
    so that all workers finish at the same time."""
    groups: list[dict[str, int]] = []
    first = 0
    while first < shards:
        last = first + min(max((shards - first) // (4 * workers), 1), largest)
        groups.append({"first": first, "last": last})
        first = last
    return groups


def to_input_error(error: BaseException) -> InputError | None:
    """The InputError of a worker inside Ray's exception, None if it was another error.

    Where Ray keeps only text, the last InputError line of the worker's traceback.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, InputError) and not isinstance(link, ray.exceptions.RayError):
            return link
        link = link.__cause__ or getattr(link, "cause", None)
    messages = re.findall(rf"^(?:{re.escape(InputError.__module__)}\.)?InputError: (.+)$", str(error), re.MULTILINE)
    return InputError(messages[-1]) if messages else None
