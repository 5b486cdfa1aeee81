"""Look for texts that take the service long: the slowest of random ones, in milliseconds of CPU time per kB.

    python benchmarks/slow_inputs.py --seconds 20
    python benchmarks/slow_inputs.py --model runs/demo/models/addressvlm/merged      # its prompts and tokenizer, too

A text is a unit of one to four pieces (words of questions, names, brackets, blanks, accents, special tokens), repeated between
a beginning and an end.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

from tests.support.slow_inputs import PIECES, Recipe, city, cpu_s, targets

LENGTH = 16_000  # characters


def model_targets(folder: str) -> dict[str, Callable[[str], Any]]:
    """What the model's process does with a text before the model."""
    from addressvlm.answers.chat_model import user_turn
    from addressvlm.inference import Localizer

    localizer = Localizer(folder)
    return {
        "prompt": lambda text: localizer.prompt([user_turn(text)]),
        "tokens": lambda text: localizer.tokenizer(text),
    }


def main() -> None:
    """Print the slowest texts of each reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each reader of texts")
    parser.add_argument("--streets", type=int, default=5000, help="of the city")
    parser.add_argument("--model", help="folder of a model")
    args = parser.parse_args()
    rng = random.Random(0)
    readers = targets(city(args.streets)) | (model_targets(args.model) if args.model else {})
    for name, reader in readers.items():
        end, tried, worst = time.monotonic() + args.seconds, 0, (0.0, Recipe("", "a", ""))
        while time.monotonic() < end:
            start, unit, stop = (
                "".join(rng.choices(PIECES, k=rng.randint(least, most))) for least, most in ((0, 2), (1, 4), (0, 2))
            )
            text = (recipe := Recipe(start, unit, stop)).text(LENGTH)
            cost = min(cpu_s(reader, text) for _ in range(2)) * 1e3 / (len(text.encode()) / 1e3)
            worst, tried = max(worst, (cost, recipe)), tried + 1
        row = {"reader": name, "tried": tried, "worst ms per kB": round(worst[0], 3), "text": list(worst[1])}
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
