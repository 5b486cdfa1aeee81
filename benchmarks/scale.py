#!/usr/bin/env python
"""What a hundred cities would take: the measured cost of a photo at every step, times as many photos, as Markdown tables.

    python benchmarks/scale.py
    python benchmarks/scale.py --photos 5e6 --cities 3 --usd-in 0.4 --usd-out 1.6 --peak-tflops 362 --gpu-usd-hour 1.9

`MEASURED` holds what was measured and the command that gave it; the flags are what nobody can measure here: prices, GPUs,
limits. The output stands in docs/scale.md.
"""

import argparse
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TRAIN = 0.7  # share of the photos, the default of city.split


@dataclass(frozen=True)
class Measured:
    """One figure and where it is from."""

    value: float
    unit: str
    what: str
    command: str


PITTSBURGH = "benchmarks/metadata.py <streets> <districts of Pittsburgh> --rows 10000000"
CAMBRIDGE = "files of a run on central Cambridge, 604 photos, 388 grafts of 320 px"
MEASURED = {
    "photo_b": Measured(64_236, "bytes a photo", "table photos", CAMBRIDGE),
    "graft_b": Measured(20_426, "bytes a training photo", "table grafts", CAMBRIDGE),
    "label_b": Measured(20_458, "bytes a training photo", "table alignment", CAMBRIDGE),
    "answer_b": Measured(113, "bytes a question", "table answers", CAMBRIDGE),
    "metadata_us": Measured(49.5, "us CPU a photo", "prepare, driver: table, addresses, list, split, gazetteer", PITTSBURGH),
    "metadata_b": Measured(816, "bytes a photo", "prepare, driver: memory", f"{PITTSBURGH}, less the next"),
    "driver_mib": Measured(393, "MiB", "prepare, driver: memory without photos", "the same, with --photos, and the streets"),
    "check_us": Measured(2_624, "us CPU a photo", "prepare, workers: photos of 640 x 640 read and checked",
                         "benchmarks/metadata.py --photos <Cambridge> --sample 100"),
    "question_us": Measured(750, "us CPU a photo", "prepare, workers: conversations", PITTSBURGH),
    "graft_us": Measured(12_690, "us CPU a training photo", "graft, Ray included", "benchmarks/graft_job.py --photos 20000"),
    "ask_us": Measured(2_900, "us CPU a row", "label, asking an endpoint", "benchmarks/labelling.py"),
    "in": Measured(8_744, "tokens a row", "label, sent with an image in high detail, by gpt-4o-mini's rule",
                   "ray_jobs/label.py --config demo --set labels.labeler=openai --dry-run"),
    "out": Measured(256, "tokens a row", "label, written at most", "the same"),
    "text": Measured(789, "tokens a row", "label, facts without an image, 2.1 asks a row", "docs/labels.md, 388 labels"),
    "stage_1_tflop": Measured(14.143, "TFLOP a row", "train, alignment, both passes, 815 tokens",
                              "ray_jobs/train.py --config paper-both --dry-run --photos 1000000, its base's shape"),
    "stage_2_tflop": Measured(17.135, "TFLOP a row", "train, localization, both passes, 996 tokens", "the same"),
    "weights_b": Measured(8.27, "GB", "merged model in bfloat16, 4.137e9 parameters", "the same"),
    "front_us": Measured(15_000, "us CPU a request", "service: routes and decoding",
                         "benchmarks/service.py on the toy model: the best round less that of the bare engine"),
}  # fmt: skip
SHARD_ROWS = {"photos": 2048, "grafts": 256, "alignment": 2048}  # ray_jobs/{prepare,graft,label}.py
TILE = 5667  # tokens of the one tile that such a picture has in high detail, by the same rule
PHOTO_TOKENS = 600  # of a photo and the question
WEIGHTS = 4.137e9  # parameters that a token goes through; two operations each


def of(name: str) -> float:
    """A measured value."""
    return MEASURED[name].value


def look_tflop(given: Namespace) -> float:
    """Operations of one photo's scores: the photo and the question, then every address of its city, what they share once."""
    return 2 * WEIGHTS * (PHOTO_TOKENS + given.addresses * given.address_tokens) / 1e12


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its first column words and all others numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def short(number: float) -> str:
    """Three digits that count, thousands with commas."""
    if number >= 100:
        digits = len(str(int(number))) - 3
        return f"{round(number, -digits):,.0f}"
    return f"{number:.3g}"


