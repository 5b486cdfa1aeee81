#!/usr/bin/env python
"""Images -> labels in words: why each photo matches its address (paper 001, Sec. 3.2), or what in it tells the place (003).

    python ray_jobs/label.py --config demo
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai --dry-run
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai
    python ray_jobs/label.py --config my_city.yaml --set labels.prompt=reasoning

Reads <run>/grafts, writes <run>/alignment; with a prompt that shows photos alone reads <run>/photos, writes <run>/reasoning.
A model behind an endpoint is asked first, all answers go into <run>/response_cache; the table is made from what is there.
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
from addressvlm.gazetteer.gazetteer import Gazetteer
from addressvlm.labels import Request, beginning
from addressvlm.labels.cached_labels import survey_cache
from addressvlm.labels.costs import CostEstimate, label_report, report_summary
from addressvlm.labels.label_rows import city_of, label_batch, readable_rows
from addressvlm.labels.prompt import prompt_of
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import ResponseCache, open_for_writing
from addressvlm.labels.vllm_server import serving
from addressvlm.storage import tables
from addressvlm.storage.files import local_folder_for, write_parquet
from addressvlm.storage.run_dir import Run, is_done, resumable_dir
from addressvlm.storage.shards import Shard, ShardWork, plan_shards, sources_fingerprint
from ray_jobs import common, graft, prepare
from ray_jobs.common import Heartbeat
from ray_jobs.ray_data import run_shards, to_input_error

SHARD = 2048  # rows for a labeler that takes no time
SLOW_SHARD = 64  # rows of a model that an interruption may lose
ASKED = ("openai", "vllm")  # labelers whose answers are in the ledger
# Settings that no label depends on.
ASKING_ONLY = {
    "concurrency", "timeout_s", "retries", "requests_per_minute", "tokens_per_minute", "budget_tokens", "budget_usd",
    "usd_per_million_in", "usd_per_million_out", "image_rule", "image_base", "image_each", "workers", "cpus_per_worker",
    "gpus_per_worker", "tensor_parallel", "vllm_python", "vllm_arguments", "vllm_start_s",
}  # fmt: skip


def settings(config: Config) -> dict[str, Any]:
    """What the labels depend on."""
    prompt = prompt_of(config.labels)
    before = graft.settings(config) if prompt.shows == "graft" else prepare.settings(config)
    return {**before, "labels": {**config.labels.model_dump(mode="json", exclude=ASKING_ONLY), "prompt": prompt.version}}


def run_step(config: Config, redo: bool, dry_run: bool = False) -> None:
    """Label the grafts of a run, or its photos.

    Raises:
        InputError: there are none, or the labeler can't be used, or the budget is used up.
    """
    config = _absolute(config)
    run, shows = Run(config), prompt_of(config.labels).shows
    source, target = (run.grafts, run.alignment) if shows == "graft" else (run.photos, run.reasoning)
    if not dry_run and is_done(target, settings(config), redo):
        print("label: already done", flush=True)
        return
    asks = config.labels.labeler in ASKED
    shards = plan_shards(source, "train", SHARD if config.labels.labeler != "local" else SLOW_SHARD)
    if dry_run:
        print(_plan(config, shards, ResponseCache(run.response_cache), redo).text() if asks else _free(shards), flush=True)
        return
    tally = _ask(config, shards, redo) if asks else {}
    columns = list((tables.GRAFTS if shows == "graft" else tables.PHOTOS).names)
    function = partial(
        label_batch, config.labels.model_dump_json(), config.seed, str(run.gazetteer), str(run.response_cache) * asks
    )
    work = ShardWork(function, tables.ALIGNMENT, columns, sources_fingerprint(str(run.gazetteer)))
    with resumable_dir(target, settings(config), redo) as folder:
        made = run_shards("label", shards, folder, work, *_workers(config))
        counts = sum((Counter(summary["counts"]) for summary in made), Counter())
        report = label_report(config.labels, counts, tally, ResponseCache(run.response_cache) if asks else None)
        (folder / "labels.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
        rejects = [reject for summary in made for reject in summary["rejects"]]
        name = "label" if shows == "graft" else "label-reasoning"
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), run.rejects / f"{name}.parquet")
    print(f"label: {target}: {report_summary(report)}; {len(rejects):,} rejected", flush=True)


def _absolute(config: Config) -> Config:
    """With paths that mean the same in a worker, whose working directory is another."""
    config = config.model_copy(deep=True)
    labels = config.labels
    if labels.labeler in ("local", "vllm"):
        labels.model = common.absolute_path(labels.model)
    if labels.prompt.endswith(".md"):
        labels.prompt = common.absolute_path(labels.prompt)
    if labels.vllm_python:
        labels.vllm_python = common.absolute_path(labels.vllm_python)
    return config


def _ask(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    """Ask about every row that the ledger has no label for; the job's counts.

    A model behind an endpoint is asked by this process. A server that the job starts is asked where it runs.
    """
    if config.labels.labeler == "openai":
        return _fill(config, shards, redo)
    left = _plan(config, shards, ResponseCache(Run(config).response_cache), redo)
    if not left.left:
        print(left.text(), flush=True)
        return {}
    need = config.labels
    common.require_resources("GPU", need.gpus_per_worker, "the vLLM server", "labels.gpus_per_worker")
    common.require_resources("CPU", need.cpus_per_worker, "the vLLM server", "labels.cpus_per_worker")
    task = ray.remote(num_cpus=need.cpus_per_worker, num_gpus=need.gpus_per_worker, max_retries=0, max_calls=1)(_serve_and_fill)
    try:
        return ray.get(task.remote(config, shards, redo))
    except ray.exceptions.RayError as error:
        raise to_input_error(error) or error from None


def _serve_and_fill(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    with serving(config.labels, local_folder_for(Run(config).folder) / "vllm.log") as url:
        labels = config.labels.model_copy(update={"base_url": url})
        return _fill(config.model_copy(update={"labels": labels}), shards, redo)


def _fill(config: Config, shards: list[Shard], redo: bool) -> dict[str, Any]:
    run = Run(config)
    with open_for_writing(run.response_cache) as ledger:
        begin = beginning(config.labels, config.seed, _gazetteer(run))
        labeler = OpenAILabeler(config.labels, begin, ledger, partial(print, flush=True), redo)
        left = _plan(config, shards, ledger, redo)
        print(left.text(), flush=True)
        return labeler.settle(_requests(config, shards), left.left).to_dict() if left.left else {}


def _plan(config: Config, shards: list[Shard], ledger: ResponseCache, redo: bool) -> CostEstimate:
    """What is left to ask; `redo` asks once more about rows that the endpoint failed for."""
    begin = beginning(config.labels, config.seed, _gazetteer(Run(config)))
    with Heartbeat(lambda: "label: looking for what is answered already"):
        return survey_cache(config.labels, begin, _requests(config, shards), ledger, redo)


def _requests(config: Config, shards: list[Shard]) -> Iterator[Request]:
    """The rows whose image can be decoded, in order."""
    prompt, city = prompt_of(config.labels), city_of(str(Run(config).gazetteer))
    columns = ["id", "image", "tile", "facts"] if prompt.shows == "graft" else ["id", "image", "street", "district"]
    for rows in chain.from_iterable(shard.batches(columns) for shard in shards):
        for row in rows:  # one after another, so that memory holds no more than is asked about
            for _, request in readable_rows([row], prompt, city)[0]:
                yield request


def _gazetteer(run: Run) -> Gazetteer | None:
    return Gazetteer.load(run.gazetteer) if run.gazetteer.is_file() else None


def _workers(config: Config) -> tuple[int | None, dict[str, float] | None]:
    """How many make shards at a time, and what each needs if it keeps a model."""
    need = config.labels
    if need.labeler != "local":
        return None, None
    common.require_resources(
        "GPU", need.workers * need.gpus_per_worker, "labelling", "labels.workers or labels.gpus_per_worker"
    )
    common.require_resources(
        "CPU", need.workers * need.cpus_per_worker, "labelling", "labels.workers or labels.cpus_per_worker"
    )
    return need.workers, {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}


def _free(shards: list[Shard]) -> str:
    return f"label: {sum(shard.rows for shard in shards):,} rows; this labeler asks nobody and costs nothing"


def main(argv: list[str] | None = None) -> None:
    parser = common.job_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print rows, tokens, money and time, and ask nothing")
    args = parser.parse_args(argv)
    config = common.load_config(args)
    if not args.dry_run:
        common.connect()
    run_step(config, args.redo, args.dry_run)


if __name__ == "__main__":
    common.run_main(main)
