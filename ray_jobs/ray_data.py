"""Ray Data as the jobs use it: shards of a table through a plain function, in tasks that write what they make.

Image bytes go from file to file inside a task; only the shards' summaries come back. Ray Data's own checkpoints resume by
row as well, but pass all bytes through the object store and name their files by the order in which tasks end.
"""

import json
import re
from typing import Any

import ray
import ray.data

from addressvlm import InputError
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.shards import MARKS_DIR, Shard, ShardWork, Summary, process_shard, remove_stale_files
from ray_jobs.common import Heartbeat, progress

STOP = "stop"  # key of the sentence with which a task stops the job; an exception would lose its type on the way
LONGEST_GROUP = 8  # shards that a task makes; their summaries come back together


def run_shards(
    step: str,
    shards: list[Shard],
    folder: AnyPath,
    work: ShardWork,
    tasks: int | None = None,
    actor: dict[str, float] | None = None,
) -> list[Summary]:
    """Make all shards that are not made yet, at most `tasks` at a time; summaries in the order of the shards.

    Args:
        step: what to call it in the lines that are printed.
        folder: where the files go; all nodes must see it.
        actor: what each of `tasks` workers needs (`num_cpus`, `num_gpus`) that stay, so that what they load stays loaded.

    Raises:
        InputError: one that the work raised.
    """
    remove_stale_files(folder, len(shards))
    total = sum(shard.rows for shard in shards)
    progress(step, 0, total)
    if not shards:
        return []
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False

    groups = _groups(len(shards), tasks or int(ray.cluster_resources().get("CPU", 1)))
    items = ray.data.from_items(groups, override_num_blocks=len(groups))
    given = (shards, folder, work)
    if actor:
        staying = ray.data.ActorPoolStrategy(size=min(tasks or 1, len(groups)))
        dataset = items.flat_map(_Maker, fn_constructor_args=given, compute=staying, **actor)
    else:
        dataset = items.flat_map(_Maker(*given).make, concurrency=tasks)
    done, summaries = 0, []
    with Heartbeat(lambda: f"{step}: {sum(1 for _ in (folder / MARKS_DIR).iterdir()):,} of {len(shards):,} shards, working"):
        for row in dataset.iter_rows():
            summary = json.loads(row["summary"])
            if STOP in summary:
                raise InputError(summary[STOP])
            done += summary["rows"]
            progress(step, done, total)
            summaries.append(summary)
    remove_stale_files(folder, len(shards), summaries)  # workers of a killed job may have written on for a moment
    return sorted(summaries, key=lambda summary: summary["number"])


class _Maker:
    """Makes groups of shards."""

    def __init__(self, shards: list[Shard], folder: AnyPath, work: ShardWork) -> None:
        self.shards, self.folder, self.work = shards, folder, work

    def __call__(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """As Ray Data asks a worker that stays."""
        return self.make(row)

    def make(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The summaries of a group, as JSON; an InputError ends it and comes as a summary too."""
        made: list[Summary] = []
        try:
            for shard in self.shards[row["first"] : row["last"]]:
                made.append(process_shard(shard, self.folder, self.work))
        except InputError as error:
            made.append({STOP: str(error)})
        return [{"summary": json.dumps(summary)} for summary in made]


def _groups(shards: int, workers: int) -> list[dict[str, int]]:
    """Runs of shards, each for one task: long ones first, since a task costs a fifth of a second, then ever shorter ones,
    so that all workers end at the same time."""
    groups: list[dict[str, int]] = []
    first = 0
    while first < shards:
        last = first + min(max((shards - first) // (4 * workers), 1), LONGEST_GROUP)
        groups.append({"first": first, "last": last})
        first = last
    return groups


def to_input_error(error: BaseException) -> InputError | None:
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
