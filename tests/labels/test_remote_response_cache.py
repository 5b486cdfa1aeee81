"""A cache in a store, on one in memory"""

import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from addressvlm import InputError
from addressvlm.labels import response_cache
from addressvlm.labels.response_cache import (
    LEASE_EXPIRY_S,
    LEASE_RENEWAL_S,
    CachedAnswer,
    RemoteSegments,
    RequestKey,
    ResponseCache,
    open_for_writing,
)
from addressvlm.storage.files import CACHE_VARIABLE, local_folder_for
from addressvlm.storage.remote_path import RemotePath


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return RemotePath(f"memory://bucket/{tmp_path.name}/cache")


def put(folder: RemotePath, name: str, start: int, lines: bytes) -> None:
    (folder / f"{name}.{start:012d}-{start + len(lines):012d}.jsonl").write_bytes(lines)


def names(folder: RemotePath) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl"))


def asked(number: int) -> RequestKey:
    return RequestKey("row", "v1", "m", "image", "digest", number)


def test_where_a_join_was_cut_off_the_larger_object_is_read_and_every_line_once(folder: RemotePath) -> None:
    put(folder, "a", 0, b"1\n")
    put(folder, "a", 2, b"2\n")
    put(folder, "a", 0, b"1\n2\n")  # both, and the parts were not removed
    put(folder, "a", 4, b"3\n")
    put(folder, "b", 0, b"4\n")
    put(folder, "b", 2, b"5\n")
    assert [path.read_text() for path in RemoteSegments(folder).fetch()] == ["1\n2\n", "3\n", "4\n", "5\n"]


def test_many_small_objects_become_one_with_the_same_bytes(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MAX_OBJECTS", 3)
    with open_for_writing(folder) as cache:
        segment = cache._path
        sizes = []
        for number in range(1, 9):
            cache.add(asked(number), CachedAnswer(f"text {number}", usd=1.0))
            cache.sync()
            cache.sync()  # nothing new: no further object
            sizes.append(len(names(folder)))
            assert (ResponseCache(folder).usd, ResponseCache(folder).get(asked(number))) == (
                number,
                CachedAnswer(f"text {number}", usd=1.0),
            )
        assert sizes == [1, 2, 1, 2, 3, 2, 3, 4]
        whole = segment.read_bytes().rstrip(b"\0")
    assert b"".join((folder / name).read_bytes() for name in names(folder)) == whole
    assert len(names(folder)) == 3
    assert not segment.exists()


def test_what_a_killed_job_had_not_sent_is_sent_without_its_cut_line(folder: RemotePath) -> None:
    left = RemoteSegments(folder)
    (left.unsent / "killed.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n{"c"' + bytes(9))
    (left.unsent / "empty.jsonl").write_bytes(bytes(9))
    left.send_unsent()
    assert names(folder) == ["killed.000000000000-000000000018.jsonl"]
    assert (folder / names(folder)[0]).read_text() == '{"a": 1}\n{"b": 2}\n'
    assert list(left.unsent.iterdir()) == []


def hold(folder: RemotePath, host: str, ago_s: float) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat()
    (folder / "holder.json").write_text(json.dumps({"host": host, "process": 7, "at": at}))


def test_a_job_has_the_ledger_until_it_was_not_seen_for_long(folder: RemotePath) -> None:
    hold(folder, "another", LEASE_EXPIRY_S - 10)
    with pytest.raises(InputError, match=r"another job labels .* \(process 7 on another, seen 5\d s ago\)"):
        RemoteSegments(folder).renew_lease()
    assert json.loads((folder / "holder.json").read_text())["host"] == "another"
    hold(folder, "another", LEASE_EXPIRY_S + 10)
    RemoteSegments(folder).renew_lease()
    mine = json.loads((folder / "holder.json").read_text())
    assert (mine["host"], mine["process"]) == (socket.gethostname(), os.getpid())
    hold(folder, socket.gethostname(), 1)  # one of this machine is kept out by its lock
    RemoteSegments(folder).renew_lease()


def test_a_job_signs_now_and_then_and_sees_that_another_took_over(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    own = RemoteSegments(folder)
    own.renew_lease()
    (folder / "holder.json").unlink()
    now += LEASE_RENEWAL_S - 1
    own.renew_lease()
    assert not (folder / "holder.json").exists()
    now += 2
    own.renew_lease()
    assert (folder / "holder.json").is_file()
    hold(folder, "another", 0)
    now += LEASE_RENEWAL_S + 1
    with pytest.raises(InputError, match="another job labels"):
        own.renew_lease()
    own.release_lease()
    assert not (folder / "holder.json").exists()
    own.release_lease()


def test_the_copies_of_two_ledgers_are_two(folder: RemotePath) -> None:
    other = folder.parent / "other"
    assert local_folder_for(folder) != local_folder_for(other)
    assert local_folder_for(folder) == local_folder_for(RemotePath(str(folder)))
