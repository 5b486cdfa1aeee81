#!/usr/bin/env python
"""Images -> labels in words: why each photo matches its address (paper 001, Sec. 3.2), or what in it shows the place (003).

    python ray_jobs/label.py --config demo
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai --dry-run
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai
    python ray_jobs/label.py --config my_city.yaml --set labels.prompt=reasoning

Reads <run>/grafts, writes <run>/alignment; with a prompt that shows photos alone reads <run>/photos, writes <run>/reasoning.
For a model behind an endpoint, all answers first go into <run>/response_cache (ray_jobs/label_requests.py); the table is made
from them.
"""

import json
from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa

from addressvlm.config import Config
from addressvlm.labels.api_client import endpoint_key
from addressvlm.labels.costs import label_report, report_summary
from addressvlm.labels.labelers import label_batch
from addressvlm.labels.prompt import configured_prompt
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.run_dir import Run, is_done, resumable_dir
from addressvlm.storage.shards import ShardWork, plan_shards, sources_fingerprint
from ray_jobs import common, graft, prepare
from ray_jobs.cluster import Workers, wait_for_workers
from ray_jobs.label_requests import estimate_requests, fill_response_cache
from ray_jobs.progress import display
from ray_jobs.ray_data import run_shards

# Of a local model an interruption may lose the work on a shard; those of an endpoint are shared out among the labelling tasks.
SHARD_ROWS = {"template": 2048, "openai": 256, "vllm": 256, "local": 64}
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
    model = config.model.model_copy(update={"base": common.absolute_path(config.model.base)})
    config = config.model_copy(update={"labels": labels, "model": model})  # workers run in another folder
    grafts, cached = configured_prompt(labels).shows == "graft", labels.labeler in CACHED_LABELERS
    source, target = (run.grafts, run.alignment) if grafts else (run.photos, run.reasoning)
    display.heading("label", "in words, why each photo matches its address")
    if not dry_run and is_done(target, settings(config), redo):
        print("label: already done", flush=True)
        return
    shards = plan_shards(source, "train", SHARD_ROWS[labels.labeler])
    if dry_run:
        rows = sum(shard.rows for shard in shards)
        free = f"label: {rows:,} rows; this labeler sends no requests and costs nothing"
        print(estimate_requests(config, shards, redo).text() if cached else free, flush=True)
        return
    if labels.labeler == "openai":
        endpoint_key(labels)  # a missing one is an error before anything is read
    stats = fill_response_cache(config, shards, redo) if cached else {}
    columns = list((tables.GRAFTS if grafts else tables.PHOTOS).names)
    cache = str(run.response_cache) if cached else ""
    function = partial(label_batch, labels.model_dump_json(), config.seed, str(run.gazetteer), cache, base=config.model.base)
    work = ShardWork(function, tables.ALIGNMENT, columns, sources_fingerprint(str(run.gazetteer)))
    with resumable_dir(target, settings(config), redo) as folder:
        summaries = run_shards("label", shards, folder, work, *_workers(config))
        counts = sum((Counter(summary["counts"]) for summary in summaries), Counter())
        report = label_report(labels, counts, stats, run.response_cache if cached else None)
        (folder / "labels.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
        rejects = [reject for summary in summaries for reject in summary["rejects"]]
        file = run.rejects / ("label.parquet" if grafts else "label-reasoning.parquet")
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), file)
    print(f"label: {target}: {report_summary(report)}; {len(rejects):,} rejected", flush=True)


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
