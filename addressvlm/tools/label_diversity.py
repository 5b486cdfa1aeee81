"""How varied the template's labels of a table are.

    python -m addressvlm.tools.label_diversity runs/demo/grafts

Distinct-n is the share of different runs of n words among all runs of n words.
"""

import argparse
import random
from pathlib import Path

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import Facts
from addressvlm.labels.templates import explain
from addressvlm.storage import tables


def distinct_ngrams(texts: list[str], n: int) -> float:
    """Different runs of n words in the texts / all of them."""
    runs = [
        run
        for text in texts
        if (words := normalize_name(text).split())
        for run in zip(*(words[i:] for i in range(n)), strict=False)
    ]
    return len(set(runs)) / max(1, len(runs))


def main() -> None:
    """Print how varied the labels of a table of grafts are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grafts", type=Path)
    args = parser.parse_args()
    found = tables.iter_rows(args.grafts, "train", ["id", "facts"])
    texts = [explain(Facts.from_json(row["facts"]), random.Random(f"0:{row['id']}")) for row in found]
    words = sum(len(text.split()) for text in texts) / len(texts)
    shares = ", ".join(f"distinct-{n} {distinct_ngrams(texts, n):.3f}" for n in (1, 2, 3, 4))
    print(f"{len(texts):,} labels of {words:.1f} words on average, {len(set(texts)):,} different; {shares}")


if __name__ == "__main__":
    main()
