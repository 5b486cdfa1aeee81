"""How varied the template labels of a table are: their distinct-n.

    python -m addressvlm.tools.label_diversity runs/demo/grafts

Distinct-n is the number of different n-grams over the number of all n-grams.
"""

import argparse
import random
from pathlib import Path

from addressvlm.gazetteer.name_matcher import normalize_name
from addressvlm.labels.facts import Facts
from addressvlm.labels.templates import explain
from addressvlm.storage import tables


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams of words in the texts / all of them."""
    ngrams: list[tuple[str, ...]] = []
    for text in texts:
        words = normalize_name(text).split()
        ngrams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(ngrams)) / max(1, len(ngrams))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grafts", type=Path)
    args = parser.parse_args()
    rows = tables.iter_rows(args.grafts, "train", ["id", "facts"])
    texts = [explain(Facts.from_json(row["facts"]), random.Random(f"0:{row['id']}")) for row in rows]
    words = sum(len(text.split()) for text in texts) / len(texts)
    shares = ", ".join(f"distinct-{n} {distinct_n(texts, n):.3f}" for n in (1, 2, 3, 4))
    print(f"{len(texts):,} labels of {words:.1f} words on average, {len(set(texts)):,} different; {shares}")


if __name__ == "__main__":
    main()
