"""Run a function over the shards of tables on Ray; the workers read and write the files themselves.

Image bytes stay inside a worker; only the shards' summaries return. Plain tasks go through Ray Data, a group of shards each.
Work that keeps a model loaded goes to actors, one shard at a time: several tables are made with one load, slow GPUs share the
work evenly, and a lost worker costs one shard. Ray Data's own checkpoints also resume by row, but pass all bytes through the
object store and number their files in the order in which tasks end.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import ray
import ray.data

from addressvlm import InputError
from addressvlm.config.train import ClusterConfig
from addressvlm.storage.remote_path import AnyPath
from addressvlm.storage.shards import MARKS_DIR, Shard, ShardWork, Summary, process_shard, remove_stale_files
from ray_jobs.cluster import Workers, notify_progress, wait_for_workers
from ray_jobs.progress import Progress, display

STOP = "stop"  # key of the message with which a worker stops the job; Ray does not keep the type of an exception
MAX_GROUP = 8  # shards per task; their summaries return together
ACTOR_RETRIES = 3  # of a shard whose actor died
QUEUED = 2  # shards of an actor: one that it works on and the next


@dataclass(frozen=True)
class ShardJob:
    """Shards of a table, the folder of the output, which all nodes see, and the work on each shard."""

    shards: list[Shard]
    folder: AnyPath
    work: ShardWork


def run_shards(
    step: str,
    shards: list[Shard],
    folder: AnyPath,
    work: ShardWork,
    tasks: int | None = None,
    actor: dict[str, float] | None = None,
    unit: str = "photos",
) -> list[Summary]:
    """Process all shards that are not done yet, at most `tasks` at a time; summaries in the order of the shards.

    Args:
        step: its name in the progress display; `unit`: what its rows are.
        folder: output folder, visible to all nodes.
        actor: resources (`num_cpus`, `num_gpus`) of each of `tasks` actors, which keep their models loaded; None: plain tasks.

    Raises:
        InputError: the first one that the work raised.
    """
    if actor:
        return run_on_actors(step, [ShardJob(shards, folder, work)], tasks or 1, actor, unit)[0]
    remove_stale_files(folder, len(shards))
    if not shards:
        return []
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = -1  # a task may wait for its node, and work for as long as it takes

    def look(progress: Progress) -> None:
        marks = (file.stem for file in (folder / MARKS_DIR).iterdir() if file.suffix == ".json")
        progress.done = sum(shards[int(number)].rows for number in marks)

    wait_for_workers(Workers(step, 1, 1.0, 0.0), ClusterConfig().wait_s)  # the first node; Ray Data asks for more
    groups = _groups(len(shards), tasks or int(ray.cluster_resources()["CPU"]), MAX_GROUP)
    items = ray.data.from_items(groups, override_num_blocks=len(groups))
    dataset = items.flat_map(_GroupWorker(shards, folder, work).__call__, concurrency=tasks)
    summaries: list[Summary] = []
    total = sum(shard.rows for shard in shards)
    with display.show(step, total, unit, look):
        for row in dataset.iter_rows():
            summaries.append(json.loads(row["summary"]))
            if STOP in summaries[-1]:
                raise InputError(summaries[-1][STOP])
            notify_progress(step, sum(summary["rows"] for summary in summaries), total)
    remove_stale_files(folder, len(shards), summaries)  # workers of a killed job may have written for a moment longer
    return sorted(summaries, key=lambda summary: summary["number"])


def run_on_actors(
    step: str, jobs: list[ShardJob], workers: int, resources: dict[str, float], unit: str = "photos"
) -> list[list[Summary]]:
    """The same for several tables with the same actors, so that work of all of them may share a model; summaries by job.

    Args:
        workers: how many actors; those whose node is not there yet get work when it is.
        resources: `num_cpus` and `num_gpus` of each.

    Raises:
        InputError: the first one that the work raised, or a shard kept killing its worker.
    """
    for job in jobs:
        remove_stale_files(job.folder, len(job.shards))
    queue = [(number, shard) for number, job in enumerate(jobs) for shard in job.shards]
    summaries: list[list[Summary]] = [[] for _ in jobs]
    actor = ray.remote(**resources, max_restarts=-1, max_task_retries=ACTOR_RETRIES)(ShardActor)
    actors = [actor.remote() for _ in range(min(workers, len(queue)))]
    shared = ray.put([(job.folder, job.work) for job in jobs])
    waiting = iter(queue)
    starting: dict[Any, Any] = {actor.started.remote(): actor for actor in actors}
    running: dict[Any, tuple[int, Any]] = {}
    with display.show(step, sum(shard.rows for _, shard in queue), unit) as progress:
        try:
            while sum(map(len, summaries)) < len(queue):
                (done,), _ = ray.wait([*running, *starting], num_returns=1)
                if done in starting:
                    ready = [starting.pop(done)] * QUEUED
                else:
                    number, worker = running.pop(done)
                    summary = json.loads(ray.get(done))
                    if STOP in summary:
                        raise InputError(summary[STOP])
                    summaries[number].append(summary)
                    progress.done += summary["rows"]
                    ready = [worker]
                for worker in ready:
                    if item := next(waiting, None):
                        running[worker.process.remote([shared], *item)] = item[0], worker
        except ray.exceptions.RayActorError:
            raise InputError(
                f"{step}: a worker died {ACTOR_RETRIES + 1} times at the same photos (out of memory, or its node went away): "
                "lower the number of workers of a node or the batch size, and rerun to resume."
            ) from None
        except ray.exceptions.RayError as error:
            raise to_input_error(error) or error from None
        finally:
            for worker in actors:
                ray.kill(worker)
    for job, finished in zip(jobs, summaries, strict=True):
        remove_stale_files(job.folder, len(job.shards), finished)
        finished.sort(key=lambda summary: summary["number"])
    return summaries


class ShardActor:
    """Processes shards and keeps the models that the work loads."""

    def __init__(self) -> None:
        self.jobs: list[tuple[AnyPath, ShardWork]] = []

    def started(self) -> None:
        """Returns when the actor has its resources."""

    def process(self, shared: list[Any], job: int, shard: Shard) -> str:
        """The summary of a shard as JSON; `shared`: reference of folder and work of all jobs, fetched once."""
        self.jobs = self.jobs or ray.get(shared[0])
        try:
            return json.dumps(process_shard(shard, *self.jobs[job]))
        except InputError as error:
            return json.dumps({STOP: str(error)})


class _GroupWorker:
    """Processes groups of shards in a task."""

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
