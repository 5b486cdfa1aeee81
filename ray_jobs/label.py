#!/usr/bin/env python
"""Grafted images -> alignment labels: why each photo matches its address, in words (paper 001, Sec. 3.2).

    python ray_jobs/label.py --config demo
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai

Reads <run>/grafts, writes <run>/alignment.
"""

import math
from collections import Counter
from functools import partial
from typing import Any

from addressvlm import tables
from addressvlm.config import Config
from addressvlm.labels import make_labeler
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.rows import label_rows
from addressvlm.run import Run, is_done, resuming
from addressvlm.shards import Made, Rows, Work, plan, sources_fingerprint
from ray_jobs import common, graft
from ray_jobs.stream import sharded

SHARD = 2048  # rows for a labeler that does not wait for anybody
PAID_SHARD = 64  # rows of which an interruption may lose the labels
WAITING_ONLY = ("concurrency", "timeout_s", "retries")  # settings that no label depends on


def settings(config: Config) -> dict[str, Any]:
    """What the labels depend on."""
    labels = {k: v for k, v in config.labels.model_dump(mode="json").items() if k not in WAITING_ONLY}
    return {**graft.settings(config), "labels": {**labels, "prompt": load_prompt().version}}


def run_step(config: Config, redo: bool) -> None:
    """Label the grafts of a run.

    Raises:
        InputError: there are no grafts, or the labeler can't be used.
    """
    run = Run(config)
    if is_done(run.alignment, settings(config), redo):
        print("label: already done", flush=True)
        return
    asks = config.labels.labeler != "template"
    shards = plan(run.grafts, "train", PAID_SHARD if asks else SHARD)
    make_labeler(config.labels, config.seed)  # a missing key is told before Ray is asked
    tasks = math.ceil(config.labels.concurrency / PAID_SHARD) if asks else None  # `concurrency` holds for the whole job
    labels = config.labels.model_copy(update={"concurrency": config.labels.concurrency // (tasks or 1)})
    function = partial(label_batch, labels.model_dump_json(), config.seed, str(run.gazetteer))
    work = Work(function, tables.ALIGNMENT, tables.GRAFTS.names, sources_fingerprint(str(run.gazetteer)))
    with resuming(run.alignment, settings(config), redo) as folder:
        made = sharded("label", shards, folder, work, tasks)
    total = sum(summary["rows"] for summary in made)
    by = ", ".join(f"{n:,} {source}" for source, n in sum((Counter(m["counts"]) for m in made), Counter()).most_common())
    print(f"label: {total:,} labels in {run.alignment}: {by}", flush=True)


def label_batch(labels: str, seed: int, gazetteer: str, grafts: Rows) -> Made:
    """Rows of GRAFTS -> rows of ALIGNMENT, counted by who wrote them; see `label_rows`."""
    rows = label_rows(labels, seed, gazetteer, grafts)
    return Made({"train": rows}, counts=Counter(row["source"] for row in rows))


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__).parse_args(argv)
    config = common.configure(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.job(main)
