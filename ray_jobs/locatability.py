#!/usr/bin/env python
"""Score the locatability of training photos (paper 003, Sec. 3.1), and count those below a threshold.

    python ray_jobs/locatability.py --config my_city.yaml --segmentation nvidia/segformer-b5-finetuned-cityscapes-1024-1024 \\
        --clip openai/clip-vit-large-patch14-336
    python ray_jobs/locatability.py --config my_city.yaml --weights paper \\
        --segmentation nvidia/segformer-b5-finetuned-ade-640-640

With --weights paper the classes have the fixed weights that were published with the paper's code: its 0.4 is of such scores.

Reads <run>/photos (train), writes <run>/locatability: a table of photos and scores, curve.json and curve.svg. Photos below the
threshold are listed in <run>/rejects/locatability.parquet.
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pyarrow as pa

from addressvlm import InputError
from addressvlm.baselines import locatability
from addressvlm.baselines.locatability import (
    DEFAULT_TEXTS,
    PAPER_WEIGHTS,
    THRESHOLD,
    ClassWeights,
    LocatabilityTexts,
    cached_locatability,
)
from addressvlm.config import Config
from addressvlm.evaluation.run_questions import photo_image
from addressvlm.models.loading import resolve_model
from addressvlm.storage import tables
from addressvlm.storage.files import write_parquet
from addressvlm.storage.run_dir import Run, is_done, resumable_dir
from addressvlm.storage.shards import Rows, ShardResult, ShardWork, plan_shards
from ray_jobs import common, prepare
from ray_jobs.common import absolute_path
from ray_jobs.ray_data import run_shards

SHARD = 64  # photos
BATCH = 8  # photos that are segmented together
SCHEMA = pa.schema([("id", pa.string()), ("place", pa.string()), ("locatability", pa.float64())])


def run_step(
    config: Config,
    segmentation: str,
    clip: str | None,
    texts: LocatabilityTexts | ClassWeights = DEFAULT_TEXTS,
    threshold: float = THRESHOLD,
    redo: bool = False,
) -> int:
    """Score the training photos of a run; returns how many are below the threshold.

    Raises:
        InputError: there are no photos, or one of the models is not there.
    """
    run, models = Run(config), [absolute_path(segmentation), clip and absolute_path(clip)]
    if not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold:g}: locatability is between 0 and 1.")
    for model in filter(None, models):
        resolve_model(model)
    out = run.locatability
    settings = {**prepare.settings(config), "locatability": {"models": models, **asdict(texts)}}
    if not is_done(out, settings, redo):
        need = config.evaluate
        actor = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        work = ShardWork(partial(score_batch, *models, texts), SCHEMA, ["id", "place", "image"])
        with resumable_dir(out, settings, redo) as folder:
            run_shards("locatability", plan_shards(run.photos, "train", SHARD), folder, work, need.workers, actor)
            curve = locatability.curve(tables.read_table(folder, "train", ["locatability"])["locatability"].to_pylist())
            (folder / "curve.json").write_text(json.dumps(asdict(curve), indent=1), encoding="utf-8")
            with (folder / "curve.svg").open("wb") as file:
                locatability.draw_curve(curve, file, threshold)
    rows = list(tables.iter_rows(out, "train"))
    low = [row for row in rows if row["locatability"] < threshold]
    reason = f"its locatability is {{:.2f}}, below {threshold:g}"
    rejects = [{"file": None, "row": None, "id": row["id"], "reason": reason.format(row["locatability"])} for row in low]
    write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), run.rejects / "locatability.parquet")
    print(f"locatability: {len(low):,} of {len(rows):,} training photos are below {threshold:g}", flush=True)
    return len(low)


def score_batch(segmentation: str, clip: str | None, texts: LocatabilityTexts | ClassWeights, photos: Rows) -> ShardResult:
    """Rows of PHOTOS -> rows of SCHEMA; the process keeps the models loaded between calls."""
    scorer = cached_locatability(segmentation, clip, texts)
    scores = [
        score
        for start in range(0, len(photos), BATCH)
        for score in scorer.scores([photo_image(photo) for photo in photos[start : start + BATCH]])
    ]
    return ShardResult({"train": [
        {"id": photo["id"], "place": photo["place"], "locatability": score} for photo, score in zip(photos, scores, strict=True)
    ]})  # fmt: skip


def main() -> None:
    parser = common.job_parser(__doc__ or "")
    parser.add_argument("--segmentation", required=True, metavar="MODEL", help="folder or hub name: SegFormer, Mask2Former …")
    parser.add_argument("--clip", metavar="MODEL", help="folder or hub name of a CLIP-like model, unless there are weights")
    weights = "CSV of fixed weights of the classes: number, weight; `paper`: those of the paper, for ADE20K's 150 classes"
    parser.add_argument("--weights", metavar="FILE", help=weights)
    parser.add_argument("--clues", type=Path, metavar="FILE", help="YAML with texts, clues and others (default: built in)")
    least = f"least locatability of a photo that is not rejected (default: {THRESHOLD})"
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=least)
    args = parser.parse_args()
    config = common.load_config(args)
    texts: LocatabilityTexts | ClassWeights = LocatabilityTexts.read(args.clues) if args.clues else DEFAULT_TEXTS
    if args.weights:
        texts = ClassWeights.read(PAPER_WEIGHTS if args.weights == "paper" else Path(args.weights))
    elif not args.clip:
        raise InputError("a CLIP-like model gives classes their weights: give --clip, or --weights with fixed ones.")
    common.connect()
    run_step(config, args.segmentation, args.clip, texts, args.threshold, args.redo)


if __name__ == "__main__":
    common.run_main(main)
