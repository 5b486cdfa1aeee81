import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addressvlm import InputError
from addressvlm.labels import response_cache
from addressvlm.labels.job_lock import LEASE_EXPIRY_S, LEASE_RENEWAL_S, JobLock
from addressvlm.labels.response_cache import (
    MAX_LINE,
    MAX_TEXT,
    CachedAnswer,
    RemoteSegments,
    RequestKey,
    ResponseCache,
    WritableResponseCache,
    open_for_writing,
)
from addressvlm.storage.files import CACHE_VARIABLE, local_folder_for
from addressvlm.storage.remote_path import RemotePath
from tests.support.full_disk import disk_of

REQUEST = RequestKey("row", "v1", "openai:m", "s" * 32, "a" * 32, "b" * 32, 1)


TEXTS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def request_of(row: int, number: int = 1) -> RequestKey:
    return replace(REQUEST, id=f"row {row}", number=number)


def segment(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


def test_answers_are_looked_up_by_their_request(tmp_path: Path) -> None:
    first, second = CachedAnswer("Mill Street", tokens_in=700, tokens_out=50, usd=0.25, seconds=2.0), CachedAnswer(refusal="no")
    with open_for_writing(tmp_path) as cache:
        cache.add(REQUEST, first)
        cache.add(replace(REQUEST, number=2), second)
        assert cache.get(REQUEST) == first
    cached = ResponseCache(tmp_path)
    assert (cached.get(REQUEST), cached.get(replace(REQUEST, number=2))) == (first, second)
    changes = ({"id": "other"}, {"image": "c"}, {"digest": "c"}, {"number": 3})
    assert [cached.get(replace(REQUEST, **change)) for change in changes] == [None] * 4
    assert (cached.tokens, cached.usd, cached.torn, cached.answers) == (750, 0.25, 0, {("v1", "openai:m"): 2})
    with open_for_writing(tmp_path) as more:
        more.add(request_of(9), first)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert (ResponseCache(tmp_path).get(REQUEST), ResponseCache(tmp_path).get(request_of(9))) == (first, first)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), share=st.floats(0, 1), zeros=st.integers(0, 50))
def test_a_segment_that_is_cut_off_loses_the_cut_line_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], share: float, zeros: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = WritableResponseCache(folder)
    for row, text in enumerate(texts):
        cache.add(request_of(row), CachedAnswer(text))
    cache.close()
    content = segment(folder).read_bytes()
    size = round(share * len(content))
    segment(folder).write_bytes(content[:size] + bytes(zeros))  # zeros: the room that a kill leaves
    cached = ResponseCache(folder)
    ends = [end + 1 for end, letter in enumerate(content) if letter == ord("\n")]
    complete = sum(end - 1 <= size for end in ends)
    assert [cached.get(request_of(row)) for row in range(len(texts))] == [
        CachedAnswer(text) if row < complete else None for row, text in enumerate(texts)
    ]
    assert cached.torn <= 1


def test_what_a_dying_process_leaves_is_read(tmp_path: Path) -> None:
    cache = WritableResponseCache(tmp_path)
    cache.reserve_space(1)
    cache.add(REQUEST, CachedAnswer("kept"))  # neither closed nor synchronised
    assert ResponseCache(tmp_path).get(REQUEST) == CachedAnswer("kept")
    assert ResponseCache(tmp_path).torn == 0
    cache.close()


@pytest.mark.parametrize("order", [1, -1])
def test_an_answer_beats_a_failure_in_any_order(tmp_path: Path, order: int) -> None:
    for answer in [CachedAnswer(failure="500"), CachedAnswer("Mill Street")][::order]:
        with open_for_writing(tmp_path) as cache:
            cache.add(REQUEST, answer)
    for name, path in zip("ab", sorted(tmp_path.glob("*.jsonl"), key=lambda p: "Mill" in p.read_text())[::order], strict=True):
        path.rename(tmp_path / f"{name}.jsonl")
    assert ResponseCache(tmp_path).get(REQUEST) == CachedAnswer("Mill Street")


