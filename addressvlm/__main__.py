"""Name the addresses of photos with a trained model, on this machine and without Ray.

    python -m addressvlm localize photo.jpg --model runs/demo/models/addressvlm/merged
    python -m addressvlm localize my_photos other.jpg --model s3://bucket/model --top-k 5 --format csv --out addresses.csv

Photos that can't be read are named and counted on standard error; the exit status is 1 if none can be read.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TextIO

from addressvlm.dataset.photos import decode_photo
from addressvlm.dataset.readers.base import is_photo
from addressvlm.errors import InputError
from addressvlm.gazetteer.gazetteer import GAZETTEER_FILE
from addressvlm.gazetteer.names import printable
from addressvlm.storage import remote_path
from addressvlm.storage.files import atomic_write
from addressvlm.storage.remote_path import AnyPath, path_of

if TYPE_CHECKING:
    from addressvlm.answers.address_distribution import Localization

BATCH_SIZE = 8  # photos decoded and localized together
MAX_MEGAPIXELS = 100.0  # larger photos are not decoded
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # of a model on the Hub; nothing that could run code

Result = tuple[str, "Localization"]  # a photo's path and its addresses


def localize(photos: Sequence[str], model: str, top_k: int) -> Iterator[Result]:
    """The addresses of photos; a photo that can't be read is named on standard error and left out.

    Args:
        photos: files, folders or URIs of them.
        model: folder, URI or Hub name of a model that has a gazetteer.

    Raises:
        InputError: an argument can't be used, or no photo can be read.
    """
    if top_k < 1:
        raise InputError(f"--top-k is {top_k}: give 1 or more.")
    files = list(dict.fromkeys(file for photo in photos for file in _files(photo)))
    folder = model_folder(model)

    from transformers.utils.logging import disable_progress_bar

    from addressvlm.answers.batch_localize import localize_photos
    from addressvlm.inference import Localizer

    disable_progress_bar()
    localizer = Localizer(folder, memory_mb=0)
    unreadable = 0
    decode = [partial(decode_photo, file, MAX_MEGAPIXELS, localizer.image_size) for file in files]
    for file, result in zip(files, localize_photos(localizer, decode, top_k, BATCH_SIZE), strict=True):
        if isinstance(result, str):
            unreadable += 1
            print(f"rejected, {printable(result)}", file=sys.stderr, flush=True)
        else:
            yield printable(file), result
    if unreadable == len(files):
        raise InputError(f"0 of {len(files):,} photos can be read: give JPEG, PNG or WebP files, or a folder of them.")
    if unreadable:
        print(f"{unreadable:,} of {len(files):,} photos could not be read.", file=sys.stderr, flush=True)


def model_folder(model: str) -> AnyPath:
    """The folder of a model that has a gazetteer; a model of the Hub is downloaded, or taken from the Hub's cache.

    Raises:
        InputError: there is no such model, or it has no gazetteer.
    """
    from addressvlm.models.loading import resolve_model

    folder = path_of(resolve_model(model))
    if not isinstance(folder, remote_path.RemotePath) and not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = path_of(snapshot_download(model, allow_patterns=[GAZETTEER_FILE]))
            if (folder / GAZETTEER_FILE).is_file():
                folder = path_of(snapshot_download(model, allow_patterns=[*MODEL_FILES, GAZETTEER_FILE]))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"model '{model}' can't be downloaded ({reason}): give a folder, or another Hub name.") from None
    if not (folder / GAZETTEER_FILE).is_file():
        raise InputError(f"{model} holds no {GAZETTEER_FILE}: give a model that was trained on a city.")
    return folder


def _files(photo: str) -> list[str]:
    """The photos of a folder, else the file itself."""
    if not path_of(photo).is_dir():
        return [photo]
    files = [remote_path.join(photo, file) for file in remote_path.walk_files(photo) if is_photo(file)]
    if not files:
        raise InputError(f"the folder {photo} has no photos: give a photo, or a folder of JPEG, PNG or WebP files.")
    return files


def write_text(results: Iterator[Result], out: TextIO) -> None:
    """A photo's path, then one line an address: its probability and its name."""
    for number, (photo, result) in enumerate(results):
        doubt = "" if result.known else f"  (not sure: below the model's threshold of {result.threshold:.0%})"
        lines = [f"  {c.probability:6.1%}  {c.street}, {c.district}" for c in result.candidates]
        print(*([""] if number else []), photo + doubt, *lines, sep="\n", file=out, flush=True)


def write_json(results: Iterator[Result], out: TextIO) -> None:
    """A list with an object a photo: `photo`, `known`, `confidence`, `threshold` and `candidates`."""
    rows = [{"photo": photo, **vars(result), "candidates": [*map(vars, result.candidates)]} for photo, result in results]
    print(json.dumps(rows, indent=1, ensure_ascii=False), file=out)


def write_csv(results: Iterator[Result], out: TextIO) -> None:
    """One row an address: `photo`, `rank` from 1, `street`, `district`, `probability`, and the photo's `known`."""
    writer = csv.writer(out, lineterminator="\n")
    for number, (photo, result) in enumerate(results):
        if number == 0:
            writer.writerow(["photo", "rank", "street", "district", "probability", "known"])
        for rank, c in enumerate(result.candidates, start=1):
            writer.writerow([photo, rank, c.street, c.district, c.probability, str(result.known).lower()])


FORMATS = {"text": write_text, "json": write_json, "csv": write_csv}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m addressvlm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("localize", help="name the addresses of photos", description="Name the addresses of photos.")
    command.add_argument("photos", nargs="+", metavar="PHOTO", help="a photo or a folder of photos")
    command.add_argument("--model", required=True, metavar="MODEL", help="a trained model: folder, URI or Hub name")
    command.add_argument("--top-k", type=int, default=3, metavar="N", help="addresses a photo (default: 3)")
    command.add_argument("--format", choices=FORMATS, default="text", help="of the output (default: text)")
    command.add_argument("--out", type=path_of, metavar="FILE", help="write to this file instead of standard output")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    args = parser().parse_args(argv)
    results = localize(args.photos, args.model, args.top_k)
    try:
        if args.out is None:
            FORMATS[args.format](results, sys.stdout)
        else:
            try:
                with atomic_write(args.out) as path, path.open("w", encoding="utf-8", newline="") as out:
                    FORMATS[args.format](results, out)
            except OSError as error:
                raise InputError(f"{args.out} can't be written ({error.strerror}): give another --out.") from None
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
