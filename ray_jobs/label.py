#!/usr/bin/env python
"""Grafted images -> alignment labels: why each photo matches its address, in words (paper 001, Sec. 3.2).

    python ray_jobs/label.py --config demo
    OPENAI_API_KEY=… python ray_jobs/label.py --config my_city.yaml --set labels.labeler=openai

Reads <run>/grafts, writes <run>/alignment.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from addressvlm import tables
from addressvlm.config import Config
from addressvlm.labels import make_labeler
from addressvlm.labels.prompt import load_prompt
from addressvlm.labels.rows import label_rows
from addressvlm.run import Run, is_done, writing
from ray_jobs import common, graft
from ray_jobs.stream import mapped

BATCH = 256  # rows at a time for a labeler that does not wait for anybody
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
    tables.files(run.grafts, "train")  # says which step is missing
    total = tables.count(run.grafts, "train")
    make_labeler(config.labels, config.seed)  # a missing key is told before Ray is asked
    asks = config.labels.labeler != "template"
    function = partial(label_rows, config.labels.model_dump_json(), config.seed, str(run.gazetteer))
    common.progress("label", 0, total)
    sources: Counter[str] = Counter()
    with writing(run.alignment, settings(config)) as folder:
        rows = mapped(
            "label",
            run.grafts,
            "train",
            tables.GRAFTS.names,
            function,
            tables.ALIGNMENT,
            batch_size=2 * config.labels.concurrency if asks else BATCH,
            tasks=1 if asks else None,  # so that `concurrency` holds for the whole job
        )
        tables.write(folder, "train", _counted(rows, sources, total), tables.ALIGNMENT)
    by = ", ".join(f"{n:,} {source}" for source, n in sources.most_common())
    print(f"label: {total:,} labels in {run.alignment}: {by}", flush=True)


def _counted(rows: Iterator[dict[str, Any]], sources: Counter[str], total: int) -> Iterator[dict[str, Any]]:
    for done, row in enumerate(rows, start=1):
        sources[row["source"]] += 1
        common.progress("label", done, total)
        yield row


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__).parse_args(argv)
    config = common.configure(args)
    common.connect()
    run_step(config, args.redo)


if __name__ == "__main__":
    common.job(main)