def test_a_job_that_sends_nothing_leaves_nothing(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as cache:
        cache.reserve_space(1)
    assert list(tmp_path.glob("*.jsonl")) == []
    assert not list(tmp_path.glob("*.reserve"))


def test_what_is_spent_is_known_again_whatever_came_back(tmp_path: Path) -> None:
    answers = [
        CachedAnswer("x", tokens_in=10, tokens_out=1, usd=0.5, seconds=2.0),
        CachedAnswer(None, "no", tokens_in=20, tokens_out=2, usd=0.25, seconds=4.0),
        CachedAnswer(failure="500"),
    ]
    with open_for_writing(tmp_path) as cache:
        for number, answer in enumerate(answers, 1):
            cache.add(replace(REQUEST, number=number), answer)
        first = (cache.tokens, cache.usd, cache.seconds, cache.answers)
    cached = ResponseCache(tmp_path)
    assert first == (cached.tokens, cached.usd, cached.seconds, cached.answers) == (33, 0.75, 6.0, {("v1", "openai:m"): 2})
    assert [cached.get(replace(REQUEST, number=number)) for number in (1, 2, 3)] == answers


def test_answers_are_made_to_survive_the_machine_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_for_writing(tmp_path) as cache:
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)
        cache.sync()
        for number in (1, 2):
            cache.add(replace(REQUEST, number=number), CachedAnswer("x"))
            cache.sync()
            cache.sync()
        assert synced == [cache._file] * 2


def test_foreign_lines_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"asked": {}}\n[1]\nno JSON\n' + json.dumps({"asked": "x"}) + "\n")
    assert ResponseCache(tmp_path).torn == 4


def test_long_texts_are_cut(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as cache:
        cache.add(REQUEST, CachedAnswer("\x01" * (2 * MAX_TEXT)))
        cached = cache.get(REQUEST)
    assert cached is not None
    assert cached.text == "\x01" * MAX_TEXT
    assert segment(tmp_path).stat().st_size < MAX_LINE  # even in the longest way to write it


def test_one_job_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match=r"another job labels .* \(process \d+ on ")
    with open_for_writing(tmp_path / "cache"), refused, open_for_writing(tmp_path / "cache"):
        pass
    with open_for_writing(tmp_path / "cache") as cache:
        cache.add(REQUEST, CachedAnswer("x"))


def test_a_full_disk_stops_new_requests_and_has_room_for_the_answers_in_flight(tmp_path: Path) -> None:
    answer = CachedAnswer("\x01" * MAX_TEXT)  # the longest line
    with disk_of(10 * MAX_LINE, tmp_path), open_for_writing(tmp_path) as cache:
        cache.reserve_space(4)
        rows = 0
        while not cache._full:
            cache.check_space()
            cache.add(request_of(rows), answer)
            rows += 1
        with pytest.raises(InputError, match=r"disk of .* is full"):
            cache.check_space()
        for row in range(rows, rows + 3):  # sent before the disk was full
            cache.add(request_of(row), answer)
    cached = ResponseCache(tmp_path)
    assert [cached.get(request_of(row)) for row in range(rows + 3)] == [answer] * (rows + 3)
    assert cached.torn == 0
    assert rows > 5


def test_an_answer_that_finds_no_room_leaves_no_part_of_it(tmp_path: Path) -> None:
    with disk_of(2 * MAX_LINE, tmp_path), open_for_writing(tmp_path) as cache:
        cache.add(request_of(0), CachedAnswer("\x01" * MAX_TEXT))
        for row in range(1, 9):
            with suppress(InputError):
                cache.add(request_of(row), CachedAnswer("\x01" * MAX_TEXT))
        with pytest.raises(InputError, match=r"disk of .* is full"):
            cache.add(request_of(9), CachedAnswer("\x01" * MAX_TEXT))
    cached = ResponseCache(tmp_path)
    assert cached.torn == 0
    assert cached.get(request_of(0)) is not None
    assert cached.get(request_of(9)) is None


