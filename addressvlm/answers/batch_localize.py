"""Localize the photos of a table with a model that stays loaded: rows of photos in, one row of addresses a photo out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from PIL import Image

from addressvlm.dataset.photos import decode_photo
from addressvlm.dataset.readers.rows import Row, clean_text, identify, reject
from addressvlm.questions import ADDRESS_QUESTION
from addressvlm.storage import remote_path, tables
from addressvlm.storage.shards import Rows, ShardResult

if TYPE_CHECKING:
    from addressvlm.inference import Localization, Localizer

SPLIT = "located"
DECODING_THREADS = 2
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
        rows = [row | {"id": clean_text(row["id"])} for row in rows]
        decode = [partial(self._decode, row) for row in rows]
        for row, result in zip(rows, localize_photos(self._localizer, decode, self.top_k, self.batch_size), strict=True):
            if isinstance(result, str):
                rejects.append({"file": row.get("file"), "row": row.get("row"), "id": row["id"], "reason": result})
                continue
            best = result.candidates[0]
            localized.append(
                {
                    "id": row["id"], "street": best.street, "district": best.district, "confidence": result.confidence,
                    "known": result.known, "candidates": [vars(candidate) for candidate in result.candidates],
                }
            )  # fmt: skip
        return ShardResult({SPLIT: localized}, rejects)

    def _decode(self, row: dict[str, Any]) -> Image.Image | str:
        if "image" not in row:
            return decode_photo(remote_path.join(self.base, row["file"]), self.max_megapixels, self._localizer.image_size)
        image = row["image"] if isinstance(row["image"], dict) else {"bytes": row["image"]}
        path, content = image.get("path") or row["id"], image.get("bytes") or b""
        return decode_photo(path, self.max_megapixels, self._localizer.image_size, content)

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


def localize_photos(
    localizer: "Localizer", photos: Sequence[Callable[[], Image.Image | str]], top_k: int, batch_size: int
) -> Iterator["Localization | str"]:
    """The addresses of each photo, in order; the next batch is decoded and processed while the model has one.

    Args:
        photos: each decodes one, or returns the reason why it can't be used, which then stands for its addresses.
    """

    def prepare(decode: Callable[[], Image.Image | str]) -> Any:
        image = decode()
        return image if isinstance(image, str) else localizer.prepare_questions([image], [ADDRESS_QUESTION])[0]

    with ThreadPoolExecutor(DECODING_THREADS) as threads:
        ahead: deque[list[Any]] = deque()
        for start in range(0, len(photos), batch_size):
            ahead.append([threads.submit(prepare, decode) for decode in photos[start : start + batch_size]])
            if len(ahead) > 1:
                yield from _localize_batch(localizer, [future.result() for future in ahead.popleft()], top_k)
        for futures in ahead:
            yield from _localize_batch(localizer, [future.result() for future in futures], top_k)


def _localize_batch(localizer: "Localizer", prepared: Sequence[Any], top_k: int) -> Iterator["Localization | str"]:
    usable = [one for one in prepared if not isinstance(one, str)]
    results = iter(localizer.localize_prompts(usable, top_k))
    return (one if isinstance(one, str) else next(results) for one in prepared)


def photo_table(rows: Iterable[Row], find: Callable[[str], str] = str) -> tuple[Rows, Rows]:
    """Rows of PHOTO_LIST_SCHEMA from a manifest's rows, and rejects; ids and files are read as `prepare` reads them.

    `find` gives the path of a file as the photos' folder has it.
    """
    photos: Rows = []
    rejects: Rows = []
    first_row: dict[str, int] = {}
    for number, cells in enumerate(rows, start=1):
        if not cells:
            continue
        try:
            photo_id, file = identify(number, cells, first_row)
            photos.append({"row": number, "id": photo_id, "file": find(file)})
            first_row[photo_id] = number
        except ValueError as error:
            rejects.append(reject(number, cells, str(error)))
    return photos, rejects
