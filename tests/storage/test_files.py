"""Atomic writes and local copies, on disk and on a remote storage in memory"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from addressvlm import InputError
from addressvlm.storage import files
from addressvlm.storage.files import (
    atomic_replace_dir,
    atomic_write,
    cache_folder,
    digest,
    local_copy,
    local_model_copy,
)
from addressvlm.storage.remote_path import RemotePath

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def numbers(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"n": n, "text": str(n)} for n in range(first, first + count)]


@pytest.mark.parametrize("where", ["disk", "store"])
def test_atomic_write_leaves_the_old_or_the_new_file(where: str, tmp_path: Path, memory_store: RemotePath) -> None:
    target = (tmp_path if where == "disk" else memory_store) / "sub" / "file.txt"
    with suppress(ZeroDivisionError), atomic_write(target) as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert not target.exists()
    for text in ("one", "two", ""):
        with atomic_write(target) as path:
            path.write_text(text)
            assert path.suffix == ".tmp"
        assert target.read_text() == text
    with suppress(ZeroDivisionError), atomic_write(target) as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert target.read_text() == ""
    assert not path.exists()
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_atomic_replace_dir_replaces_only_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "left").write_text("by a job that was killed")
    with atomic_replace_dir(folder) as new:
        (new / "a").write_text("one")
    with suppress(ZeroDivisionError), atomic_replace_dir(folder) as new:
        (new / "a").write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("a", "one")]
    with atomic_replace_dir(folder) as new:
        (new / "b").write_text("two")
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("b", "two")]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("model")) == ["model"]


def test_remote_config_files_are_removed_first_and_uploaded_last(
    memory_store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, events = memory_store / "model", []
    upload, unlink = files.upload, RemotePath.unlink
    monkeypatch.setattr(files, "upload", lambda file, target: (events.append(("put", target.name)), upload(file, target)))
    monkeypatch.setattr(RemotePath, "unlink", lambda path, **how: (events.append(("gone", path.name)), unlink(path, **how)))
    for _ in range(2):
        with atomic_replace_dir(folder) as new:
            for name in ("a.txt", "config.json", "z.safetensors"):
                (new / name).write_text(name)
    one = [("put", "a.txt"), ("put", "z.safetensors"), ("put", "config.json")]
    assert events == [*one, ("gone", "config.json"), ("gone", "a.txt"), ("gone", "z.safetensors"), *one]


def test_a_local_copy_is_made_once_per_remote_file(memory_store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x.txt", "b/x.txt"):
        (memory_store / name).write_text(name)
    first, second = local_copy(memory_store / "a/x.txt"), local_copy(str(memory_store / "b/x.txt"))
    assert (first.read_text(), second.read_text()) == ("a/x.txt", "b/x.txt")
    assert first.is_relative_to(cache_folder())
    monkeypatch.setattr(files, "download", None)  # nothing is fetched twice
    assert local_copy(memory_store / "a/x.txt") == first
    assert local_copy(first) == first
    with pytest.raises(FileNotFoundError):
        local_copy(memory_store / "a/none.txt")
    assert digest(["a", "bc"]) != digest(["ab", "c"])
    assert len(digest("")) == 32


def test_no_executable_files_of_a_model_are_downloaded(memory_store: RemotePath) -> None:
    for name in ("config.json", "model.safetensors", "chat.jinja", "evil.py", "model.bin", "deep/x.json"):
        (memory_store / "m" / name).write_text(name)
    assert sorted(p.name for p in local_model_copy(memory_store / "m").iterdir()) == [
        "chat.jinja",
        "config.json",
        "model.safetensors",
    ]
    (memory_store / "n" / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="holds no model"):
        local_model_copy(memory_store / "n")
