"""Compare decoding strategies of one model: forward passes, accuracy, time. Rounds alternate, the result is a median ratio.

    python benchmarks/answers.py --model runs/demo/models/addressvlm/merged --data runs/demo/photos
    python benchmarks/answers.py --model base --gazetteer city/photos/gazetteer.geojson --data city/photos --photos 4

Constrained against free generation (decoding passes per answer, and accuracy on the same photos with an exact paired test),
scoring the trie in one pass against a batch of answers, ten questions about a photo against one, many chats against one.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from addressvlm.answers.generate import Answer, Decoder
from addressvlm.answers.sequence_scorer import SequenceScorer
from addressvlm.evaluation.parsing import Judge
from addressvlm.evaluation.run_questions import photo_image
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.inference import Localizer, Sampling, user_turn
from addressvlm.questions import ADDRESS_QUESTION, templates
from addressvlm.storage import tables

MAX_TOKENS = 24  # of a free answer, as in evaluate


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median over rounds of CPU time slow / fast, and the medians of both in seconds."""
    times = [(_cpu(slow), _cpu(fast)) for _ in range(rounds)]
    return (
        statistics.median(a / b for a, b in times),
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
    )


def _cpu(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def paired_p(wins: int, losses: int) -> float:
    """p-value of the exact two-sided sign test."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def compare_passes(localizer: Localizer, photos: list[dict[str, Any]], batch: int = 16) -> None:
    """Constrained against free generation."""
    city = localizer.require_gazetteer()
    texts = [a.text() for a in city.addresses]
    trie = localizer.trie(texts)
    judge = Judge(city.streets, city.districts, city.variants)
    free_passes, constrained_passes, correct = [], [], []
    for start in range(0, len(photos), batch):
        chunk = photos[start : start + batch]
        images, questions = [photo_image(p) for p in chunk], [ADDRESS_QUESTION] * len(chunk)
        free = localizer.answer(images, questions, MAX_TOKENS)
        constrained = localizer.answer_from(images, questions, [trie] * len(chunk))
        for photo, answer, decoded in zip(chunk, free, constrained, strict=True):
            free_passes.append(min(MAX_TOKENS, len(localizer.answer_tokens([user_turn("")], answer))))
            constrained_passes.append(decoded.passes)
            expected = Address(photo["street"], photo["district"]).text()
            correct.append([judge.correct("address", "generation", expected, text, street=photo["street"])
                            for text in (answer, texts[decoded.index])])  # fmt: skip
    wins, losses = sum(c and not f for f, c in correct), sum(f and not c for f, c in correct)
    free, constrained = statistics.mean(free_passes), statistics.mean(constrained_passes)
    print(
        f"decoding passes per answer, after the prompt's: free {free - 1:.1f}, constrained {constrained - 1:.1f}, ratio "
        f"{(constrained - 1) / (free - 1):.2f} (target: at most 0.33); with the prompt's: {constrained / free:.2f}"
    )
    print(f"correct addresses of {len(correct)}: free {sum(f for f, _ in correct)}, constrained {sum(c for _, c in correct)}; "
          f"only constrained {wins}, only free {losses}, paired p = {paired_p(wins, losses):.2f}")  # fmt: skip


def compare_scoring(localizer: Localizer, photo: dict[str, Any], rounds: int) -> None:
    """Score the trie in one pass or as a batch of answers, from the same prompt; and the time of the prompt."""
    trie = localizer.trie([a.text() for a in localizer.require_gazetteer().addresses])
    inputs = localizer.inputs([localizer.prompt([user_turn(ADDRESS_QUESTION)])], [[photo_image(photo)]])
    prefix = localizer.prefill(inputs)
    as_tree, as_batch = SequenceScorer(localizer, trie), SequenceScorer(localizer, trie, as_batch=True)
    difference = float((as_tree.score(prefix) - as_batch.score(prefix)).abs().max())
    times, slow, fast = ratio(lambda: as_batch.score(prefix), lambda: as_tree.score(prefix), rounds)
    print(f"all {len(trie.ends)} addresses scored ({len(trie)} nodes): as a batch {1000 * slow:.0f} ms, as a tree "
          f"{1000 * fast:.0f} ms, {times:.1f}x; largest difference of ln p {difference:.1e}")  # fmt: skip
    _, prefill, scoring = ratio(lambda: localizer.prefill(inputs), lambda: as_tree.score(prefix), rounds)
    print(f"prefill of photo and question: {1000 * prefill:.0f} ms, then scoring: {1000 * scoring:.0f} ms")


def compare_chats(localizer: Localizer, photos: list[dict[str, Any]], chats: int = 32) -> None:
    """Tokens a CPU second of many chats in one batch, against one after the other; all of the same length."""
    sampling, ends, localizer.end_tokens = Sampling(MAX_TOKENS, 1.0, seed=0), localizer.end_tokens, set()
    images = [photo_image(photos[i % len(photos)]) for i in range(chats)]
    states = [localizer.prefill_questions([image], ["What do you see?"])[0][1] for image in images]

    def write(some: list[Any]) -> None:
        decoder = Decoder()
        for state in some:
            decoder.join(state, [Answer(localizer, sampling, int(state.mask.sum()))])
        while decoder.step():
            pass

    ratios = [_cpu(lambda: [write([state]) for state in states]) / _cpu(lambda: write(states)) for _ in range(3)]
    print(f"{chats} chats of {MAX_TOKENS} tokens together: {statistics.median(ratios):.1f}x the tokens/s of one at a time")
    localizer.end_tokens = ends


def compare_questions(localizer: Localizer, photos: list[dict[str, Any]], rounds: int) -> None:
    """Ten questions about one photo against one question; every round has new photos, so no cache helps."""
    city = localizer.require_gazetteer()
    street, district = city.streets[0], city.districts[0]
    options = "; ".join(city.streets[:4])
    ten_questions = [
        templates("address", "generation")[0], templates("street", "generation")[0], templates("district", "generation")[0],
        *(templates("street", "judgment")[i].format(name=street) for i in range(2)),
        *(templates("district", "judgment")[i].format(name=district) for i in range(2)),
        *(templates("street", "choice")[i].format(options=options) for i in range(3)),
    ]  # fmt: skip
    for name, ask in (("free, in one batch", _batch), ("a conversation, by likelihood", _conversation)):
        times = []
        for number in range(rounds):
            first, second = (photo_image(photos[(2 * number + i) % len(photos)]) for i in range(2))
            fresh = _fresh(localizer)
            one = _cpu(lambda ask=ask, first=first, fresh=fresh: ask(fresh, first, ten_questions[:1]))
            times.append(_cpu(lambda ask=ask, second=second, fresh=fresh: ask(fresh, second, ten_questions)) / one)
        print(f"ten questions on one photo, {name}: {statistics.median(times):.2f}x the time of one (target: at most 2.5)")


def _fresh(localizer: Localizer) -> Localizer:
    """The same model with an empty photo cache."""
    fresh = Localizer(localizer.folder, localizer.device, loaded=(localizer.model, localizer.processor))
    fresh.gazetteer = localizer.gazetteer
    return fresh


def _batch(localizer: Localizer, image: Any, questions: list[str]) -> None:
    localizer.answer([image] * len(questions), questions, MAX_TOKENS)


def _conversation(localizer: Localizer, image: Any, questions: list[str]) -> None:
    conversation = localizer.conversation(image)
    for question in questions:
        conversation.ask(question)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of test-*.parquet")
    parser.add_argument("--gazetteer", type=Path, help="if the model's folder has none")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    localizer = Localizer(args.model, dtype=args.dtype, memory_mb=256)
    if args.gazetteer:
        localizer.gazetteer = Gazetteer.load(args.gazetteer)
    photos = list(islice(tables.iter_rows(args.data, "test"), args.photos))
    compare_passes(localizer, photos)
    compare_scoring(localizer, photos[0], args.rounds)
    compare_questions(localizer, photos, args.rounds)
    compare_chats(localizer, photos)


if __name__ == "__main__":
    main()
