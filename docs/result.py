"""Draw docs/result.png, the picture of an answer in the README: test photos and their likeliest addresses.

    python docs/result.py runs/demo "stage 2 only, equal steps" docs/result.png --count 4

The photos are drawn by seed from the test split, right or wrong; the toy camera takes them again in more pixels, the model sees
the run's own.
"""

import argparse
import random
from pathlib import Path

from figure import render_photo

from addressvlm import Localizer
from addressvlm.evaluation.answer_picture import Example, draw_answers
from addressvlm.gazetteer.gazetteer import Address
from addressvlm.grafting import decode_photo
from addressvlm.storage import tables
from addressvlm.storage.run_dir import slug


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("system")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4, help="photos (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="draws the photos (default: 0)")
    parser.add_argument("--toy", default="alderbrook", help="the toy city of the run (default: alderbrook)")
    args = parser.parse_args()
    localizer = Localizer(str(args.run / "models" / slug(args.system) / "merged"))
    rows = sorted(tables.iter_rows(args.run / "photos", "test"), key=lambda row: row["id"])
    examples = []
    for row in random.Random(args.seed).sample(rows, args.count):
        localization = localizer.localize(decode_photo(row["image"]["bytes"]), top_k=3)
        examples.append(
            Example(render_photo(args.toy, row, 640), localization.candidates, Address(row["street"], row["district"]))
        )
    draw_answers(examples).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
