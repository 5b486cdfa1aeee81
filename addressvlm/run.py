"""Where a run keeps its things, and what of it is already done.

A step writes into a folder of its own and leaves `_done.json` there last, with the settings it used. A second run with
the same settings skips the step; with other settings it stops and says which, so that nothing is mixed or lost.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addressvlm.config import Config
from addressvlm.errors import InputError

DONE = "_done.json"
LAST_MODEL = "last-model"


def slug(name: str) -> str:
    """A system's name as a folder name: `stage 2 only, equal steps` -> `stage-2-only-equal-steps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def storage(configured: str) -> Path:
    """The folder of all runs, absolute.

    A relative one is taken from the working directory; inside the copy that `ray job submit --working-dir` unpacks
    (which Ray deletes later) it is taken from `~/addressvlm` instead.
    """
    path = Path(configured).expanduser()
    if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
        path = Path.home() / "addressvlm" / path
    return Path(os.path.abspath(path))


class Run:
    """Paths of one run, all below `<storage>/<name>`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = storage(config.storage) / config.name
        self.input = self.folder / "input"  # a generated toy city
        self.photos = self.folder / "photos"  # also gazetteer.geojson, card.json
        self.gazetteer = self.photos / "gazetteer.geojson"
        self.rejects = self.folder / "rejects"  # one Parquet file a step
        self.grafts = self.folder / "grafts"
        self.alignment = self.folder / "alignment"
        self.training = self.folder / "training"  # checkpoints and loss curves, one folder a system
        self.models = self.folder / "models"  # <slug>/adapter and <slug>/merged
        self.answers = self.folder / "answers"  # one table a system
        self.metrics = self.folder / "metrics.json"
        self.report = self.folder / "report.html"

    def model(self, system: str) -> Path:
        """The folder of a trained system (holds `adapter` and `merged`)."""
        return self.models / slug(system)


def is_done(folder: Path, settings: dict[str, Any], redo: bool = False) -> bool:
    """Whether a step finished with these settings.

    Raises:
        InputError: it finished with other settings; names the first that differ.
    """
    mark = Path(folder) / DONE
    if not mark.is_file() or redo:
        return False
    before = json.loads(mark.read_text())
    now = json.loads(json.dumps(settings))
    if before == now:
        return True
    changed = sorted(_differences(before, now))
    shown = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
    raise InputError(f"{folder} was made with other settings ({shown}): give the run another name, or add --redo.")


def _differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    elif before != now:
        yield f"{at}: {before} -> {now}"


def mark_done(folder: Path, settings: dict[str, Any]) -> None:
    """Leave the mark that `is_done` looks for."""
    (Path(folder) / DONE).write_text(json.dumps(settings, indent=1))


def claim(folder: Path, settings: dict[str, Any], redo: bool = False) -> None:
    """Begin or go on with something in `folder` that grows over several runs, such as a training.

    Raises:
        InputError: it was begun with other settings, or the folder can't be written.
    """
    if redo:
        shutil.rmtree(folder, ignore_errors=True)
    if not is_done(folder, settings):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            mark_done(folder, settings)
        except OSError as error:
            raise _storage_error(error, Path(folder)) from error


@contextmanager
def writing(folder: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Give a clean temporary folder; put it in place, marked done, when the block ends without an error.

    Raises:
        InputError: the place can't be written, or the disk is full.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        mark_done(partial, settings)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise _storage_error(error, folder) from error


def _storage_error(error: OSError, folder: Path) -> Exception:
    if error.errno in (1, 2, 13, 17, 20, 30):  # EPERM, ENOENT, EACCES, EEXIST, ENOTDIR, EROFS
        return InputError(f"{folder} can't be written ({error.strerror}): set `storage` to a folder you may write.")
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return InputError(f"the disk of {folder} is full: free room or set `storage` elsewhere, then run again to go on.")
    return error
