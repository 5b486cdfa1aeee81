"""What the report says of the data: the dataset's card and the rows that were left out."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from addressvlm.stores import AnyPath, files_in
from addressvlm.tables import read_file

ONLY_IN_CARD = ("rejected", "sources", "questions_by_kind", "places_per")  # details of card.json that the page leaves there

Row = dict[str, Any]


def card(photos: AnyPath | None) -> Row:
    """The dataset card: counts of each split as a table, and the other plain facts in order."""
    file = photos / "card.json" if photos else None
    card = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    splits = card.pop("splits", {})
    columns = list(dict.fromkeys(key for counts in splits.values() for key in counts))
    facts = list(_flat({key: value for key, value in card.items() if key not in ONLY_IN_CARD}))
    leak = {key: card.get(key) for key in ("min_train_to_held_out_m", "guard_m")}
    return {"splits": splits, "columns": columns, "facts": facts, "attribution": card.get("attribution", []), **leak}


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of numbers and short texts, nested ones under `outer, inner`."""
    for key, value in tree.items():
        name = f"{before}{words(key)}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}, ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        elif isinstance(value, str) and 0 < len(value) <= 80:
            yield name, value


def words(key: str) -> str:
    """`guard_m` as `guard (m)`."""
    words = key.replace("_", " ")
    return f"{words[:-2]} (m)" if words.endswith(" m") else words


def rejects(folder: AnyPath | None) -> list[tuple[str, str, int]]:
    """(step, reason, rows), the most frequent first; what follows a colon in a reason tells rows apart and is left out."""
    counted: Counter[tuple[str, str]] = Counter()
    for file in files_in(folder, "*.parquet") if folder else []:
        reasons = read_file(file, ["reason"])["reason"].to_pylist()
        counted.update((file.stem, reason.partition(":")[0]) for reason in reasons)
    return [(step, reason, n) for (step, reason), n in counted.most_common(20)]
