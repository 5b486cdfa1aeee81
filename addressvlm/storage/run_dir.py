"""Folders of a run, and which steps of it are finished.

Each step writes to a folder `<step>.partial` and renames it to `<step>` at the end, with the settings it used in
`_done.json`. A second run with the same settings skips the step; with other settings it stops and names the difference.
A step that works shard by shard (addressvlm/storage/shards.py) resumes from its partial folder.

Object stores have no rename: there a step writes to its final folder, after a marker `_work/begun.json`. A folder with this
marker and without `_done.json` is unfinished, and readers refuse it.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addressvlm.config import Config
from addressvlm.errors import InputError
from addressvlm.storage.files import atomic_write, remove_tree
from addressvlm.storage.remote_path import AnyPath, RemotePath, is_remote, path_of
from addressvlm.storage.table_index import write_indexes

DONE_FILE = "_done.json"
WORK_DIR = "_work"  # in a partial folder: files that the finished step does not need
BEGUN_FILE = f"{WORK_DIR}/begun.json"  # settings of the unfinished step
LAST_MODEL_FILE = "last-model"  # in the storage folder: path of the model trained last


def slug(name: str) -> str:
    """A system's name as a folder name: `stage 2 only, equal steps` -> `stage-2-only-equal-steps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse_model_flag(flag: str) -> tuple[str, str]:
    """Name and folder of a flag `name=folder` or `folder`; the default name is the folder's (`x/merged` is called x)."""
    name, equals, folder = flag.partition("=")
    path = path_of(flag)
    if equals and (is_remote(folder) or not path.is_dir()):
        return name, folder
    return (path.parent.name if path.name == "merged" else path.name), flag


def storage_dir(configured: str) -> AnyPath:
    """The folder of all runs: a URI, or an absolute path.

    A relative path starts at the working directory, but at `~/addressvlm` in a job submitted with `ray job submit
    --working-dir`, whose working directory Ray deletes later.
    """
    path = path_of(configured)
    if isinstance(path, RemotePath):
        return path
    if not path.is_absolute() and "working_dir_files" in Path.cwd().parts:
        path = Path.home() / "addressvlm" / path
    return Path(os.path.abspath(path))


class Run:
    """Paths of one run, all below `<storage>/<name>`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = storage_dir(config.storage) / config.name
        self.input = self.folder / "input"  # a generated toy city
        self.photos = self.folder / "photos"  # also gazetteer.geojson, roads.fgb, card.json
        self.gazetteer = self.photos / "gazetteer.geojson"
        self.roads = self.photos / "roads.fgb"  # streets that tiles are drawn from, if the city has a street map
        self.rejects = self.folder / "rejects"  # one Parquet file per step
        self.grafts = self.folder / "grafts"
        self.grafted_photos = self.folder / "grafted_photos"  # grafts of other splits, to evaluate on, one folder per split
        self.response_cache = self.folder / "response_cache"  # requests for labels and their answers
        self.alignment = self.folder / "alignment"
        self.reasoning = self.folder / "reasoning"
        self.map = self.folder / "map"  # tiles of points along all streets, with questions
        self.matching = self.folder / "matching"  # training photos on tiles off their centre
        self.locatability = self.folder / "locatability"  # locatability score of each training photo
        self.training = self.folder / "training"  # checkpoints and loss curves, one folder per system
        self.models = self.folder / "models"  # <slug>/adapter and <slug>/merged
        self.answers = self.folder / "answers"  # one table per system
        self.metrics = self.folder / "metrics.json"
        self.report = self.folder / "report.html"

    def model_dir(self, system: str) -> AnyPath:
        """The folder of a trained system (holds `adapter` and `merged`)."""
        return self.models / slug(system)

    def training_dir(self, system: str) -> AnyPath:
        """The folder of a system's checkpoints and loss curve."""
        return self.training / slug(system)


