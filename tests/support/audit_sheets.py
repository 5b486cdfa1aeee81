"""Runs with labels, sheets of them and ratings, for tests of the audit."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from addressvlm.labels.audit.__main__ import main
from addressvlm.labels.audit.sheet import CRITERIA, Rating, read_items
from addressvlm.labels.facts import Facts
from addressvlm.storage import tables

FACTS = Facts("Mill Street", "Harbour", ("Mill Street", "King Street"), "east-west", "along", "east", "King Street", 40, "east")


def run_with(folder: Path, sources: dict[str, int], views: int = 2) -> Path:
    """A run with so many labels of each source, `views` of each place."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 120, 90)).save(buffer, "JPEG")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows = []
    for i, source in enumerate(source for source, n in sources.items() for _ in range(n)):
        label = {
            "level": "alignment",
            "kind": "explanation",
            "question": "Where?",
            "answer": f"Text <{i}> & more.",
            "options": [],
        }
        rows.append(
            {
                "id": f"photo{i}", "place": f"place{i // views}", "image": image, "street": "Mill Street",
                "district": "Harbour", "rounds": [label], "source": source, "attempts": 1, "facts": FACTS.to_json(),
                "names": [],
            }
        )  # fmt: skip
    tables.write_table(folder / "alignment", "train", rows, tables.ALIGNMENT)
    tables.write_table(folder / "grafts", "train", rows, tables.GRAFTS)
    return folder


def sheet(folder: Path, **sources: int) -> tuple[Path, list[dict[str, Any]]]:
    main(["draw", "--run", str(run_with(folder / "run", sources)), "--n", "4", "--out", str(folder / "audit.html")])
    return folder / "audit.parquet", read_items(folder / "audit.parquet")


def ratings_of(items: list[dict[str, Any]], rater: str, levels: list[int]) -> list[Rating]:
    return [Rating(i["item"], rater, dict.fromkeys(CRITERIA, level)) for i, level in zip(items, levels, strict=True)]
