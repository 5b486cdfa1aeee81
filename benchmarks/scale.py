#!/usr/bin/env python
"""Estimate the cost of a hundred cities from the measured cost of one photo at every step, as Markdown tables.

    python benchmarks/scale.py
    python benchmarks/scale.py --photos 5e6 --cities 3 --usd-in 0.4 --usd-out 1.6 --peak-tflops 362 --gpu-usd-hour 1.9

`MEASUREMENTS` lists measured values and their commands; the flags are assumptions: prices, GPUs, limits. docs/scale.md shows
the output.
"""

import argparse
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRAIN = 0.7  # share of the photos, the default of city.split


@dataclass(frozen=True)
class Measurement:
    """A measured value and its source."""

    value: float
    unit: str
    what: str
    command: str


PITTSBURGH = "benchmarks/metadata.py <streets> <districts of Pittsburgh> --rows 10000000"
CAMBRIDGE = "files of a run on central Cambridge, 604 photos, 388 grafts of 320 px"
MEASUREMENTS = {
    "photo_b": Measurement(64_236, "bytes a photo", "table photos", CAMBRIDGE),
    "graft_b": Measurement(20_426, "bytes a training photo", "table grafts", CAMBRIDGE),
    "label_b": Measurement(20_458, "bytes a training photo", "table alignment", CAMBRIDGE),
    "answer_b": Measurement(113, "bytes a question", "table answers", CAMBRIDGE),
    "metadata_us": Measurement(49.5, "us CPU a photo", "prepare, driver: table, addresses, list, split, gazetteer", PITTSBURGH),
    "metadata_b": Measurement(816, "bytes a photo", "prepare, driver: memory", f"{PITTSBURGH}, less the next"),
    "driver_mib": Measurement(393, "MiB", "prepare, driver: memory without photos", "the same, with --photos, and the streets"),
    "check_us": Measurement(2_624, "us CPU a photo", "prepare, workers: photos of 640 x 640 read and checked",
                         "benchmarks/metadata.py --photos <Cambridge> --sample 100"),
    "question_us": Measurement(750, "us CPU a photo", "prepare, workers: conversations", PITTSBURGH),
    "graft_us": Measurement(12_690, "us CPU a training photo", "graft, Ray included", "benchmarks/graft_job.py --photos 20000"),
    "ask_us": Measurement(2_900, "us CPU a row", "label, asking an endpoint", "benchmarks/labelling.py"),
    "in": Measurement(8_744, "tokens a row", "label, sent with an image in high detail, by gpt-4o-mini's rule",
                   "ray_jobs/label.py --config demo --set labels.labeler=openai --dry-run"),
    "out": Measurement(256, "tokens a row", "label, written at most", "the same"),
    "text": Measurement(789, "tokens a row", "label, facts without an image, 2.1 asks a row", "docs/labels.md, 388 labels"),
    "stage_1_tflop": Measurement(14.143, "TFLOP a row", "train, alignment, both passes, 815 tokens",
                              "ray_jobs/train.py --config paper-both --dry-run --photos 1000000, its base's shape"),
    "stage_2_tflop": Measurement(17.135, "TFLOP a row", "train, localization, both passes, 996 tokens", "the same"),
    "weights_b": Measurement(8.27, "GB", "merged model in bfloat16, 4.137e9 parameters", "the same"),
    "front_us": Measurement(15_000, "us CPU a request", "service: routes and decoding",
                         "benchmarks/service.py on the toy model: the best round less that of the bare engine"),
}  # fmt: skip
SHARD_ROWS = {"photos": 2048, "grafts": 256, "alignment": 2048}  # ray_jobs/{prepare,graft,label}.py
TILE = 5667  # tokens of the one tile that such a picture has in high detail, by the same rule
PHOTO_TOKENS = 600  # of a photo and the question
WEIGHTS = 4.137e9  # parameters that a token goes through; two operations each


def cost(name: str) -> float:
    """A measured value."""
    return MEASUREMENTS[name].value


