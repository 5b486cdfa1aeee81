"""How good are the labels? A sheet to rate them by eye, ratings by a model, and a summary of both.

    python -m addressvlm.labels.audit draw --run runs/my-city --n 100 --seed 0 --out audit.html
    python -m addressvlm.labels.audit judge --sheet audit.parquet --set labels.model=gpt-4o-mini --out judge.csv
    python -m addressvlm.labels.audit summary ratings-ann.csv ratings-ben.csv judge.csv --sheet audit.parquet

`draw` writes two files: the sheet, one HTML page with everything in it, which does not tell who wrote a label; and beside it
the same labels as a table, which does.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from addressvlm.config import load
from addressvlm.errors import InputError
from addressvlm.labels.audit import sheet
from addressvlm.labels.audit.ratings import JUDGE_PROMPT, format_summary, judge, summarize
from addressvlm.storage.run_dir import storage_errors


def _draw(args: argparse.Namespace) -> None:
    table = args.out.with_suffix(".parquet")
    if args.out.suffix != ".html":
        raise InputError(f"--out {args.out}: give the sheet a name that ends in .html.")
    items = sheet.draw(args.run, args.n, args.seed, args.table)
    sheet.write_items(table, items)
    sheet.write_page(args.out, items)
    print(f"{args.out}: {len(items)} labels to rate, sheet {sheet.sheet_id(items)}\n{table}: the same with their sources")


def _judge(args: argparse.Namespace) -> None:
    items = sheet.read_items(args.sheet)
    config = load(args.config, args.sets, os.environ)
    ratings = judge(items, config, args.prompt or str(JUDGE_PROMPT), args.sheet.with_suffix(".response_cache"))
    sheet.write_ratings(args.out, ratings, items)
    print(f"{args.out}: ratings of {len(ratings)} of {len(items)} labels")


def _summary(args: argparse.Namespace) -> None:
    items = sheet.read_items(args.sheet)
    summary = summarize(items, sheet.read_ratings(args.ratings, items))
    print(format_summary(summary), end="")
    if args.json:
        with storage_errors(args.json.parent):
            args.json.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m addressvlm.labels.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="draw | judge | summary")

    one = commands.add_parser("draw", help="draw labels of a run onto a sheet to rate")
    one.add_argument("--run", type=Path, required=True, action="append", help="folder of a run; several are mixed blindly")
    one.add_argument("--n", type=int, default=100, help="number of labels, evenly over their sources (default: 100)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--table", choices=["alignment", "reasoning"], default="alignment", help="which labels of the run")
    one.add_argument("--out", type=Path, default=Path("audit.html"), help="the sheet (default: audit.html)")
    one.set_defaults(command=_draw)

    two = commands.add_parser("judge", help="let a model behind an endpoint rate the same labels")
    two.add_argument("--sheet", type=Path, default=Path("audit.parquet"), help="the table that `draw` wrote")
    two.add_argument("--config", default="demo", help="a preset's name or a YAML file; its section `labels` is the judge's")
    two.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    two.add_argument("--prompt", metavar="FILE", help="the judge's prompt (default: addressvlm/labels/audit/judge.md)")
    two.add_argument("--out", type=Path, default=Path("judge.csv"))
    two.set_defaults(command=_judge)

    three = commands.add_parser("summary", help="shares with intervals, and agreement, of one or more CSVs")
    three.add_argument("ratings", type=Path, nargs="+", help="CSVs from the sheet's button or from `judge`")
    three.add_argument("--sheet", type=Path, default=Path("audit.parquet"), help="the table that `draw` wrote")
    three.add_argument("--json", type=Path, help="also write the numbers here")
    three.set_defaults(command=_summary)

    args = parser.parse_args(argv)
    try:
        args.command(args)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
