"""The answers of external geocoders, kept on disk as they came: what was paid for or waited for once is never asked again."""

import json
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from addressvlm.errors import InputError

DECIMALS = 6  # of a degree, about 0.1 m
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    service TEXT, server TEXT, language TEXT, lat TEXT, lon TEXT, asked_at TEXT, reply TEXT,
    PRIMARY KEY (service, server, language, lat, lon))"""
_BUSY_S = 60.0  # another run may be writing


class AnswerCache:
    """An SQLite file of raw replies, one row a point and service; safe against kills and against several runs at once."""

    def __init__(self, path: Path, service: str, server: str, language: str | None) -> None:
        """Open or make the file for the replies of one service.

        Raises:
            InputError: the file can't be made or is something else.
        """
        self.path = Path(path)
        self._which = (service, server, language or "")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=_BUSY_S)
            self._base.execute(_TABLE)
            self._base.commit()
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the geocoder's answers can't be kept in {self.path} ({error}): name another file in city.geocoder.cache."
            ) from None

    def get(self, lat: float, lon: float) -> dict[str, Any] | None:
        """The reply about a point, None if it was never asked."""
        row = self._base.execute(
            "SELECT reply FROM answers WHERE service=? AND server=? AND language=? AND lat=? AND lon=?",
            (*self._which, *rounded(lat, lon)),
        ).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, lat: float, lon: float, reply: dict[str, Any]) -> None:
        """Keep a reply; it is on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps(reply, ensure_ascii=False)
        try:
            with self._base:
                self._base.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (*self._which, *rounded(lat, lon), now, text),
                )
        except sqlite3.Error as error:
            raise InputError(
                f"the geocoder's answer can't be kept in {self.path} ({error}): make room, or name another file in "
                "city.geocoder.cache."
            ) from None

    def __len__(self) -> int:
        where = "service=? AND server=? AND language=?"
        return int(self._base.execute(f"SELECT count(*) FROM answers WHERE {where}", self._which).fetchone()[0])

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()


def rounded(lat: float, lon: float) -> tuple[str, str]:
    """A point as it is asked for and kept."""
    return f"{lat:.{DECIMALS}f}", f"{lon:.{DECIMALS}f}"
