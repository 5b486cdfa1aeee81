"""Localize the photos of a table with a model that stays loaded: rows of photos in, one row of addresses a photo out."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from PIL import Image

from addressvlm.dataset.photos import check_bytes, check_photo
from addressvlm.storage import remote_path, tables
from addressvlm.storage.shards import Rows, ShardResult

SPLIT = "located"
PHOTO_LIST_SCHEMA = pa.schema([("row", pa.int64()), ("id", pa.string()), ("file", pa.string())])  # input without images
CANDIDATE_TYPE = pa.struct([("street", pa.string()), ("district", pa.string()), ("probability", pa.float64())])
LOCALIZED_SCHEMA = tables.with_features(
    pa.schema(
        [
            ("id", pa.string()),
            ("street", pa.string()),  # of the likeliest address, also where `known` is false
            ("district", pa.string()),
            ("confidence", pa.float64()),
            ("known", pa.bool_()),  # false: don't know
            ("candidates", pa.list_(CANDIDATE_TYPE)),
        ]
    )
)  # fmt: skip


@dataclass
class BatchLocalizer:
    """Localizes the photos of a shard; a worker loads the model with its first photos and keeps it.

    Attributes:
        base: the folder or URI that `file` is relative to.
        threads: of torch.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    base: str
    max_megapixels: float
    top_k: int
    threads: int
    batch_size: int = 16

    def __call__(self, rows: Rows) -> ShardResult:
        """Rows of PHOTO_LIST_SCHEMA, or with `id` and `image` as in `tables.PHOTOS`, -> rows of LOCALIZED_SCHEMA, rejects."""
        localized, rejects = [], []
        for start in range(0, len(rows), self.batch_size):
            photos = []
            for row in rows[start : start + self.batch_size]:
                if "image" in row:
                    image = row["image"] or {}
                    content = check_bytes(image.get("bytes") or b"", image.get("path") or row["id"], self.max_megapixels)
                else:
                    content = check_photo(remote_path.join(self.base, row["file"]), self.max_megapixels)
                if isinstance(content, str):
                    rejects.append({"file": row.get("file"), "row": row.get("row"), "id": row["id"], "reason": content})
                else:
                    photos.append((row, Image.open(io.BytesIO(content)).convert("RGB")))
            results = self._localizer.localize_many([image for _, image in photos], self.top_k)
            for (row, _), result in zip(photos, results, strict=True):
                best = result.candidates[0]
                localized.append(
                    {
                        "id": row["id"], "street": best.street, "district": best.district, "confidence": result.confidence,
                        "known": result.known, "candidates": [vars(candidate) for candidate in result.candidates],
                    }
                )  # fmt: skip
        return ShardResult({SPLIT: localized}, rejects)

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: every worker loads its own."""
        return {key: value for key, value in self.__dict__.items() if key != "_localizer"}

    @cached_property
    def _localizer(self) -> Any:
        import torch
        from transformers.utils.logging import disable_progress_bar

        from addressvlm.inference import Localizer

        torch.set_num_threads(self.threads)
        disable_progress_bar()
        localizer = Localizer(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code, memory_mb=0)
        localizer.require_gazetteer()
        return localizer


def photo_table(files: Sequence[tuple[str | None, str | None]]) -> tuple[Rows, Rows]:
    """Rows of PHOTO_LIST_SCHEMA from a manifest's ids and files, and rejects: rows without a file, repeated ids."""
    photos, rejects, seen = [], [], set[str]()
    for number, (name, file) in enumerate(files, start=1):
        photo_id = name or file
        if not file or not photo_id:
            rejects.append({"file": None, "row": number, "id": photo_id, "reason": "file missing: the row names no photo"})
        elif photo_id in seen:
            rejects.append({"file": file, "row": number, "id": photo_id, "reason": f"id twice: {photo_id} came before"})
        else:
            seen.add(photo_id)
            photos.append({"row": number, "id": photo_id, "file": file})
    return photos, rejects
