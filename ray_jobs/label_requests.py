"""Labels from an endpoint, or from vLLM servers of the job's own: tasks of Ray Data, all within one set of limits.

Each of `labels.workers` tasks has a part of the table's shards. It reads their images, sends requests and writes the answers
into a segment of its own of the run's response cache; a task that is killed begins anew and finds them there. One actor on the
driver's node keeps requests in flight, rates and budget of all tasks. The driver reads no image and no answer.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from addressvlm import InputError
from addressvlm.config import Config
from addressvlm.config.labels import LabelsConfig
from addressvlm.labels.api_client import KEY
from addressvlm.labels.costs import CostEstimate, LabelStats, estimate_cost
from addressvlm.labels.job_lock import job_lock
from addressvlm.labels.labelers import Request, label_requests, load_gazetteer, state_factory
from addressvlm.labels.limits import Grant, Report, RequestLimits
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import WritableResponseCache
from addressvlm.labels.vllm_server import serving
from addressvlm.storage.files import local_folder_for
from addressvlm.storage.run_dir import Run
from addressvlm.storage.shards import Shard
from ray_jobs.cluster import Workers, notify_progress, wait_for_workers
from ray_jobs.progress import Progress, display
from ray_jobs.ray_data import to_input_error

SAMPLED_SHARDS, SAMPLED_ROWS = 8, 4  # rows of a shard; their tokens are counted for the estimate


def fill_response_cache(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    """Send requests until the response cache has the answers for every row; the job's statistics.

    Args:
        redo: send rows again for which the endpoint kept failing.

    Raises:
        InputError: another job labels this run; the endpoint refuses us or keeps failing; the budget is exhausted; the first
            answers are all useless; a disk is full. All answers until then are in the cache.
    """
    labels, rows = config.labels, sum(shard.rows for shard in shards)
    workers = Workers("labelling", 1, labels.cpus_per_worker, labels.gpus_per_worker, "labels")
    with job_lock(Run(config).response_cache) as lock:
        wait_for_workers(workers, config.cluster.wait_s)  # the first node; Ray Data asks for more
        try:
            with display.show("label: reading the cached answers"):
                estimate = ray.get(ray.remote(estimate_requests).remote(config, shards, redo))
            print(estimate.text(), flush=True)
            node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            actor = ray.remote(num_cpus=0)(RequestLimits).options(scheduling_strategy=node)  # type: ignore[attr-defined]
            limits = actor.remote(labels, estimate.spent_tokens, estimate.spent_usd)

            def job_stats() -> LabelStats:
                return replace(ray.get(limits.stats.remote()), total=estimate.rows_left)

            def look(progress: Progress) -> None:
                try:
                    lock.renew()
                except Exception as error:  # the cache is another job's now, or can't be written
                    ray.get(limits.stop.remote(str(error)))
                    raise
                stats = job_stats()
                progress.done, progress.note = estimate.answered + stats.rows, stats.note()
                progress.context.copy().run(notify_progress, "label", progress.done, rows)

            parts = parts_of(shards, labels.workers)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.execution_no_progress_timeout_s = -1  # a task gives no row before its end
            items = ray.data.from_items([{"part": part} for part in range(len(parts))], override_num_blocks=len(parts))
            label = _LabellingTask(config, parts, redo, limits)
            resources = {"num_cpus": labels.cpus_per_worker, "num_gpus": labels.gpus_per_worker}
            dataset = items.flat_map(label.__call__, concurrency=len(parts), **resources)
            with display.show("label", rows, "rows", look):
                errors = [row["error"] for row in dataset.iter_rows() if row["error"]]
            stats = job_stats()
        except ray.exceptions.RayError as error:
            raise to_input_error(error) or error from None
    print(f"label: {stats.line()}", flush=True)
    if errors:
        raise InputError(errors[0])
    return stats.to_dict()


def parts_of(shards: list[Shard], tasks: int) -> list[list[Shard]]:
    """The shards in at most `tasks` parts of about as many rows."""
    parts: list[list[Shard]] = [[] for _ in range(max(1, min(tasks, len(shards))))]
    for shard in sorted(shards, key=lambda shard: -shard.rows):
        min(parts, key=lambda part: sum(shard.rows for shard in part)).append(shard)
    return parts


def estimate_requests(config: Config, shards: list[Shard], redo: bool) -> CostEstimate:
    """What the rows without an answer will cost, from some rows of some shards."""
    run = Run(config)
    new_state = state_factory(config.labels, config.seed, load_gazetteer(str(run.gazetteer)))
    ids = (row["id"] for shard in shards for batch in shard.batches(["id"]) for row in batch)
    some = shards[:: max(1, len(shards) // SAMPLED_SHARDS)]
    sample = itertools.chain.from_iterable(itertools.islice(_requests(config, [shard]), SAMPLED_ROWS) for shard in some)
    return estimate_cost(config.labels, ids, map(new_state, sample), run.response_cache, redo)


def _requests(config: Config, shards: list[Shard]) -> Iterator[Request]:
    """The rows whose image can be decoded, in order."""
    prompt, gazetteer = configured_prompt(config.labels), load_gazetteer(str(Run(config).gazetteer))
    columns = ["id", "image", "tile", "facts"] if prompt.shows == "graft" else ["id", "image", "street", "district"]
    for rows in itertools.chain.from_iterable(shard.batches(columns) for shard in shards):
        for row in rows:  # one at a time, so that memory holds only the rows in flight
            for _, request in label_requests([row], prompt, gazetteer.city if gazetteer else "")[0]:
                yield request


class _LabellingTask:
    """Sends the requests of one part of the table."""

    def __init__(self, config: Config, parts: list[list[Shard]], redo: bool, limits: Any) -> None:
        self.config, self.parts, self.redo, self.limits = config, parts, redo, limits
        self.key = os.environ.get(KEY)  # of the job, which nodes of a cluster don't have

    def __call__(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The error that ended the part, empty if all rows have their answers."""
        if self.key:
            os.environ[KEY] = self.key
        try:
            self._label(row["part"])
        except InputError as error:
            return [{"error": str(error)}]
        return [{"error": ""}]

    def _label(self, part: int) -> None:
        config, shards, run = self.config, self.parts[part], Run(self.config)
        ids = {row["id"] for shard in shards for batch in shard.batches(["id"]) for row in batch}
        with WritableResponseCache(run.response_cache, ids) as cache:
            gazetteer = load_gazetteer(str(run.gazetteer))
            new_state = partial(state_factory, seed=config.seed, gazetteer=gazetteer, base=config.model.base)

            def send(labels: LabelsConfig) -> None:
                labeler = OpenAILabeler(
                    labels, new_state(labels), cache, retry_failed=self.redo, exchange=self._exchange, task=str(part)
                )
                labeler.run(_requests(config, shards), len(ids))

            if config.labels.labeler == "openai":
                send(config.labels)
            elif any(
                new_state(config.labels)(request).replay(cache, self.redo) is None for request in _requests(config, shards)
            ):
                with serving(config.labels, local_folder_for(run.folder) / f"vllm-{part}.log") as url:
                    send(config.labels.model_copy(update={"base_url": url}))

    async def _exchange(self, report: Report) -> Grant:
        grant: Grant = await self.limits.exchange.remote(report)
        return grant
