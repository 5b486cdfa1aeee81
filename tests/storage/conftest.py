"""A remote storage in memory, with a cache of its own"""

from pathlib import Path

import pytest

from addressvlm.storage.files import CACHE_VARIABLE
from addressvlm.storage.remote_path import RemotePath


@pytest.fixture
def memory_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return RemotePath(f"memory://bucket/{tmp_path.name}")