def test_a_disk_that_is_full_from_the_start_is_an_error_before_anything_is_sent(tmp_path: Path) -> None:
    with (
        disk_of(MAX_LINE, tmp_path),
        pytest.raises(InputError, match=r"disk of .* is full"),
        open_for_writing(tmp_path) as cache,
    ):
        cache.reserve_space(2)
    assert not list(tmp_path.glob("*.reserve"))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match="can't be written"), open_for_writing(tmp_path / "cache"):
        pass


def test_an_error_of_the_job_is_not_one_of_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), open_for_writing(tmp_path / "cache"):
        (tmp_path / "elsewhere").read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return RemotePath(f"memory://bucket/{tmp_path.name}/cache")


def write_object(folder: RemotePath, name: str, start: int, lines: bytes) -> None:
    (folder / f"{name}.{start:012d}-{start + len(lines):012d}.jsonl").write_bytes(lines)


def names(folder: RemotePath) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jsonl"))


def request(number: int) -> RequestKey:
    return RequestKey("row", "v1", "m", "settings", "image", "digest", number)


def test_where_a_merge_was_cut_off_the_larger_object_is_read_and_every_line_once(folder: RemotePath) -> None:
    write_object(folder, "a", 0, b"1\n")
    write_object(folder, "a", 2, b"2\n")
    write_object(folder, "a", 0, b"1\n2\n")  # both, and the parts were not removed
    write_object(folder, "a", 4, b"3\n")
    write_object(folder, "b", 0, b"4\n")
    write_object(folder, "b", 2, b"5\n")
    assert [path.read_text() for path in RemoteSegments(folder).fetch()] == ["1\n2\n", "3\n", "4\n", "5\n"]