def scoring_tflop(args: Namespace) -> float:
    """TFLOP to score one photo: the photo and the question, then the trie of all addresses of its city."""
    return 2 * WEIGHTS * (PHOTO_TOKENS + args.addresses * args.address_tokens) / 1e12


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def short(number: float) -> str:
    """Three significant digits, thousands with commas."""
    if number >= 100:
        digits = len(str(int(number))) - 3
        return f"{round(number, -digits):,.0f}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{short(count / unit)} {name}"
    return f"{count:,.0f} bytes"


def measured() -> str:
    """The measurements."""
    words = (m.what for m in MEASUREMENTS.values())
    rows = [[what, f"{m.value:,.6g}", m.unit, m.command] for what, m in zip(words, MEASUREMENTS.values(), strict=True)]
    return table(["what", "measured", "unit", "by"], rows).replace("---: | ---: | ---:", "---: | --- | ---", 1)


def storage(args: Namespace) -> str:
    """Bytes and files of each table."""
    train = TRAIN * args.photos
    tables = {
        "photos": (args.photos, cost("photo_b")),
        "grafts": (train, cost("graft_b")),
        "alignment": (train, cost("label_b")),
    }
    rows = []
    for name, (count, each) in tables.items():
        month = count * each / 1e9 * args.usd_gb_month
        files = count / SHARD_ROWS[name]
        a_city = files / args.cities
        rows.append([name, short(count), size(count * each), short(files), short(a_city), f"{month:,.0f}"])
    total = sum(count * each for count, each in tables.values())
    rows.append(["together", "", size(total), "", "", f"{total / 1e9 * args.usd_gb_month:,.0f}"])
    twice = args.photos / args.cities * cost("photo_b")
    rows.append(["while prepare runs, a city more", "", size(twice), "", "", ""])
    return table(["table", "rows", "size", "files", "files a city", "$ a month"], rows)


def work(args: Namespace) -> str:
    """CPU time of each step, and how long it takes on the CPU nodes."""
    train, cores = TRAIN * args.photos, args.cpu_nodes * args.cores
    steps = [
        ("prepare, driver", args.photos, "metadata_us", args.cities),
        ("prepare, workers: photos checked", args.photos, "check_us", cores),
        ("prepare, workers: conversations", args.photos, "question_us", cores),
        ("graft", train, "graft_us", cores),
        ("label, asking", train, "ask_us", args.cities),
    ]
    rows = []
    for name, count, each, side_by_side in steps:
        hours = count * cost(each) / 1e6 / 3600
        rows.append(
            [name, short(hours), short(side_by_side), short(hours / side_by_side), f"{hours * args.core_usd_hour:,.0f}"]
        )
    return table(["step", "core hours", "at a time", "hours", "$"], rows)


def labels(args: Namespace) -> str:
    """Tokens, money and time of the labels, by who writes them."""
    train = TRAIN * args.photos
    low = cost("in") - TILE
    kinds = [("template", 0.0, 0.0), ("endpoint, image in high detail", cost("in"), cost("out")),
             ("endpoint, image in low detail", low, cost("out")),
             ("endpoint, facts without an image", cost("text") - 120, 120.0)]  # fmt: skip
    rows = []
    for name, sent, written in kinds:
        money = train * (sent * args.usd_in + written * args.usd_out) / 1e6
        days = train / args.requests_per_minute / 1440 if sent else 0
        rows.append([name, short(sent), short(written), short(train * (sent + written) / 1e9), f"{money:,.0f}", short(days)])
    return table(["labels by", "tokens in", "out", "10⁹ tokens", "$", "days at the limit"], rows)


def training(args: Namespace) -> str:
    """GPU hours of one epoch of each stage."""
    train, rate = TRAIN * args.photos, args.peak_tflops * args.mfu * 3600  # TFLOP an hour
    rows = []
    for name, each, count in (
        ("stage 1, alignment", cost("stage_1_tflop"), train),
        ("stage 2, localization", cost("stage_2_tflop"), train),
        ("scoring all test photos", scoring_tflop(args), 0.1 * args.photos),
    ):
        hours = count * each / rate
        rows.append([name, short(count), short(each), short(hours), f"{hours * args.gpu_usd_hour:,.0f}",
                     short(hours / args.gpus / 24)])  # fmt: skip
    return table(["work", "rows", "TFLOP a row", "GPU hours", "$", f"days on {args.gpus} GPUs"], rows)


