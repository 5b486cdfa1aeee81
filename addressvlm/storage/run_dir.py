"""Where a run keeps its things, and what of it is already done.

A step writes into a folder of its own and leaves `_done.json` there last, with the settings it used. A second run with
the same settings skips the step; with other settings it stops and says which, so that nothing is mixed or lost. Until
then the folder is called `<step>.partial`; a step made of shards (addressvlm/storage/shards.py) goes on with what is in it.

A store has no rename: there a step writes where it will stay, below a mark `_work/begun.json` that is put before anything
else. A folder with that mark and without `_done.json` is unfinished, and nobody reads it.
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

DONE_FILE = "_done.json"
WORK_DIR = "_work"  # in a partial folder: what the finished step does not need
BEGUN_FILE = f"{WORK_DIR}/begun.json"  # what is being made there
LAST_MODEL_FILE = "last-model"


def slug(name: str) -> str:
    """A system's name as a folder name: `stage 2 only, equal steps` -> `stage-2-only-equal-steps`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse_model_flag(flag: str) -> tuple[str, str]:
    """Name and folder of a flag `name=folder` or `folder`; without a name the folder's own (`x/merged` is called x)."""
    name, equals, folder = flag.partition("=")
    path = path_of(flag)
    if equals and (is_remote(folder) or not path.is_dir()):
        return name, folder
    return (path.parent.name if path.name == "merged" else path.name), flag


def storage_dir(configured: str) -> AnyPath:
    """The folder of all runs: a URI, or an absolute path.

    A relative one is taken from the working directory; inside the copy that `ray job submit --working-dir` unpacks
    (which Ray deletes later) it is taken from `~/addressvlm` instead.
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
        self.roads = self.photos / "roads.fgb"  # what tiles are drawn from, if the city has a map
        self.rejects = self.folder / "rejects"  # one Parquet file a step
        self.grafts = self.folder / "grafts"
        self.grafted_photos = (
            self.folder / "grafted_photos"
        )  # photos of other splits on their tiles, to ask about, one folder a split
        self.response_cache = self.folder / "response_cache"  # what was asked for labels and answered
        self.alignment = self.folder / "alignment"
        self.reasoning = self.folder / "reasoning"
        self.locatability = self.folder / "locatability"  # how much each training photo tells of where it is
        self.training = self.folder / "training"  # checkpoints and loss curves, one folder a system
        self.models = self.folder / "models"  # <slug>/adapter and <slug>/merged
        self.answers = self.folder / "answers"  # one table a system
        self.metrics = self.folder / "metrics.json"
        self.report = self.folder / "report.html"

    def model_dir(self, system: str) -> AnyPath:
        """The folder of a trained system (holds `adapter` and `merged`)."""
        return self.models / slug(system)

    def training_dir(self, system: str) -> AnyPath:
        """The folder of a system's checkpoints and loss curve."""
        return self.training / slug(system)


def is_done(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> bool:
    """Whether a step finished with these settings; clears up what it no longer needs.

    Raises:
        InputError: it finished with other settings; names the first that differ.
    """
    mark = folder / DONE_FILE
    if not mark.is_file() or redo:
        return False
    before = json.loads(mark.read_text())
    now = json.loads(json.dumps(settings))
    if before == now:
        remove_tree(folder / WORK_DIR)
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


def mark_done(folder: AnyPath, settings: dict[str, Any]) -> None:
    """Leave the mark that `is_done` looks for."""
    _write_whole(folder / DONE_FILE, json.dumps(settings, indent=1))


def is_unfinished(folder: AnyPath) -> bool:
    """Whether a step writes, or wrote and was killed, into this folder of a store."""
    return isinstance(folder, RemotePath) and (folder / BEGUN_FILE).is_file() and not (folder / DONE_FILE).is_file()


def begin_or_resume(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> None:
    """Begin or go on with something in `folder` that grows over several runs, such as a training.

    Raises:
        InputError: it was begun with other settings, or the folder can't be written.
    """
    try:
        if redo:
            _remove(folder, DONE_FILE)
        if not is_done(folder, settings):
            folder.mkdir(parents=True, exist_ok=True)
            mark_done(folder, settings)
    except OSError as error:
        raise storage_error(error, folder) from error


@contextmanager
def fresh_dir(folder: AnyPath, settings: dict[str, Any]) -> Iterator[AnyPath]:
    """Give a clean temporary folder; put it in place, marked done, when the block ends without an error.

    Raises:
        InputError: the place can't be written, or the disk is full.
    """
    partial = _partial(folder)
    try:
        _begin(partial)
        yield partial
        _publish(partial, folder, settings)
    except OSError as error:
        raise storage_error(error, folder) from error


@contextmanager
def resumable_dir(folder: AnyPath, settings: dict[str, Any], redo: bool = False) -> Iterator[AnyPath]:
    """Like `fresh_dir`, but the temporary folder keeps what an earlier attempt with the same settings left in it.

    With `redo` only an attempt that was to redo the step as well is gone on with.

    Raises:
        InputError: the place can't be written, or the disk is full.
    """
    partial = _partial(folder)
    now = json.loads(json.dumps({"settings": settings, "redo": redo}))
    try:
        if not _goes_on(partial, now):
            _begin(partial)
            _write_whole(partial / BEGUN_FILE, json.dumps(now))
        yield partial
        _publish(partial, folder, settings)
    except OSError as error:
        raise storage_error(error, folder) from error


def _partial(folder: AnyPath) -> AnyPath:
    return folder if isinstance(folder, RemotePath) else folder.with_name(folder.name + ".partial")


def _begin(partial: AnyPath) -> None:
    """Clear the folder in which something is to be made."""
    if isinstance(partial, Path):
        _remove(partial, BEGUN_FILE)
        (partial / WORK_DIR).mkdir(parents=True)
        return
    _write_whole(partial / BEGUN_FILE, "{}")
    (partial / DONE_FILE).unlink(missing_ok=True)
    for old, _ in partial.walk_files():
        if old != partial / BEGUN_FILE:
            old.unlink(missing_ok=True)


def _goes_on(partial: AnyPath, now: dict[str, Any]) -> bool:
    """Whether what was begun there is what is wanted now."""
    try:
        before = json.loads((partial / BEGUN_FILE).read_text())
    except (OSError, ValueError):
        return False
    return bool(before.get("settings") == now["settings"] and (before["redo"] or not now["redo"]))


def _remove(folder: AnyPath, mark: str) -> None:
    """Remove a folder, first the mark by which it would count as something."""
    (folder / mark).unlink(missing_ok=True)
    remove_tree(folder)


def _publish(partial: AnyPath, folder: AnyPath, settings: dict[str, Any]) -> None:
    mark_done(partial, settings)
    if isinstance(partial, Path) and isinstance(folder, Path):
        _remove(folder, DONE_FILE)
        partial.rename(folder)
    remove_tree(folder / WORK_DIR)


def _write_whole(path: AnyPath, text: str) -> None:
    """Write a file that is there whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text)


def storage_error(error: OSError, folder: AnyPath) -> Exception:
    """The sentence for an error of writing to a folder; other errors come back as they are."""
    if error.errno in (1, 2, 13, 17, 20, 30):  # EPERM, ENOENT, EACCES, EEXIST, ENOTDIR, EROFS
        return InputError(f"{folder} can't be written ({error.strerror}): set `storage_dir` to a folder you may write.")
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return InputError(f"the disk of {folder} is full: free room or set `storage_dir` elsewhere, then run again to go on.")
    return error