def test_many_small_objects_become_one_with_the_same_bytes(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MAX_OBJECTS", 3)
    with open_for_writing(folder) as cache:
        segment = cache._path
        sizes = []
        for number in range(1, 9):
            cache.add(request(number), CachedAnswer(f"text {number}", usd=1.0))
            cache.sync()
            cache.sync()  # nothing new: no further object
            sizes.append(len(names(folder)))
            assert (ResponseCache(folder).usd, ResponseCache(folder).get(request(number))) == (
                number,
                CachedAnswer(f"text {number}", usd=1.0),
            )
        assert sizes == [1, 2, 1, 2, 3, 2, 3, 4]
        content = segment.read_bytes().rstrip(b"\0")
    assert b"".join((folder / name).read_bytes() for name in names(folder)) == content
    assert len(names(folder)) == 3
    assert not segment.exists()


def test_unsent_segments_of_a_killed_job_are_sent_without_the_cut_line(folder: RemotePath) -> None:
    unsent = RemoteSegments(folder)
    (unsent.unsent / "killed.jsonl").write_bytes(b'{"a": 1}\n{"b": 2}\n{"c"' + bytes(9))
    (unsent.unsent / "empty.jsonl").write_bytes(bytes(9))
    unsent.send_unsent()
    assert names(folder) == ["killed.000000000000-000000000018.jsonl"]
    assert (folder / names(folder)[0]).read_text() == '{"a": 1}\n{"b": 2}\n'
    assert list(unsent.unsent.iterdir()) == []


def write_holder(folder: RemotePath, host: str, ago_s: float) -> RemotePath:
    at = (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat()
    claim = folder / f"holder-{host}.json"
    claim.write_text(json.dumps({"host": host, "process": 7, "at": at}))
    return claim


def test_a_lease_keeps_other_machines_out_until_it_expires(folder: RemotePath) -> None:
    other = write_holder(folder, "another", LEASE_EXPIRY_S - 10)
    with pytest.raises(InputError, match=r"another job labels .* \(process 7 on another, seen 5\d s ago\)"):
        JobLock(folder)
    assert list(folder.glob("holder-*")) == [other]  # the claim is withdrawn
    write_holder(folder, "another", LEASE_EXPIRY_S + 10)
    write_holder(folder, socket.gethostname(), 1)  # one of this machine is kept out by its lock
    lock = JobLock(folder)
    (mine,) = (json.loads(claim.read_text()) for claim in folder.glob("holder-*"))
    assert (mine["host"], mine["process"]) == (socket.gethostname(), os.getpid())
    lock.release()
    assert not list(folder.glob("holder-*"))


def test_of_two_jobs_at_the_same_moment_not_both_get_the_cache(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes its claim between the first one's look and its first answer, or before that look."""
    monkeypatch.setattr(socket, "gethostname", iter(["first", "second", "third", "fourth"]).__next__)
    JobLock(folder)
    with pytest.raises(InputError, match="another job labels"):
        JobLock(folder)
    write = RemotePath.write_text

    def write_both(path: RemotePath, text: str) -> None:
        write(path, text)
        monkeypatch.setattr(RemotePath, "write_text", write)
        write_holder(folder, "meanwhile", 0)

    for claim in folder.glob("holder-*"):
        claim.unlink()
    monkeypatch.setattr(RemotePath, "write_text", write_both)
    with pytest.raises(InputError, match=r"process 7 on meanwhile"):
        JobLock(folder)


def test_a_lease_is_renewed_now_and_then_and_may_be_lost(folder: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lock = JobLock(folder)
    (claim,) = folder.glob("holder-*")
    claim.unlink()
    now += LEASE_RENEWAL_S - 1
    lock.renew()
    assert not claim.exists()
    now += 2
    lock.renew()
    assert claim.is_file()
    write_holder(folder, "another", 0)  # which withdraws when it sees ours
    now += LEASE_RENEWAL_S + 1
    lock.renew()
    now += LEASE_EXPIRY_S + 1  # this process stood still, and the other one took the cache
    with pytest.raises(InputError, match="another job labels"):
        lock.renew()
    assert not claim.exists()
    now += LEASE_RENEWAL_S + 1
    lock.renew()  # as by the thread that shows the progress, a moment after the end
    assert not claim.exists()


def test_segments_of_living_tasks_are_not_sent_for_them(folder: RemotePath) -> None:
    with WritableResponseCache(folder) as alive:
        alive.add(request(1), CachedAnswer("x"))
        with WritableResponseCache(folder) as other:
            assert alive._path.exists()
            assert names(folder) == []
            other.add(request(2), CachedAnswer("y"))
        assert len(names(folder)) == 1
    cached = ResponseCache(folder)
    assert (cached.get(request(1)), cached.get(request(2))) == (CachedAnswer("x"), CachedAnswer("y"))


def test_only_rows_of_a_part_are_in_memory_and_all_are_counted(tmp_path: Path) -> None:
    with open_for_writing(tmp_path) as cache:
        for row in range(4):
            cache.add(request_of(row), CachedAnswer("x", usd=1.0))
        cache.add(request_of(9), CachedAnswer(lost="time-out", usd=0.5))
    part = ResponseCache(tmp_path, {"row 1", "row 3"})
    assert [part.get(request_of(row)) is not None for row in (0, 1, 2, 3, 9)] == [False, True, False, True, False]
    assert (part.usd, part.answers.total(), len(part._index)) == (4.5, 4, 2)


def test_two_caches_have_two_local_folders(folder: RemotePath) -> None:
    other = folder.parent / "other"
    assert local_folder_for(folder) != local_folder_for(other)
    assert local_folder_for(folder) == local_folder_for(RemotePath(str(folder)))


def test_the_next_job_waits_until_the_tasks_of_a_killed_one_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = WritableResponseCache(tmp_path)  # of a task that outlives its job for a moment
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        left.add(REQUEST, CachedAnswer("x"))
        left.close()

    monkeypatch.setattr(time, "sleep", sleep)
    with open_for_writing(tmp_path) as cache:
        assert cache.get(REQUEST) == CachedAnswer("x")
    assert waits == [0.1]
