"""How long a server asks to be left alone."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


def retry_after(headers: Any) -> float | None:
    """Seconds that an answer asks to wait, None if it says nothing that can be read.

    Args:
        headers: have `get`, whatever the case of the names; Retry-After holds seconds or a date, its other forms milliseconds.
    """
    for name in ("retry-after-ms", "x-ms-retry-after-ms"):
        try:
            return max(0.0, float(headers.get(name)) / 1000)
        except (TypeError, ValueError):
            continue
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