def is_done(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> bool:
    """Whether a step finished with these settings; removes its leftover work files.

    Raises:
        InputError: it finished with other settings; the message names the first that differ.
    """
    marker = folder / DONE_FILE
    if not marker.is_file() or redo:
        return False
    before = json.loads(marker.read_text())
    now = json.loads(json.dumps(settings))
    if before == now:
        remove_tree(folder / WORK_DIR)
        return True
    changes = sorted(_differences(before, now))
    first = ", ".join(changes[:3]) + (", …" if len(changes) > 3 else "")
    raise InputError(f"{folder} was made with other settings ({first}): give the run another name, or add --redo.")


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {before} -> {now}"


def mark_done(folder: AnyPath, settings: dict[str, Any]) -> None:
    """Write the marker that `is_done` reads."""
    _write_text(folder / DONE_FILE, json.dumps(settings, indent=1))


def is_unfinished(folder: AnyPath) -> bool:
    """Whether this remote folder belongs to a step that is running or was killed."""
    return isinstance(folder, RemotePath) and (folder / BEGUN_FILE).is_file() and not (folder / DONE_FILE).is_file()


def begin_or_resume(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> None:
    """Create the folder of work that is resumed in place, such as a training run, or check that its settings match.

    Raises:
        InputError: it began with other settings, or the folder can't be written.
    """
    with storage_errors(folder):
        if redo:
            _remove(folder, DONE_FILE)
        if not is_done(folder, settings):
            folder.mkdir(parents=True, exist_ok=True)
            mark_done(folder, settings)


@contextmanager
def fresh_dir(folder: AnyPath, settings: dict[str, Any]) -> Iterator[AnyPath]:
    """An empty temporary folder to write; it becomes `folder`, marked done, when the block ends without an error.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    partial = _partial(folder)
    with storage_errors(folder):
        _clear(partial)
        yield partial
        _publish(partial, folder, settings)


@contextmanager
def resumable_dir(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> Iterator[AnyPath]:
    """Like `fresh_dir`, but the temporary folder keeps the files of an interrupted attempt with the same settings.

    With `redo` only those of an attempt that had `redo` too.

    Raises:
        InputError: the folder can't be written, or the disk is full.
    """
    partial = _partial(folder)
    now = json.loads(json.dumps({"settings": settings, "redo": redo}))
    with storage_errors(folder):
        try:
            before = json.loads((partial / BEGUN_FILE).read_text())
        except (OSError, ValueError):
            before = {}
        if before.get("settings") != now["settings"] or (redo and not before["redo"]):
            _clear(partial)
            _write_text(partial / BEGUN_FILE, json.dumps(now))
        yield partial
        _publish(partial, folder, settings)


def _partial(folder: AnyPath) -> AnyPath:
    return folder if isinstance(folder, RemotePath) else folder.with_name(folder.name + ".partial")


def _clear(partial: AnyPath) -> None:
    if isinstance(partial, Path):
        _remove(partial, BEGUN_FILE)
        (partial / WORK_DIR).mkdir(parents=True)
        return
    _write_text(partial / BEGUN_FILE, "{}")
    (partial / DONE_FILE).unlink(missing_ok=True)
    for old, _ in partial.walk_files():
        if old != partial / BEGUN_FILE:
            old.unlink(missing_ok=True)


def _remove(folder: AnyPath, marker: str) -> None:
    """Remove a folder, its marker first, so that a half-removed folder is never taken for a complete one."""
    (folder / marker).unlink(missing_ok=True)
    remove_tree(folder)


def _publish(partial: AnyPath, folder: AnyPath, settings: dict[str, Any]) -> None:
    write_indexes(partial)
    mark_done(partial, settings)
    if isinstance(partial, Path) and isinstance(folder, Path):
        _remove(folder, DONE_FILE)
        partial.rename(folder)
    remove_tree(folder / WORK_DIR)


def _write_text(path: AnyPath, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)


@contextmanager
def storage_errors(folder: AnyPath) -> Iterator[None]:
    """Raise an OSError of writing to a folder as `storage_error` does."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, folder) from error


def storage_error(error: OSError, folder: AnyPath) -> Exception:
    """An InputError for an error of writing to a folder; other errors are returned unchanged."""
    if error.errno in (1, 2, 13, 17, 20, 30):  # EPERM, ENOENT, EACCES, EEXIST, ENOTDIR, EROFS
        return InputError(f"{folder} can't be written ({error.strerror}): set `storage` to a folder you may write.")
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return InputError(f"the disk of {folder} is full: free space or set `storage` elsewhere, then rerun to resume.")
    return error
