"""The labels drawn for an audit, and the ratings that come back: two tables and the check that they belong together."""

import csv
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.errors import InputError
from addressvlm.grafting import display_image
from addressvlm.storage import tables
from addressvlm.storage.run_dir import storage_error

LEVELS = ("wrong", "partly", "right")  # from the worst
CRITERIA = {
    "truth": "What it says is true of the photo and the map.",
    "reason": "What it says is why the photo is at this address.",
    "names": "It names the right street and district, and concludes on no other.",
}
COLUMNS = ("sheet", "item", "id", "rater", *CRITERIA, "note")
DRAWN = tables.with_features(
    pa.schema(
        [
            ("item", pa.string()),  # unique in the sheet
            ("id", pa.string()),
            ("place", pa.string()),
            ("run", pa.string()),
            ("image", tables.IMAGE),
            ("street", pa.string()),
            ("district", pa.string()),
            ("question", pa.string()),
            ("label", pa.string()),
            ("source", pa.string()),
            ("facts", pa.string()),  # JSON of addressvlm.labels.facts.Facts, null where the run kept none
            ("rows", pa.int64()),  # how many labels of this run and source the item was drawn from
        ]
    )
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Rating:
    """What one rater found of one item; a criterion that was left out is missing."""

    item: str
    rater: str
    levels: Mapping[str, int]  # criterion -> index into LEVELS
    note: str = ""


def draw(runs: Sequence[Path], n: int, seed: int, table: str = "alignment") -> list[Row]:
    """Draw `n` labels evenly over runs and sources, from as many places as possible, and shuffle them.

    Args:
        runs: folders of runs; several are mixed into one blind sheet.
        table: the labels' folder in a run, `alignment` or `reasoning`.

    Returns:
        Rows of DRAWN; fewer than `n` if there are not so many labels.

    Raises:
        InputError: a run has no labels.
    """
    rng = random.Random(seed)
    strata: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for run in dict.fromkeys(runs):
        for row in tables.read_table(run / table, "train", ["id", "place", "source"]).to_pylist():
            strata[str(run), row["source"]].append(row)
    for rows in strata.values():
        rng.shuffle(rows)
        seen: Counter[str] = Counter()
        turns = [(_count(seen, row["place"]), i) for i, row in enumerate(rows)]
        rows[:] = [rows[i] for _, i in sorted(turns)]  # one of each place before the second of any
    quota = _even(n, {key: len(rows) for key, rows in strata.items()})
    wanted = {key: {row["id"] for row in rows[: quota[key]]} for key, rows in strata.items()}
    sizes = {key: len(rows) for key, rows in strata.items()}
    items = [item for run in dict.fromkeys(runs) for item in _items(run, table, wanted, sizes)]
    rng.shuffle(items)
    return items


def _count(seen: Counter[str], place: str) -> int:
    seen[place] += 1
    return seen[place]


def _even(n: int, sizes: Mapping[Any, int]) -> dict[Any, int]:
    """Share `n` out as evenly as the sizes allow; the smallest are served first."""
    quota = {}
    for left, key in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda k: (sizes[k], k)), strict=True):
        quota[key] = min(sizes[key], -(-n // left))
        n -= quota[key]
    return quota


def _items(
    run: Path, table: str, wanted: Mapping[tuple[str, str], set[str]], sizes: Mapping[tuple[str, str], int]
) -> Iterable[Row]:
    """The rows of DRAWN of one run."""
    chosen = {photo for (where, _), ids in wanted.items() if where == str(run) for photo in ids}
    facts: dict[str, str] = {}
    if (run / "grafts").is_dir():
        facts = {row["id"]: row["facts"] for row in tables.iter_rows(run / "grafts", "train", ["id", "facts"])}
    for row in tables.iter_rows(run / table, "train"):
        if row["id"] in chosen:
            said = row["rounds"][-1]
            text = f"{run}\n{row['id']}\n{said['answer']}"
            yield {
                **{key: row[key] for key in ("id", "place", "street", "district", "source")},
                "image": {**row["image"], "bytes": display_image(row)},
                "item": hashlib.sha256(text.encode()).hexdigest()[:10],
                "run": str(run),
                "question": said["question"],
                "label": said["answer"],
                "facts": facts.get(row["id"]),
                "rows": sizes[str(run), row["source"]],
            }


def sheet_of(items: Iterable[Mapping[str, Any]]) -> str:
    """What tells this draw from any other."""
    return hashlib.sha256("".join(sorted(item["item"] for item in items)).encode()).hexdigest()[:8]


def write_drawn(path: Path, items: Sequence[Row]) -> None:
    """Write what was drawn, for the summary and the judge.

    Raises:
        InputError: the place can't be written.
    """
    try:
        pq.write_table(pa.Table.from_pylist(list(items), schema=DRAWN), path)
    except OSError as error:
        raise storage_error(error, path.parent) from error


def read_drawn(path: Path) -> list[Row]:
    """Rows of DRAWN.

    Raises:
        InputError: there is no such table, or it is no draw.
    """
    try:
        drawn = pq.read_table(path, schema=DRAWN).to_pylist()
    except (OSError, pa.ArrowException) as error:
        sentence = " ".join(str(error).split())[:200]
        raise InputError(f"{path} can't be read as a draw ({sentence}): give the table that `audit draw` wrote.") from None
    return drawn


def read_ratings(paths: Iterable[Path], items: Sequence[Row]) -> list[Rating]:
    """The ratings of one sheet, of all files together; a row given twice counts once, its last.

    Raises:
        InputError: a file can't be read, lacks a column, is of another sheet, or holds a word that is no rating.
    """
    sheet, known = sheet_of(items), {item["item"] for item in items}
    found: dict[tuple[str, str], Rating] = {}
    for path in paths:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
                    raise InputError(f"{path} lacks the column '{missing[0]}': give the CSV that the sheet's button wrote.")
                for number, row in enumerate(reader, start=2):
                    where = f"{path}, line {number}"
                    if row["sheet"] != sheet or row["item"] not in known:
                        raise InputError(f"{where}: these ratings are of another sheet ({row['sheet']}, this is {sheet}).")
                    found[row["rater"], row["item"]] = _rating(row, where)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{path} can't be read as ratings ({error}): give the CSV that the sheet's button wrote."
            ) from None
    return list(found.values())


def _rating(row: Mapping[str, str], where: str) -> Rating:
    levels = {}
    for criterion in CRITERIA:
        word = (row[criterion] or "").strip().lower()
        if word and word not in LEVELS:
            raise InputError(f"{where}: '{word}' in column {criterion} is none of {', '.join(LEVELS)}.")
        if word:
            levels[criterion] = LEVELS.index(word)
    return Rating(row["item"], row["rater"].strip() or "anonymous", levels, row["note"] or "")


def write_ratings(path: Path, ratings: Iterable[Rating], items: Sequence[Row]) -> None:
    """The same CSV as the sheet's button writes.

    Raises:
        InputError: the place can't be written.
    """
    sheet, ids = sheet_of(items), {item["item"]: item["id"] for item in items}
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for r in ratings:
                words = [LEVELS[r.levels[c]] if c in r.levels else "" for c in CRITERIA]
                writer.writerow([sheet, r.item, ids[r.item], r.rater, *words, r.note])
    except OSError as error:
        raise storage_error(error, path.parent) from error
