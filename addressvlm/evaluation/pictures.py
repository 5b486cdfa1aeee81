"""Photos of a table as thumbnails inside a page."""

import base64
import io
from pathlib import Path

from PIL import Image

from addressvlm import tables

THUMBNAIL = 360  # pixels, longer side


def pictures(folder: Path, split: str, ids: set[str]) -> dict[str, str]:
    """Data URLs of some photos of a split."""
    if not ids or not tables.count(folder, split):
        return {}
    return {
        row["id"]: data_url(row["image"]["bytes"]) for row in tables.rows(folder, split, ["id", "image"]) if row["id"] in ids
    }


def data_url(encoded: bytes) -> str:
    """Encoded image -> a data URL, a JPEG of at most THUMBNAIL pixels; small files go in as they are."""
    opened = Image.open(io.BytesIO(encoded))
    kind = f"image/{(opened.format or 'jpeg').lower()}"
    if max(opened.size) > THUMBNAIL or len(encoded) > 60_000:
        opened.draft("RGB", (THUMBNAIL, THUMBNAIL))
        image = opened.convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=82)
        encoded, kind = buffer.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"
