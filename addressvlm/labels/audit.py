"""How good are the labels? A sheet to rate them by eye, a model's ratings beside, and what both come to.

    python -m addressvlm.labels.audit draw --run runs/my-city --n 100 --seed 0 --out audit.html
    python -m addressvlm.labels.audit judge --sheet audit.parquet --set labels.model=gpt-4o-mini --out judge.csv
    python -m addressvlm.labels.audit summary ratings-ann.csv ratings-ben.csv judge.csv --sheet audit.parquet

`draw` writes two files: the sheet, one HTML page with everything in it, which does not say who wrote a label; and beside it
the same labels as a table, which does.
"""

import argparse
import base64
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from addressvlm.errors import InputError
from addressvlm.labels.audit_summary import as_text, summarize
from addressvlm.labels.audit_table import (
    COLUMNS,
    CRITERIA,
    LEVELS,
    Row,
    draw,
    read_drawn,
    read_ratings,
    sheet_of,
    write_drawn,
    write_ratings,
)
from addressvlm.labels.facts import Facts
from addressvlm.labels.prompt import notes
from addressvlm.run import storage_error


def write_sheet(path: Path, items: Sequence[Row]) -> None:
    """Write the page that shows the items one by one and collects ratings.

    Raises:
        InputError: the place can't be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("audit.html").render(
        sheet=sheet_of(items),
        items=[{**item, "picture": _data_url(item["image"]["bytes"]), "notes": _notes(item)} for item in items],
        criteria=CRITERIA,
        levels=LEVELS[::-1],
        columns=",".join(COLUMNS),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path.parent) from error


def _data_url(image: bytes) -> str:
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _notes(item: Row) -> list[str]:
    return [line.removeprefix("- ") for line in notes(Facts.from_json(item["facts"])).splitlines()] if item["facts"] else []


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except InputError as error:
        sys.exit(f"error: {error}")


def _draw(args: argparse.Namespace) -> None:
    table = args.out.with_suffix(".parquet")
    if args.out.suffix != ".html":
        raise InputError(f"--out {args.out}: give the sheet a name that ends in .html.")
    items = draw(args.run, args.n, args.seed, args.table)
    write_drawn(table, items)
    write_sheet(args.out, items)
    print(f"{args.out}: {len(items)} labels to rate, sheet {sheet_of(items)}\n{table}: the same with who wrote them")


def _judge(args: argparse.Namespace) -> None:
    from addressvlm.config import load
    from addressvlm.labels.audit_judge import PROMPT, judge

    items = read_drawn(args.sheet)
    ratings = judge(
        items, load(args.config, args.sets, os.environ), args.prompt or str(PROMPT), args.sheet.with_suffix(".ledger")
    )
    write_ratings(args.out, ratings, items)
    print(f"{args.out}: ratings of {len(ratings)} of {len(items)} labels")


def _summary(args: argparse.Namespace) -> None:
    items = read_drawn(args.sheet)
    found = summarize(items, read_ratings(args.ratings, items))
    print(as_text(found), end="")
    if args.json:
        _write_json(args.json, found)


def _write_json(path: Path, found: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path.parent) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="draw | judge | summary")

    one = commands.add_parser("draw", help="labels of a run into a sheet to rate")
    one.add_argument("--run", type=Path, required=True, action="append", help="folder of a run; several are mixed blindly")
    one.add_argument("--n", type=int, default=100, help="labels, evenly over those who wrote them (default: 100)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--table", choices=["alignment", "reasoning"], default="alignment", help="which labels of the run")
    one.add_argument("--out", type=Path, default=Path("audit.html"), help="the sheet (default: audit.html)")
    one.set_defaults(command=_draw)

    two = commands.add_parser("judge", help="let a model behind an endpoint rate the same labels")
    two.add_argument("--sheet", type=Path, default=Path("audit.parquet"), help="the table that `draw` wrote")
    two.add_argument("--config", default="demo", help="a preset's name or a YAML file; its section `labels` is the judge's")
    two.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    two.add_argument("--prompt", metavar="FILE", help="what the judge is asked (default: our own addressvlm/labels/judge.md)")
    two.add_argument("--out", type=Path, default=Path("judge.csv"))
    two.set_defaults(command=_judge)

    three = commands.add_parser("summary", help="shares with intervals and agreement from one or more CSVs")
    three.add_argument("ratings", type=Path, nargs="+", help="CSVs from the sheet's button or from `judge`")
    three.add_argument("--sheet", type=Path, default=Path("audit.parquet"), help="the table that `draw` wrote")
    three.add_argument("--json", type=Path, help="also write the numbers here")
    three.set_defaults(command=_summary)
    return parser


if __name__ == "__main__":
    main()
