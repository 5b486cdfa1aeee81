"""A disk that fills up, for tests."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def disk_of(size: int, folder: Path) -> Iterator[None]:
    """The files below a folder have room for `size` bytes together; what goes beyond is refused as by a full disk."""
    write = os.pwrite

    def limited(file: int, data: bytes, offset: int) -> int:
        used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        room = size - used + os.fstat(file).st_size - offset
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[:room], offset)

    with mock.patch("os.pwrite", limited):
        yield
