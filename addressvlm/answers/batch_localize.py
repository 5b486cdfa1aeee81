"""Any number of photos through a model that stays loaded: rows of photos in, one row an address found out."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from PIL import Image

from addressvlm.dataset.photos import check_bytes, check_photo
from addressvlm.storage import remote_path, tables
from addressvlm.storage.shards import Rows, ShardResult

SPLIT = "located"
PHOTO_LIST_SCHEMA = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("file", pa.string())]
)  # what `locate` gets, unless with images
CANDIDATE_TYPE = pa.struct([("street", pa.string()), ("district", pa.string()), ("probability", pa.float64())])
LOCALIZED_SCHEMA = tables.with_features(
    pa.schema(
        [
            ("id", pa.string()),
            ("street", pa.string()),  # of the likeliest address, also where it is not known
            ("district", pa.string()),
            ("confidence", pa.float64()),
            ("known", pa.bool_()),  # false: don't know
            ("candidates", pa.list_(CANDIDATE_TYPE)),
        ]
    )
)  # fmt: skip


@dataclass
class BatchLocalizer:
    """The work on a shard; a worker that stays loads the model with its first photos.

    Attributes:
        base: what `file` is relative to, a folder or a URI.
        threads: of torch.
    """

    model: str
    dtype: str
    trust_remote_code: bool
    base: str
    max_megapixels: float
    top_k: int
    threads: int
    at_once: int = field(default=16)

    def __call__(self, rows: Rows) -> ShardResult:
        """Rows of PHOTOS, or with `id` and `image` as in `tables.PHOTOS`, -> rows of LOCATED; bad photos to the rejects."""
        located: Rows = []
        rejects: Rows = []
        for photos, bad in self._batches(rows):
            rejects += bad
            found = self._localizer.localize_many([image for _, image in photos], self.top_k)
            for (row, _), one in zip(photos, found, strict=True):
                best = one.candidates[0]
                located.append(
                    {
                        "id": row["id"], "street": best.street, "district": best.district, "confidence": one.confidence,
                        "known": one.known, "candidates": [vars(candidate) for candidate in one.candidates],
                    }
                )  # fmt: skip
        return ShardResult({SPLIT: located}, rejects)

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
        made = Localizer(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code, memory_mb=0)
        made.known_city()
        return made

    def _batches(self, rows: Rows) -> Iterator[tuple[list[tuple[dict[str, Any], Image.Image]], Rows]]:
        """Some photos decoded, and the rows that hold none."""
        for start in range(0, len(rows), self.at_once):
            good, bad = [], []
            for row in rows[start : start + self.at_once]:
                found = self._read(row)
                if isinstance(found, str):
                    bad.append({"file": row.get("file"), "row": row.get("row"), "id": row["id"], "reason": found})
                else:
                    good.append((row, Image.open(io.BytesIO(found)).convert("RGB")))
            yield good, bad

    def _read(self, row: dict[str, Any]) -> bytes | str:
        """The encoded photo, or the reason why there is none."""
        if "image" not in row:
            return check_photo(remote_path.join(self.base, row["file"]), self.max_megapixels)
        image = row["image"] or {}
        return check_bytes(image.get("bytes") or b"", image.get("path") or row["id"], self.max_megapixels)


def photo_table(files: Sequence[tuple[str | None, str | None]]) -> tuple[Rows, Rows]:
    """Rows of PHOTOS from ids and files as a manifest has them, and rejects: rows without a file, ids that come again."""
    good: Rows = []
    rejects: Rows = []
    seen: set[str] = set()
    for number, (name, file) in enumerate(files, start=1):
        photo = name or file
        if not file or not photo:
            rejects.append({"file": None, "row": number, "id": photo, "reason": "file missing: the row names no photo"})
        elif photo in seen:
            rejects.append({"file": file, "row": number, "id": photo, "reason": f"id twice: {photo} came before"})
        else:
            seen.add(photo)
            good.append({"row": number, "id": photo, "file": file})
    return good, rejects
