"""Photos -> vectors: every photo of a split through an image encoder, on the cluster.

Writes <run>/embeddings/<encoder>/<split>/<split>-*.parquet.
"""

import json
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from addressvlm import InputError, tables
from addressvlm.baselines.encoder import embed
from addressvlm.baselines.geography import has_coordinates
from addressvlm.config import Config
from addressvlm.config_compare import EncoderConfig
from addressvlm.files import write_parquet
from addressvlm.models.base import locate
from addressvlm.run import is_done, named_model, resuming, slug
from addressvlm.shards import Work as Making
from addressvlm.shards import plan
from addressvlm.stores import AnyPath
from ray_jobs.answering import files_digest, model_digest
from ray_jobs.common import absolute, require
from ray_jobs.rivals.work import Row, Work
from ray_jobs.stream import sharded

GALLERY = "train"
SHARD = 2048  # photos, at most
TOOK = "took.json"
ABOUT = ("id", "place", "lat", "lon", "street", "district")
EMBEDDINGS = tables.with_features(
    pa.schema([*(tables.PHOTOS.field(name) for name in ABOUT), ("vector", pa.list_(pa.float32()))])
)


@dataclass(frozen=True)
class Embedded:
    """A split's photos and their vectors.

    Attributes:
        folder: of the table.
        encoder: what tells the encoder apart from all others.
        data: what tells the photos apart from others.
        photos: rows with ABOUT, in the order of the table.
        vectors: of length 1, float32 (photos, D).
        took: what making them cost, as `Work.note` takes it.
        set_aside: photos of the split that are left out because nobody knows where they are.
    """

    folder: AnyPath
    encoder: str
    data: str
    photos: list[Row]
    vectors: np.ndarray
    took: Row
    set_aside: int = 0

    def of(self, ids: list[str]) -> "Embedded":
        """Some of the photos, in this order."""
        at = {photo["id"]: i for i, photo in enumerate(self.photos)}
        return self._taken([at[photo] for photo in ids])

    def somewhere(self) -> "Embedded":
        """Those whose coordinates are known."""
        known = [i for i, photo in enumerate(self.photos) if has_coordinates(photo)]
        return replace(self._taken(known), set_aside=len(self.photos) - len(known))

    def _taken(self, numbers: list[int]) -> "Embedded":
        if numbers == list(range(len(self.photos))):
            return self
        return replace(self, photos=[self.photos[i] for i in numbers], vectors=self.vectors[numbers])


def held(config: Config) -> dict[str, float]:
    """CPUs and GPUs that the workers hold."""
    need = config.evaluate
    return {"cpus": need.workers * need.cpus_per_worker, "gpus": need.workers * need.gpus_per_worker}


def base_of(config: Config, encoder: EncoderConfig) -> str:
    """Folder or hub name of the encoder, by a name that means the same in a worker.

    Raises:
        InputError: it looks like a folder and there is none.
    """
    return locate(absolute(encoder.base or config.model.base))


def embedded(work: Work, encoder: EncoderConfig, split: str, redo: bool = False) -> Embedded:
    """The photos of a split with their vectors, from <run>/embeddings or new.

    Raises:
        InputError: the encoder is not there or is none, the vectors that are there are another encoder's, the split has no
            photos, or the cluster is too small.
    """
    config, photos = work.config, work.run.photos
    base = base_of(config, encoder)
    data = files_digest(tables.files(photos, split))
    settings = {"encoder": model_digest(base), "dtype": config.model.dtype, "data": data}
    folder = work.run.folder / "embeddings" / slug(named_model(base)[0]) / split
    if not is_done(folder, settings, redo):
        need = config.evaluate
        require("CPU", need.workers * need.cpus_per_worker, "embedding", "evaluate.workers or evaluate.cpus_per_worker")
        each = max(tables.ROWS_PER_GROUP, min(SHARD, tables.count(photos, split) // (4 * need.workers)))
        shards = plan(photos, split, each)
        given = (base, config.model.dtype, config.model.trust_remote_code, need.cpus_per_worker, encoder.batch_size, split)
        making = Making(partial(embed, *given), EMBEDDINGS, [*ABOUT, "image"], settings["encoder"])
        actor = {"num_cpus": need.cpus_per_worker, "num_gpus": need.gpus_per_worker}
        with resuming(folder, settings, redo) as partly:
            begun = time.monotonic()
            made = sharded(f"embed: {named_model(base)[0]}, {split}", shards, partly, making, need.workers, actor)
            took = {"seconds": time.monotonic() - begun, "photos": sum(shard["rows"] for shard in made), **held(config)}
            (partly / TOOK).write_text(json.dumps(took), encoding="utf-8")
    table = tables.read(folder, split)
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = table.select(ABOUT).to_pylist()
    took = json.loads((folder / TOOK).read_text(encoding="utf-8"))
    name = f"{named_model(base)[0]} {settings['encoder']}"
    return Embedded(folder, name, data, rows, flat.reshape(len(rows), -1), took)


def gallery_of(work: Work, encoder: EncoderConfig, name: str, redo: bool = False) -> Embedded:
    """The training photos that a query may be compared with; those without coordinates are set aside.

    Raises:
        InputError: as `embedded`, or no training photo has coordinates.
    """
    everything = embedded(work, encoder, GALLERY, redo)
    usable = everything.somewhere()
    if aside := usable.set_aside:
        rejects = [
            {"file": None, "row": None, "id": photo["id"], "reason": "no coordinates: nothing can be learnt from finding it"}
            for photo in everything.photos
            if not has_coordinates(photo)
        ]
        write_parquet(pa.Table.from_pylist(rejects, schema=tables.REJECTS), work.run.rejects / f"{slug(name)}.parquet")
        print(f"compare: {name}: {aside:,} training photos without coordinates set aside", flush=True)
    if not usable.photos:
        raise InputError(
            f"none of the {aside:,} training photos of {work.run.photos} has coordinates: '{name}' needs them, take it out "
            "of compare.systems."
        )
    return usable