def size(count: float) -> str:
    """Bytes as people say them."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{short(count / unit)} {name}"
    return f"{count:,.0f} bytes"


def measured() -> str:
    """What everything else is computed from."""
    words = (m.what for m in MEASURED.values())
    rows = [[what, f"{m.value:,.6g}", m.unit, m.command] for what, m in zip(words, MEASURED.values(), strict=True)]
    return table(["what", "measured", "unit", "by"], rows).replace("---: | ---: | ---:", "---: | --- | ---", 1)


def storage(given: Namespace) -> str:
    """Bytes and files of each table."""
    train = TRAIN * given.photos
    tables = {
        "photos": (given.photos, of("photo_b")),
        "grafts": (train, of("graft_b")),
        "alignment": (train, of("label_b")),
    }
    rows = []
    for name, (count, each) in tables.items():
        month = count * each / 1e9 * given.usd_gb_month
        files = count / SHARD_ROWS[name]
        a_city = files / given.cities
        rows.append([name, short(count), size(count * each), short(files), short(a_city), f"{month:,.0f}"])
    total = sum(count * each for count, each in tables.values())
    rows.append(["together", "", size(total), "", "", f"{total / 1e9 * given.usd_gb_month:,.0f}"])
    twice = given.photos / given.cities * of("photo_b")
    rows.append(["while prepare runs, a city more", "", size(twice), "", "", ""])
    return table(["table", "rows", "size", "files", "files a city", "$ a month"], rows)


def work(given: Namespace) -> str:
    """CPU time of each step, and how long it takes on the CPU nodes."""
    train, cores = TRAIN * given.photos, given.cpu_nodes * given.cores
    steps = [
        ("prepare, driver", given.photos, "metadata_us", given.cities),
        ("prepare, workers: photos checked", given.photos, "check_us", cores),
        ("prepare, workers: conversations", given.photos, "question_us", cores),
        ("graft", train, "graft_us", cores),
        ("label, asking", train, "ask_us", given.cities),
    ]
    rows = []
    for name, count, each, side_by_side in steps:
        hours = count * of(each) / 1e6 / 3600
        rows.append(
            [name, short(hours), short(side_by_side), short(hours / side_by_side), f"{hours * given.core_usd_hour:,.0f}"]
        )
    return table(["step", "core hours", "at a time", "hours", "$"], rows)


def labels(given: Namespace) -> str:
    """Tokens, money and time of the labels, by who writes them."""
    train = TRAIN * given.photos
    low = of("in") - TILE
    kinds = [("template", 0.0, 0.0), ("endpoint, image in high detail", of("in"), of("out")),
             ("endpoint, image in low detail", low, of("out")),
             ("endpoint, facts without an image", of("text") - 120, 120.0)]  # fmt: skip
    rows = []
    for name, sent, written in kinds:
        money = train * (sent * given.usd_in + written * given.usd_out) / 1e6
        days = train / given.requests_per_minute / 1440 if sent else 0
        rows.append([name, short(sent), short(written), short(train * (sent + written) / 1e9), f"{money:,.0f}", short(days)])
    return table(["labels by", "tokens in", "out", "10⁹ tokens", "$", "days at the limit"], rows)


def training(given: Namespace) -> str:
    """GPU hours of one epoch of each stage."""
    train, rate = TRAIN * given.photos, given.peak_tflops * given.mfu * 3600  # TFLOP an hour
    rows = []
    for name, each, count in (
        ("stage 1, alignment", of("stage_1_tflop"), train),
        ("stage 2, localization", of("stage_2_tflop"), train),
        ("scoring all test photos", look_tflop(given), 0.1 * given.photos),
    ):
        hours = count * each / rate
        rows.append([name, short(count), short(each), short(hours), f"{hours * given.gpu_usd_hour:,.0f}",
                     short(hours / given.gpus / 24)])  # fmt: skip
    return table(["work", "rows", "TFLOP a row", "GPU hours", "$", f"days on {given.gpus} GPUs"], rows)


def service(given: Namespace) -> str:
    """Replicas for so many photos a second."""
    bound = given.peak_tflops * given.mfu / look_tflop(given)
    replicas = given.requests / (bound * given.busy)
    cores = given.requests * of("front_us") / 1e6 / given.busy
    rows = [
        ["photos a second of a GPU at most", short(bound)],
        [f"model replicas (a GPU each) for {given.requests:,} a second, {given.busy:.0%} busy", f"{replicas:,.0f}"],
        ["cores for routes and decoding", f"{cores:,.0f}"],
        ["GB of weights on each of these GPUs", f"{of('weights_b'):.3g}"],
        ["adapters held by a replica (`cities_per_replica`), of all cities", f"8 of {given.cities}"],
    ]
    return table(["", "count"], rows)


def breaks(given: Namespace) -> str:
    """Where each part ends, nearest first."""
    city = given.photos / given.cities
    memory = of("driver_mib") * 2**20 + city * of("metadata_b")
    head = given.head_gib * 2**30
    most = (0.75 * head - of("driver_mib") * 2**20) / of("metadata_b")
    files = TRAIN * city / SHARD_ROWS["grafts"]
    asks, tree = 1e6 / of("ask_us"), given.addresses * given.address_tokens
    rows = [
        ["money for labels with images", "see above", "templates, facts without images, or a model of one's own"],
        ["requests an endpoint takes", f"{asks * 60:,.0f} a minute of one job at most", "a job a city, each its share"],
        ["memory of prepare's driver", f"{size(memory)} for a city of {short(city)}; {short(most)} photos in "
         f"{0.75 * given.head_gib:g} GiB", "a city in parts, each a run; `train.cities` learns from all"],
        ["files of a city", f"{short(2 * files)} in grafts and its marks", "larger shards: SHARD in ray_jobs/graft.py"],
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
    given = parser.parse_args()
    parts = {
        "Measured": measured(),
        "Storage": storage(given),
        "CPU work": work(given),
        "Labels": labels(given),
        "Training and scoring": training(given),
        f"Service, {given.requests:,} photos a second": service(given),
        "What breaks first": breaks(given),
    }
    print("\n\n".join(f"### {name}\n\n{text}" for name, text in parts.items()))


if __name__ == "__main__":
    main()
