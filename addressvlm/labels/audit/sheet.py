"""The sheet of an audit: labels drawn from runs, as a page and as a table, and the ratings of them as CSV files."""

import base64
import csv
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from addressvlm.errors import InputError
from addressvlm.grafting import display_image
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import fact_notes
from addressvlm.storage import tables
from addressvlm.storage.run_dir import storage_errors

LEVELS = ("wrong", "partly", "right")  # from the worst
CRITERIA = {
    "truth": "What it says is true of the photo and the map.",
    "reason": "What it says is why the photo is at this address.",
    "names": "It names the right street and district, and concludes on no other.",
}
COLUMNS = ("sheet", "item", "id", "rater", *CRITERIA, "note")
ITEMS = tables.with_features(
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
            ("facts", pa.string()),  # JSON of addressvlm.labels.facts.Facts, null where the run has none
            ("rows", pa.int64()),  # number of labels of this run and source, from which the item was drawn
        ]
    )
)

Item = dict[str, Any]  # a row of ITEMS


@dataclass(frozen=True)
class Rating:
    """One rater's levels for one item; a criterion without a level is missing."""

    item: str
    rater: str
    levels: Mapping[str, int]  # criterion -> index into LEVELS
    note: str = ""


def draw(runs: Sequence[Path], n: int, seed: int, table: str = "alignment") -> list[Item]:
    """Draw `n` labels evenly over runs and sources, from as many places as possible, and shuffle them.

    Args:
        runs: folders of runs; several are mixed into one blind sheet.
        table: the labels' folder in a run, `alignment` or `reasoning`.

    Returns:
        Rows of ITEMS; fewer than `n` if there are not so many labels.
    """
    rng = random.Random(seed)
    strata: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in dict.fromkeys(runs):
        for row in tables.read_table(run / table, "train", ["id", "place", "source"]).to_pylist():
            strata[str(run), row["source"]].append(row)
    for rows in strata.values():
        rng.shuffle(rows)
        views: Counter[str] = Counter()
        for row in rows:
            views[row["place"]] += 1
            row["view"] = views[row["place"]]
        rows.sort(key=lambda row: row["view"])  # one of each place before the second of any
    sizes = {stratum: len(rows) for stratum, rows in strata.items()}
    chosen: dict[tuple[str, str], set[str]] = {}
    for remaining, stratum in zip(range(len(sizes), 0, -1), sorted(sizes, key=lambda s: (sizes[s], s)), strict=True):
        chosen[stratum] = {row["id"] for row in strata[stratum][: -(-n // remaining)]}
        n -= len(chosen[stratum])  # small strata leave more to the larger ones
    items = [item for run in dict.fromkeys(runs) for item in _items(run, table, chosen, sizes)]
    rng.shuffle(items)
    return items


def _items(
    run: Path, table: str, chosen: Mapping[tuple[str, str], set[str]], sizes: Mapping[tuple[str, str], int]
) -> Iterable[Item]:
    """The items of one run."""
    facts: dict[str, str] = {}
    if (run / "grafts").is_dir():
        facts = {row["id"]: row["facts"] for row in tables.iter_rows(run / "grafts", "train", ["id", "facts"])}
    ids = {photo for (folder, _), photos in chosen.items() if folder == str(run) for photo in photos}
    for row in tables.iter_rows(run / table, "train"):
        if row["id"] in ids:
            label = row["rounds"][-1]
            text = f"{run}\n{row['id']}\n{label['answer']}"
            yield {
                **{key: row[key] for key in ("id", "place", "street", "district", "source")},
                "image": {**row["image"], "bytes": display_image(row)},
                "item": hashlib.sha256(text.encode()).hexdigest()[:10],
                "run": str(run),
                "question": label["question"],
                "label": label["answer"],
                "facts": facts.get(row["id"]),
                "rows": sizes[str(run), row["source"]],
            }


def sheet_id(items: Iterable[Mapping[str, Any]]) -> str:
    """An identifier of the sheet: other items, another id."""
    return hashlib.sha256("".join(sorted(item["item"] for item in items)).encode()).hexdigest()[:8]


def write_page(path: Path, items: Sequence[Item]) -> None:
    """Write the HTML page that shows the items one by one and collects ratings."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = []
    for item in items:
        image, facts = item["image"]["bytes"], item["facts"]
        kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
        lines = fact_notes(Facts.from_json(facts)).splitlines() if facts else []
        shown.append({**item, "picture": url, "notes": [line.removeprefix("- ") for line in lines]})
    page = environment.get_template("sheet.html").render(
        sheet=sheet_id(items), items=shown, criteria=CRITERIA, levels=LEVELS[::-1], columns=",".join(COLUMNS)
    )
    with storage_errors(path.parent):
        path.write_text(page, encoding="utf-8")


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write the items as a table, for the summary and the judge."""
    with storage_errors(path.parent):
        pq.write_table(pa.Table.from_pylist(list(items), schema=ITEMS), path)


def read_items(path: Path) -> list[Item]:
    """Rows of ITEMS."""
    try:
        return pq.read_table(path, schema=ITEMS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        sentence = " ".join(str(error).split())[:200]
        raise InputError(f"{path} can't be read as a draw ({sentence}): give the table that `audit draw` wrote.") from None


def read_ratings(paths: Iterable[Path], items: Sequence[Item]) -> list[Rating]:
    """The ratings of one sheet from all files; of several by one rater for one item the last counts."""
    sheet, names = sheet_id(items), {item["item"] for item in items}
    ratings: dict[tuple[str, str], Rating] = {}
    for path in paths:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                if missing := [c for c in COLUMNS if c not in (reader.fieldnames or ())]:
                    raise InputError(f"{path} lacks the column '{missing[0]}': give the CSV that the sheet's button wrote.")
                for number, row in enumerate(reader, start=2):
                    where = f"{path}, line {number}"
                    if row["sheet"] != sheet or row["item"] not in names:
                        raise InputError(f"{where}: these ratings are of another sheet ({row['sheet']}, this is {sheet}).")
                    ratings[row["rater"], row["item"]] = _parse_rating(row, where)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{path} can't be read as ratings ({error}): give the CSV that the sheet's button wrote."
            ) from None
    return list(ratings.values())


def _parse_rating(row: Mapping[str, str], where: str) -> Rating:
    levels = {}
    for criterion in CRITERIA:
        word = (row[criterion] or "").strip().lower()
        if word and word not in LEVELS:
            raise InputError(f"{where}: '{word}' in column {criterion} is none of {', '.join(LEVELS)}.")
        if word:
            levels[criterion] = LEVELS.index(word)
    return Rating(row["item"], row["rater"].strip() or "anonymous", levels, row["note"] or "")


def write_ratings(path: Path, ratings: Iterable[Rating], items: Sequence[Item]) -> None:
    """Write the same CSV as the sheet's button."""
    sheet, ids = sheet_id(items), {item["item"]: item["id"] for item in items}
    with storage_errors(path.parent), path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for rating in ratings:
            words = [LEVELS[rating.levels[c]] if c in rating.levels else "" for c in CRITERIA]
            writer.writerow([sheet, rating.item, ids[rating.item], rating.rater, *words, rating.note])
