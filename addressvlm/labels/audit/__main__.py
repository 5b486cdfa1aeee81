"""How good are the labels? A sheet to rate them by eye, a model's ratings beside, and what both come to.

    python -m addressvlm.labels.audit.__main__ draw --run runs/my-city --n 100 --seed 0 --out audit.html
    python -m addressvlm.labels.audit.__main__ judge --sheet audit.parquet --set labels.model=gpt-4o-mini --out judge.csv
    python -m addressvlm.labels.audit.__main__ summary ratings-ann.csv ratings-ben.csv judge.csv --sheet audit.parquet

`draw` writes two files: the sheet, one HTML page with everything in it, which does not say who wrote a label; and beside it
the same labels as a table, which does.
"""

import argparse
import base64
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from addressvlm.config import Config
from addressvlm.errors import InputError
from addressvlm.labels.audit.agreement import as_text, summarize
from addressvlm.labels.audit.sheet import (
    COLUMNS,
    CRITERIA,
    LEVELS,
    Rating,
    Row,
    draw,
    read_drawn,
    read_ratings,
    sheet_of,
    write_drawn,
    write_ratings,
)
from addressvlm.labels.facts import Facts
from addressvlm.labels.labelers import Request, writer
from addressvlm.labels.prompt import fact_notes, prompt_of
from addressvlm.labels.request_scheduler import OpenAILabeler
from addressvlm.labels.response_cache import open_for_writing
from addressvlm.labels.retry import RetryState
from addressvlm.labels.validator import LabelValidator, Problem
from addressvlm.storage.run_dir import storage_error


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
    page = environment.get_template("sheet.html").render(
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
    return (
        [line.removeprefix("- ") for line in fact_notes(Facts.from_json(item["facts"])).splitlines()] if item["facts"] else []
    )


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

    pass

    items = read_drawn(args.sheet)
    ratings = judge(
        items, load(args.config, args.sets, os.environ), args.prompt or str(JUDGE_PROMPT), args.sheet.with_suffix(".ledger")
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
    two.add_argument(
        "--prompt", metavar="FILE", help="what the judge is asked (default: our own addressvlm/labels/audit/judge.md)"
    )
    two.add_argument("--out", type=Path, default=Path("judge.csv"))
    two.set_defaults(command=_judge)

    three = commands.add_parser("summary", help="shares with intervals and agreement from one or more CSVs")
    three.add_argument("ratings", type=Path, nargs="+", help="CSVs from the sheet's button or from `judge`")
    three.add_argument("--sheet", type=Path, default=Path("audit.parquet"), help="the table that `draw` wrote")
    three.add_argument("--json", type=Path, help="also write the numbers here")
    three.set_defaults(command=_summary)
    return parser


JUDGE_PROMPT = Path(__file__).with_name("judge.md")
_LINE = re.compile(rf"\b({'|'.join(CRITERIA)})\b\W{{0,6}}({'|'.join(LEVELS)})\b", re.IGNORECASE)


class Readable(LabelValidator):
    """Accepts an answer that rates every criterion."""

    def problems(self, text: str, facts: Facts) -> list[Problem]:
        """The criteria that the answer does not rate."""
        missing = [criterion for criterion in CRITERIA if criterion not in levels_in(text)]
        return [
            Problem("rating", f"it lacks the line “{criterion}:” with one of the words {', '.join(LEVELS)}")
            for criterion in missing
        ]


def levels_in(text: str) -> dict[str, int]:
    """Criterion -> level of the lines `truth: right`; the first of each counts."""
    found: dict[str, int] = {}
    for criterion, level in _LINE.findall(text):
        found.setdefault(criterion.lower(), LEVELS.index(level.lower()))
    return found


def judge(items: Sequence[Row], config: Config, prompt: str, ledger: Path) -> list[Rating]:
    """Ratings of the items that the model answered readably about.

    Args:
        items: rows of `audit_table.DRAWN`.
        config: its section `labels` names the judge.
        prompt: name or path of a prompt file; {question} in it is the text to be judged.
        ledger: folder of what was answered.

    Raises:
        InputError: the prompt or the endpoint can't be used.
    """
    labels = config.labels.model_copy(update={"labeler": "openai", "prompt": prompt})
    asked = prompt_of(labels)
    texts = {item["item"]: item["label"] for item in items}

    def begin(request: Request) -> RetryState:
        return RetryState(request, replace(asked, questions=(texts[request.id],)), Readable(), labels, config.seed)

    requests = [Request(item["item"], item["image"]["bytes"], facts_of_item(item)) for item in items]
    with open_for_writing(ledger) as kept:
        answers = OpenAILabeler(labels, begin, kept, lambda line: print(line, flush=True)).label(requests)
    rater = f"judge {writer(labels)}"
    return [
        Rating(request.id, rater, levels_in(answer.text))
        for request, answer in zip(requests, answers, strict=True)
        if answer.source == writer(labels)
    ]


def facts_of_item(item: Row) -> Facts:
    """The item's facts; the address alone where the run kept none."""
    return Facts.from_json(item["facts"]) if item["facts"] else Facts(item["street"], item["district"])


if __name__ == "__main__":
    main()
