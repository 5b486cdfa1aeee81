"""How fast rows are made ready for training, how long a step waits for them, and how often row groups are read.

    python benchmarks/loading.py                    # 640 x 480 photos, seven questions, 336 px
    python benchmarks/loading.py --photo 2048 1536

Printed are rows encoded a second and core (CPU time of this process), rows a second by 1 and 2 processes (the clock), the share
of a step that waits when it does nothing but sleep, and, of 64 workers simulated in this one, row groups read a row used.
"""

import argparse
import io
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import SIDE, processor_of_full_size
from PIL import Image, ImageFilter

from addressvlm.config.train import StageConfig
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.questions import training_rounds
from addressvlm.storage import table_index, tables
from addressvlm.storage.files import open_parquet
from addressvlm.training import dataset
from addressvlm.training.collator import Collator, sample_from_row
from addressvlm.training.dataset import Schedule, TableRows
from addressvlm.training.loader import StepLoader
from addressvlm.training.pixels import decoded_size
from addressvlm.training.stages import Stage

ROWS, PER_STEP = 96, 16
NAMES = ("Forbes", "Mill", "Oak", "Harbour", "Lake", "Murray", "Penn")
CITY = Gazetteer([Address(f"{name} {kind}", district) for name in NAMES for kind in ("Avenue", "Street", "Lane")
                  for district in ("Oakland", "Shadyside", "Hill")])  # fmt: skip


def photo(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of soft patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize(size).filter(ImageFilter.GaussianBlur(1)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_rows(folder: Path, size: tuple[int, int]) -> None:
    """A table of `ROWS` photos with seven questions each."""
    rng = random.Random(0)
    rows = [
        {
            "id": str(n), "image": {"bytes": photo(n, size), "path": None},
            "rounds": training_rounds(CITY.addresses[n % len(CITY.addresses)], CITY, rng, 7),
        }
        for n in range(ROWS)
    ]  # fmt: skip
    schema = tables.with_features(tables.pa.schema([tables.PHOTOS.field(c) for c in ("id", "image", "rounds")]))
    tables.write_table(folder, "train", rows, schema)
    table_index.write_indexes(folder)


def stage_of(folder: Path, processor: Any, steps: int) -> Stage:
    schedule = Schedule(TableRows(folder, "train", ("id", "image", "rounds")), PER_STEP, 0)
    settings = StageConfig(data="photos", batch_size=PER_STEP, isolate_questions=True)
    schedule.decoded_size = decoded_size(processor.image_processor, settings.augment)
    return Stage("loading", settings, schedule, steps, 0)


def encoded_per_core(folder: Path, processor: Any) -> float:
    """Rows a second of CPU time of one thread."""
    collator, table = (
        Collator(processor, isolate_questions=True, use_bytes=True),
        TableRows(folder, "train", ("image", "rounds")),
    )
    size = decoded_size(processor.image_processor, StageConfig(data="photos").augment)
    rows = [table[n] for n in range(ROWS)]
    best = 0.0
    for _ in range(4):
        began = time.process_time()
        for row in rows:
            collator.encode(sample_from_row(row, size))
        best = max(best, ROWS / (time.process_time() - began))
    return best


def by_processes(folder: Path, processor: Any, processes: int, sleep_s: float) -> tuple[float, float]:
    """Rows a second, and the share of the time waited, of steps that only sleep; the first two steps are not counted."""
    collator = Collator(processor, isolate_questions=True, use_bytes=True)
    shares, waited, began = iter(StepLoader(stage_of(folder, processor, 26), collator, 0, 0, 1, processes)), 0.0, 0.0
    for step in range(26):
        asked = time.perf_counter()
        if step == 2:
            began, waited = asked, 0.0
        next(shares)
        waited += time.perf_counter() - asked
        time.sleep(sleep_s)
    seconds = time.perf_counter() - began
    return 24 * PER_STEP / seconds, waited / seconds


def dealt(workers: int = 64, groups: int = 2779) -> tuple[float, int]:
    """Row groups read a row group of the table in one epoch, and files opened at the start, by simulated workers."""
    opened = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema = tables.pa.schema([("id", tables.pa.string())])
        tables.write_table(folder, "train", ({"id": "x"} for _ in range(groups * 2)), schema, rows_per_file=2)
        table_index.write_indexes(folder)
        dataset.open_parquet = lambda file: opened.append(file) or open_parquet(file)  # type: ignore[func-returns-value]
        at_start = len(TableRows(folder, "train", ("id",)).files) and len(opened)
        dataset.open_parquet = open_parquet

    class Counted(TableRows):
        def __init__(self) -> None:
            self.starts, self.group_count = np.arange(0, groups * 64 + 1, 64), groups

    schedule, read = Schedule(Counted(), 16 * workers, 0), np.zeros((groups, workers), dtype=bool)
    for step in range(groups * 64 // (16 * workers)):
        for worker in range(workers):
            read[np.array(schedule.indices(step, worker, workers)) // 64, worker] = True
    return read.sum() / groups, at_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=int, nargs=2, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    reads, opened = dealt()
    print(f"64 workers, 2,779 row groups: {reads:.3f} read a row group of the table; {opened} files opened at the start")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = processor_of_full_size(folder / "processor")
        write_rows(folder / "table", tuple(args.photo))
        rate = encoded_per_core(folder / "table", processor)
        print(
            f"{args.photo[0]} x {args.photo[1]} photos to {SIDE} px, seven questions: {rate:.0f} rows a second and core",
            flush=True,
        )
        for processes in args.processes:
            plain = by_processes(folder / "table", processor, processes, 0.0)[0]
            slow, quick = (by_processes(folder / "table", processor, processes, s)[1] for s in (0.043, 0.0055))
            print(
                f"{processes} processes: {plain:.0f} rows a second; of steps of {PER_STEP} rows that sleep 43 ms "
                f"{100 * slow:.0f} % is waited, 5.5 ms {100 * quick:.0f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
