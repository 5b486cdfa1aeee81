#!/usr/bin/env python
"""Images -> labels in words: why each photo matches its address (paper 001, Sec. 3.2), or what in it shows the place (003).

    python ray_jobs/label.py --config demo
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai --dry-run
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai
    python ray_jobs/label.py --config my_city.yaml --set labels.prompt=reasoning

Reads <run>/grafts, writes <run>/alignment; with a prompt that shows photos alone reads <run>/photos, writes <run>/reasoning.
For a model behind an endpoint, all answers first go into <run>/response_cache; the table is made from them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
import ray

from addressvlm.config import Config
from addressvlm.labels.costs import CostEstimate, estimate_cost, label_report, report_summary
from addressvlm.labels.labelers import Request, label_batch, label_requests, load_gazetteer, state_factory
from addressvlm.labels.prompt import configured_prompt
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import ResponseCache, open_for_writing
from addressvlm.labels.vllm_server import serving
from addressvlm.storage import tables
from addressvlm.storage.files import local_folder_for, write_parquet
from addressvlm.storage.run_dir import Run, is_done, resumable_dir
from addressvlm.storage.shards import Shard, ShardWork, plan_shards, sources_fingerprint
from ray_jobs import common, graft, prepare
from ray_jobs.cluster import Workers, wait_for_workers
from ray_jobs.progress import display
from ray_jobs.ray_data import run_shards, to_input_error

SHARD_ROWS = 2048  # for a labeler that takes no time
MODEL_SHARD_ROWS = 64  # of a local model, whose work on them an interruption may lose
CACHED_LABELERS = ("openai", "vllm")  # their answers are in the response cache
# Settings that no label depends on.
NOT_OF_LABELS = {
    "concurrency", "timeout_s", "retries", "requests_per_minute", "tokens_per_minute", "budget_tokens", "budget_usd",
    "usd_per_million_in", "usd_per_million_out", "image_rule", "image_base", "image_each", "workers", "cpus_per_worker",
    "gpus_per_worker", "tensor_parallel", "vllm_python", "vllm_arguments", "vllm_start_s",
}  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """What the labels depend on."""
    prompt = configured_prompt(config.labels)
    inputs = graft.settings(config) if prompt.shows == "graft" else prepare.settings(config)
    return {**inputs, "labels": {**config.labels.model_dump(mode="json", exclude=NOT_OF_LABELS), "prompt": prompt.version}}


def run_step(config: Config, redo: bool, dry_run: bool = False) -> None:
    """Label the grafts of a run, or its photos.

    Raises:
        InputError: there are none, the labeler can't be used, or the budget is exhausted.
    """
    labels, run = config.labels, Run(config)
    local = {"model": labels.labeler in ("local", "vllm"), "prompt": labels.prompt.endswith(".md"), "vllm_python": True}
    paths = {key: getattr(labels, key) for key, is_path in local.items() if is_path and getattr(labels, key)}
    labels = labels.model_copy(update={key: common.absolute_path(path) for key, path in paths.items()})
    config = config.model_copy(update={"labels": labels})  # workers run in another folder
    grafts, cached = configured_prompt(labels).shows == "graft", labels.labeler in CACHED_LABELERS
    source, target = (run.grafts, run.alignment) if grafts else (run.photos, run.reasoning)
    display.heading("label", "in words, why each photo matches its address")
    if not dry_run and is_done(target, settings(config), redo):
        print("label: already done", flush=True)
        return
    shards = plan_shards(source, "train", MODEL_SHARD_ROWS if labels.labeler == "local" else SHARD_ROWS)
    if dry_run:
        rows = sum(shard.rows for shard in shards)
        free = f"label: {rows:,} rows; this labeler sends no requests and costs nothing"
        print(_estimate(config, shards, ResponseCache(run.response_cache), redo).text() if cached else free, flush=True)
        return
    stats = _fill_cache(config, shards, redo) if cached else {}
    columns = list((tables.GRAFTS if grafts else tables.PHOTOS).names)
    cache = str(run.response_cache) if cached else ""
    function = partial(label_batch, labels.model_dump_json(), config.seed, str(run.gazetteer), cache)
    work = ShardWork(function, tables.ALIGNMENT, columns, sources_fingerprint(str(run.gazetteer)))
    with resumable_dir(target, settings(config), redo) as folder:
        summaries = run_shards("label", shards, folder, work, *_workers(config))
        counts = sum((Counter(summary["counts"]) for summary in summaries), Counter())
        report = label_report(labels, counts, stats, ResponseCache(run.response_cache) if cached else None)
        (folder / "labels.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
        rejects = [reject for summary in summaries for reject in summary["rejects"]]
        file = run.rejects / ("label.parquet" if grafts else "label-reasoning.parquet")
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), file)
    print(f"label: {target}: {report_summary(report)}; {len(rejects):,} rejected", flush=True)


def _fill_cache(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    """Send requests until the cache has the answers for every row; the job's statistics.

    This process sends them, or, for a vLLM server that the job starts, a task on the server's node.
    """
    if config.labels.labeler == "openai":
        return _send_requests(config, shards, redo)
    estimate = _estimate(config, shards, ResponseCache(Run(config).response_cache), redo)
    if not estimate.rows_left:
        print(estimate.text(), flush=True)
        return {}
    cpus, gpus = config.labels.cpus_per_worker, config.labels.gpus_per_worker
    wait_for_workers(Workers("the vLLM server", 1, cpus, gpus, "labels"), config.cluster.wait_s)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0, max_calls=1)(_serve_and_send_requests)
    try:
        return ray.get(task.remote(config, shards, redo))
    except ray.exceptions.RayError as error:
        raise to_input_error(error) or error from None


def _serve_and_send_requests(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    with serving(config.labels, local_folder_for(Run(config).folder) / "vllm.log") as url:
        labels = config.labels.model_copy(update={"base_url": url})
        return _send_requests(config.model_copy(update={"labels": labels}), shards, redo)


def _send_requests(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    run = Run(config)
    with open_for_writing(run.response_cache) as cache:
        new_state = state_factory(config.labels, config.seed, load_gazetteer(str(run.gazetteer)))
        labeler = OpenAILabeler(config.labels, new_state, cache, partial(print, flush=True), redo)
        estimate = _estimate(config, shards, cache, redo)
        print(estimate.text(), flush=True)
        rows = estimate.rows_left
        return labeler.run(_requests(config, shards), rows).to_dict() if rows else {}


def _estimate(config: Config, shards: list[Shard], cache: ResponseCache, redo: bool) -> CostEstimate:
    """What is left to do; `redo` sends rows again for which the endpoint kept failing."""
    new_state = state_factory(config.labels, config.seed, load_gazetteer(str(Run(config).gazetteer)))
    with display.show("label: reading the cached answers"):
        return estimate_cost(config.labels, new_state, _requests(config, shards), cache, redo)


def _requests(config: Config, shards: list[Shard]) -> Iterator[Request]:
    """The rows whose image can be decoded, in order."""
    prompt, gazetteer = configured_prompt(config.labels), load_gazetteer(str(Run(config).gazetteer))
    columns = ["id", "image", "tile", "facts"] if prompt.shows == "graft" else ["id", "image", "street", "district"]
    for rows in chain.from_iterable(shard.batches(columns) for shard in shards):
        for row in rows:  # one at a time, so that memory holds only the rows in flight
            for _, request in label_requests([row], prompt, gazetteer.city if gazetteer else "")[0]:
                yield request


def _workers(config: Config) -> tuple[int | None, dict[str, float] | None]:
    """Number of workers and the resources of each, for a labeler that keeps a model."""
    labels = config.labels
    if labels.labeler != "local":
        return None, None
    workers = Workers("labelling", labels.workers, labels.cpus_per_worker, labels.gpus_per_worker, "labels")
    wait_for_workers(workers, config.cluster.wait_s)
    return labels.workers, {"num_cpus": labels.cpus_per_worker, "num_gpus": labels.gpus_per_worker}


def main(argv: list[str] | None = None) -> None:
    parser = common.job_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print rows, tokens, cost and time, and send nothing")
    args = parser.parse_args(argv)
    config = common.load_config(args)
    if not args.dry_run:
        common.connect()
    run_step(config, args.redo, args.dry_run)


if __name__ == "__main__":
    common.run_main(main)
