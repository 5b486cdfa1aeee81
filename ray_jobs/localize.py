#!/usr/bin/env python
"""Localize photos by the million with a trained model.

    python ray_jobs/localize.py --model runs/demo/models/addressvlm/merged --photos my_photos --out runs/located
    python ray_jobs/localize.py --model runs/demo/models/addressvlm/merged --photos list.csv --out runs/located --top-k 3
    python ray_jobs/localize.py --config demo --photos runs/demo/photos --split test --out runs/located

Photos are a folder, a manifest (CSV, JSONL or Parquet) with the column `file` and optionally `id`, or Parquet with the columns
`id` and `image`. Writes <out>/located-*.parquet, one row a photo, and <out>/rejects.parquet with the photos that can't be used
and why. Rerun it to resume; no photo comes twice.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from addressvlm import InputError
from addressvlm.answers.batch_localize import LOCALIZED_SCHEMA, PHOTO_LIST_SCHEMA, SPLIT, BatchLocalizer, photo_table
from addressvlm.answers.calibration import CALIBRATION_FILE
from addressvlm.config import Config
from addressvlm.dataset.readers.base import PhotoFiles, list_photos
from addressvlm.dataset.readers.rows import clean_text
from addressvlm.dataset.readers.table import open_table
from addressvlm.evaluation.report import MAIN
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE
from addressvlm.models.loading import resolve_model
from addressvlm.storage import remote_path, tables
from addressvlm.storage.files import digest, open_parquet, write_parquet
from addressvlm.storage.remote_path import AnyPath, path_of
from addressvlm.storage.run_dir import DONE_FILE, WORK_DIR, Run, is_done, is_unfinished, resumable_dir
from addressvlm.storage.shards import Shard, ShardWork, files_fingerprint, plan_file_shards, plan_shards, sources_fingerprint
from ray_jobs.common import connect, job_parser, load_config, require_evaluation_workers, run_main
from ray_jobs.evaluation import model_digest
from ray_jobs.ray_data import run_shards

SHARD = 128  # photos: seconds on a fast GPU, minutes on a slow one; an interruption loses at most so many for each worker
IMAGE_COLUMNS = {"id", "image"}  # of Parquet that holds the photos themselves

Row = dict[str, Any]


@dataclass(frozen=True)
class PhotoSource:
    """The photos to localize: Parquet files that hold them, or rows of PHOTO_LIST_SCHEMA and the rejects of the list."""

    files: list[AnyPath]
    rows: list[Row]
    rejects: list[Row]

    def fingerprint(self, base: str) -> str:
        """Changes with the list or with a local photo; `base`: the folder that files of rows are relative to."""
        files = [str(path) for path in self.files] or [remote_path.join(base, row["file"]) for row in self.rows]
        return digest([self.rows, self.rejects, files_fingerprint(files)])

    def plan(self, folder: AnyPath) -> tuple[list[Shard], list[str], list[Row]]:
        """Shards, the columns to read of them, and rejected rows; a list of photos is written into the working `folder`."""
        if self.files:
            shards, rejects = skip_repeated_ids(plan_file_shards(self.files, SHARD))
            return shards, sorted(IMAGE_COLUMNS), rejects
        table = folder / WORK_DIR / "listed"
        for old in table.glob("*.parquet"):
            old.unlink()
        tables.write_table(table, "photos", self.rows, PHOTO_LIST_SCHEMA, SHARD)
        return plan_shards(table, "photos", SHARD), PHOTO_LIST_SCHEMA.names, self.rejects


def localize(config: Config, model: str, photos: str, split: str, out: AnyPath, top_k: int, redo: bool) -> None:
    """Localize all photos.

    Raises:
        InputError: there is no such model or it has no gazetteer, there are no photos, `out` holds something else, or the
            cluster is too small.
    """
    model = resolve_model(model)
    if not (path_of(model) / GAZETTEER_FILE).is_file():
        raise InputError(f"{model} holds no {GAZETTEER_FILE}: give a model that was trained on a city.")
    need = config.evaluate
    require_evaluation_workers(config, "localize")
    path = path_of(photos)
    base = str((path if path.is_dir() else path.parent).absolute())
    source = open_photos(photos, split)
    settings = {
        "model": model_digest(model),
        "calibration": sources_fingerprint(str(path_of(model) / CALIBRATION_FILE)),
        "photos": photos,
        "split": split,
        "top_k": top_k,
        "dtype": config.model.dtype,
        "content": source.fingerprint(base),
    }
    require_own_folder(out, settings)
    if is_done(out, settings, redo):
        print("localize: already done", flush=True)
        return
    with resumable_dir(out, settings, redo) as folder:
        shards, columns, rejects = source.plan(folder)
        localizer = BatchLocalizer(
            model, config.model.dtype, config.model.trust_remote_code, base, config.city.max_megapixels, top_k,
            max(1, int(need.cpus_per_worker)),
        )  # fmt: skip
        actor = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        work = ShardWork(localizer, LOCALIZED_SCHEMA, columns)
        summaries = run_shards("localize", shards, folder, work, need.workers, actor)
        rejects += [reject for summary in summaries for reject in summary["rejects"]]
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), folder / "rejects.parquet")
        written = sum(summary["written"].get(SPLIT, 0) for summary in summaries)
    print(f"localize: {written:,} photos localized, {len(rejects):,} rejected: {out}", flush=True)


def open_photos(photos: str, split: str) -> PhotoSource:
    """The photos of the flag `--photos`."""
    path = path_of(photos)
    if has_images(path, split):
        return PhotoSource([path] if path.is_file() else list(tables.table_files(path, split)), [], [])
    if path.is_dir():
        rows, rejects = photo_table({"file": file} for file in list_photos(photos))
    else:
        table = open_table(photos)
        table.require(["file"])
        rows, rejects = photo_table(table.rows, PhotoFiles(str(path.parent)).find)
    if not rows:
        raise InputError(f"{photos} names no photo: give a folder of photos, or a table with a column file.")
    return PhotoSource([], rows, rejects)


def has_images(path: AnyPath, split: str) -> bool:
    """Whether it is Parquet, or a folder with the Parquet files of a split, that holds the photos themselves."""
    files = sorted(path.glob(f"{split}-*.parquet")) if path.is_dir() else [path]
    if not files or files[0].suffix != ".parquet" or not files[0].is_file():
        return False
    try:
        with open_parquet(files[0]) as table:
            return set(table.schema_arrow.names) >= IMAGE_COLUMNS
    except pa.ArrowException as error:
        raise InputError(f"{files[0]} is not Parquet ({str(error).splitlines()[0]}): write it again.") from None


def skip_repeated_ids(shards: list[Shard]) -> tuple[list[Shard], list[Row]]:
    """The shards without rows that have no id or one that came before, and rejects for these rows."""
    unique: list[Shard] = []
    rejects: list[Row] = []
    ids: set[str] = set()
    number = 0
    for shard in shards:
        picked = []
        for index, row in enumerate(row for batch in shard.batches(["id"]) for row in batch):
            number += 1
            photo_id = clean_text(row["id"])
            if photo_id and photo_id not in ids:
                picked.append(index)
            else:
                reason = f"duplicate id: {photo_id} came before" if photo_id else "empty cell: id"
                rejects.append({"file": None, "row": number, "id": photo_id, "reason": reason})
            ids.add(photo_id)
        unique.append(shard if len(picked) == shard.rows else replace(shard, rows=len(picked), picked=tuple(picked)))
    return unique, rejects


def require_own_folder(out: AnyPath, settings: dict[str, Any]) -> None:
    """Refuse a folder that this job did not write, since its content would be replaced."""
    mark = out / DONE_FILE
    ours = mark.is_file() and json.loads(mark.read_text()).keys() == settings.keys()
    if not (ours or is_unfinished(out)) and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} holds something else: give an empty or a new --out.")


def main(argv: list[str] | None = None) -> None:
    parser = job_parser(__doc__ or "")
    parser.add_argument("--model", metavar="FOLDER", help="a trained model's folder (default: AddressVLM of the run)")
    parser.add_argument("--photos", metavar="PATH", required=True, help="a folder, a manifest, or Parquet with images")
    parser.add_argument("--split", default="test", help="of a folder of Parquet with images (default: test)")
    parser.add_argument("--out", type=path_of, metavar="FOLDER", required=True, help="output folder")
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="candidates a photo (default: 5)")
    args = parser.parse_args(argv)
    config = load_config(args)
    if args.top_k < 1:
        raise InputError(f"--top-k is {args.top_k}: give 1 or more.")
    connect()
    model = args.model or str(Run(config).model_dir(MAIN) / "merged")
    localize(config, model, args.photos, args.split, args.out.absolute(), args.top_k, args.redo)


if __name__ == "__main__":
    run_main(main)
