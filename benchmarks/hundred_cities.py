"""Write many small toy cities and the file `world.yaml` that names them, to see what a city costs beyond its work.

python benchmarks/hundred_cities.py /tmp/hundred                          # one of them without usable photos
time python ray_jobs/train.py --config /tmp/hundred/world.yaml --evaluate
python ray_jobs/train.py --config /tmp/hundred/world.yaml --status
"""

import argparse
import csv
from pathlib import Path

import yaml

from addressvlm.demo import city

SETTINGS = {
    "extends": "demo",
    "name": "hundred",
    "city": {
        "max_reject_share": 0.5,
        "split_buffer_m": 5,
        "split_block_m": 60,
        "split": {"train": 0.6, "val": 0.2, "test": 0.2},
    },
    "train": {
        "workers": 1,
        "stages": {
            "alignment": {"data": "alignment", "batch_size": 4, "max_steps": 3},
            "localization": {"data": "photos", "batch_size": 4, "max_steps": 3},
        },
        "systems": [{"name": "AddressVLM", "stages": ["alignment", "localization"]}],
    },
    "evaluate": {"workers": 1, "max_photos": 4, "calibration_photos": 4, "bootstrap": 100},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cities", type=int, default=100)
    parser.add_argument("--spacing", type=float, default=60.0, help="metres between places")
    parser.add_argument("--views", type=int, default=1, help="photos of a place")
    parser.add_argument("--broken", type=int, default=1, help="number of the city whose photos are not there; 0: none")
    args = parser.parse_args()
    city.SPACING, city.VIEWS = args.spacing, args.views
    rows, total = [], 0
    for number in range(1, args.cities + 1):
        name = f"toy-{number:03}"
        city.TOY_CITIES[name] = 5000 + number
        files = city.write_city(name, args.folder / name)
        with open(files["manifest"], encoding="utf-8") as manifest:
            total += sum(1 for _ in csv.DictReader(manifest))
        if number == args.broken:
            files["photos"] = str(args.folder / name / "lost")
            Path(files["photos"]).mkdir(exist_ok=True)
        rows.append({"name": name, **files})
        print(f"{number}/{args.cities}: {total:,} photos", end="\r", flush=True)
    with (args.folder / "cities.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    tree = {**SETTINGS, "storage": str(args.folder / "runs"), "world": {"cities": str(args.folder / "cities.csv")}}
    (args.folder / "world.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    print(f"\n{args.folder / 'world.yaml'}")


if __name__ == "__main__":
    main()