def service(args: Namespace) -> str:
    """GPUs and cores for so many photos a second."""
    bound = args.peak_tflops * args.mfu / scoring_tflop(args)
    replicas = args.requests / (bound * args.busy)
    cores = args.requests * cost("front_us") / 1e6 / args.busy
    rows = [
        ["photos a second of a GPU at most", short(bound)],
        [f"model replicas (a GPU each) for {args.requests:,} a second, {args.busy:.0%} busy", f"{replicas:,.0f}"],
        ["cores for routes and decoding", f"{cores:,.0f}"],
        ["GB of weights on each of these GPUs", f"{cost('weights_b'):.3g}"],
        ["adapters held by a replica (`cities_per_replica`), of all cities", f"8 of {args.cities}"],
    ]
    return table(["", "count"], rows)


def breaks(args: Namespace) -> str:
    """The limit of each part, the first to be reached on top."""
    city = args.photos / args.cities
    memory = cost("driver_mib") * 2**20 + city * cost("metadata_b")
    head = args.head_gib * 2**30
    most = (0.75 * head - cost("driver_mib") * 2**20) / cost("metadata_b")
    files = TRAIN * city / SHARD_ROWS["grafts"]
    asks, tree = 1e6 / cost("ask_us"), args.addresses * args.address_tokens
    rows = [
        ["money for labels with images", "see above", "templates, facts without images, or a model of one's own"],
        ["requests an endpoint takes", f"{asks * 60:,.0f} a minute of one job at most", "a job a city, each its share"],
        ["memory of prepare's driver", f"{size(memory)} for a city of {short(city)}; {short(most)} photos in "
         f"{0.75 * args.head_gib:g} GiB", "a city in parts, each a run; `train.cities` learns from all"],
        ["files of a city", f"{short(2 * files)} in grafts and its marks", "larger shards: SHARD_ROWS in ray_jobs/graft.py"],
        ["addresses of one model", f"{tree:,.0f} tokens a photo beside its own {PHOTO_TOKENS}",
         "an adapter a city, never one model of all"],
    ]  # fmt: skip
    return table(["what", "how far it goes", "then"], rows).replace("---: | ---:", "--- | ---", 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, words in (
        ("--cities", 100, "how many"),
        ("--photos", 2e8, "of all cities together"),
        ("--usd-in", 0.15, "a million tokens sent"),
        ("--usd-out", 0.60, "a million tokens written"),
        ("--requests-per-minute", 30_000, "limit of the endpoint"),
        ("--usd-gb-month", 0.023, "a gigabyte stored"),
        ("--cpu-nodes", 8, "as in cluster.yaml"),
        ("--cores", 16, "of a CPU node"),
        ("--core-usd-hour", 0.0425, "a core for an hour"),
        ("--gpus", 16, "as in cluster.yaml: 4 nodes of 4"),
        ("--peak-tflops", 989, "of a GPU in bfloat16, dense"),
        ("--mfu", 0.4, "share of the peak that is reached"),
        ("--gpu-usd-hour", 3.0, "a GPU for an hour"),
        ("--head-gib", 16, "memory of the head, where drivers run"),
        ("--requests", 1000, "photos a second that the service is asked for"),
        ("--addresses", 2000, "of a city, all of which are scored"),
        ("--address-tokens", 4, "that an address has for itself, as it shares its beginning with others"),
        ("--busy", 0.6, "share of the time that a replica may work"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=f"{words} (default: {default:,g})")
    args = parser.parse_args()
    parts = {
        "Measured": measured(),
        "Storage": storage(args),
        "CPU work": work(args),
        "Labels": labels(args),
        "Training and scoring": training(args),
        f"Service, {args.requests:,} photos a second": service(args),
        "What breaks first": breaks(args),
    }
    print("\n\n".join(f"### {name}\n\n{text}" for name, text in parts.items()))


if __name__ == "__main__":
    main()
