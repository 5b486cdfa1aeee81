"""External reverse geocoders: a sample of the places is asked about, the rest take the answer of the nearest (paper 002, A.2).

A new service is one `GeocoderService`: how to ask, when a reply is none, and how to read it. Google's key comes from
GOOGLE_MAPS_API_KEY and from nowhere else; it is in no log, error or cache.
"""

import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from addressvlm.config.city import GeocoderConfig
from addressvlm.errors import InputError
from addressvlm.storage.http_client import GeocoderClient, UnavailableError

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


KEY = "GOOGLE_MAPS_API_KEY"
FILL_M = 250.0  # an answer from further away says nothing about a place
GIVE_UP_AFTER = 8  # points in a row that got no answer although each was tried again
MOST_THREADS = 8


@dataclass(frozen=True)
class GeocoderAnswer:
    """What a geocoder says of a point, buildings set aside.

    Attributes:
        street: the street that most of its results name, the first of them on a tie.
        second: the runner-up, None if there is no other.
        tie: as many results name the second.
        district: the neighbourhood, None if it gives none.
    """

    street: str
    district: str | None = None
    second: str | None = None
    tie: bool = False


@dataclass(frozen=True)
class GeocoderService:
    """One kind of geocoder."""

    url: str
    refused: str
    parameters: Callable[[str, str, str | None], dict[str, str]]  # of latitude, longitude, language; without a key
    secret: Callable[[], dict[str, str]]  # parameters that are asked with and never kept; InputError if there is no key
    check: Callable[[dict[str, Any]], None]  # InputError or UnavailableError if the reply is none
    answer: Callable[[dict[str, Any]], GeocoderAnswer | None]


def locate_by_geocoder(
    ids: Sequence[str],
    lat: NDArray[np.float64],
    lon: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    config: GeocoderConfig,
    cache: Path,
    seed: int,
    language: str | None = None,
) -> tuple[list[GeocoderAnswer | None], list[str]]:
    """Answers for N places and their sources: the service's name, or "neighbour" for those filled from the nearest.

    `share` of the places is drawn by seed, whatever their order, and asked about; a place without an answer takes that of
    the nearest place that has one within FILL_M, None if there is none.

    Args:
        ids, lat, lon, x, y: (N,) names, degrees and metres of the places.
        cache: file of answers; what is in it is not asked again.

    Raises:
        InputError: the service refuses us, is over its quota, keeps failing, or its key is missing.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    wanted = sorted(random.Random(f"{seed}:geocoder").sample(order, max(1, round(config.share * len(order))))) if order else []
    answers: list[GeocoderAnswer | None] = [None] * len(ids)
    for i, answer in zip(wanted, _ask([(lat[i], lon[i]) for i in wanted], config, cache, language), strict=True):
        answers[i] = answer
    known = [i for i in wanted if answers[i]]
    sources = ["neighbour"] * len(ids)
    for i in known:
        sources[i] = config.service
    others = np.setdiff1d(np.arange(len(ids)), known)
    if known and len(others):
        points = shapely.points(x, y)
        filled, nearest = shapely.STRtree(points[known]).query_nearest(points[others], max_distance=FILL_M, all_matches=False)
        for i, j in zip(others[filled], nearest, strict=True):
            answers[i] = answers[known[j]]
    return answers, sources


def _ask(
    points: Sequence[tuple[float, float]], config: GeocoderConfig, cache: Path, language: str | None
) -> list[GeocoderAnswer | None]:
    """The service's answers about points, from the cache where it has them."""
    service = SERVICES[config.service]
    url = config.url or service.url
    kept = AnswerCache(cache, config.service, url, language)
    try:
        missing = list(dict.fromkeys(rounded(*p) for p in points if kept.get(*p) is None))[: config.max_requests]
        if missing:
            secret = service.secret()
            client = GeocoderClient(
                url,
                service.refused,
                config.per_second,
                config.timeout_s,
                config.retries,
                config.user_agent,
                service.check,
            )

            def ask(point: tuple[str, str]) -> dict[str, Any]:
                return client.ask(service.parameters(*point, language) | secret)

            _fetch(missing, ask, client, kept, config.per_second)
        replies = [kept.get(*p) for p in points]
        return [None if reply is None else service.answer(reply) for reply in replies]
    finally:
        kept.close()


def _fetch(
    points: list[tuple[str, str]],
    ask: Callable[[tuple[str, str]], dict[str, Any]],
    client: GeocoderClient,
    cache: AnswerCache,
    per_second: float,
) -> None:
    """Ask about every point and keep each reply at once; points that fail for now are left out."""
    failures = 0
    threads = max(1, min(MOST_THREADS, int(per_second)))
    with ThreadPoolExecutor(threads) as pool:
        asked = {pool.submit(ask, point): point for point in points}
        try:
            for done in as_completed(asked):
                try:
                    reply = done.result()
                except UnavailableError as trouble:
                    failures += 1
                    if trouble.quota or failures == GIVE_UP_AFTER:
                        raise InputError(
                            f"{client.host} {trouble}: {len(cache):,} answers are kept in {cache.path}, run the same command "
                            "again later, or lower city.geocoder.per_second."
                        ) from None
                else:
                    failures = 0
                    cache.put(float(asked[done][0]), float(asked[done][1]), reply)
        except BaseException:
            client.stop()
            pool.shutdown(cancel_futures=True)
            raise


# Nominatim


def _nominatim_parameters(lat: str, lon: str, language: str | None) -> dict[str, str]:
    """Zoom 17 asks for streets, so that no building comes first."""
    asked = {"format": "jsonv2", "lat": lat, "lon": lon, "zoom": "17", "addressdetails": "1"}
    return asked | ({"accept-language": language} if language else {})


def _nominatim_answer(reply: dict[str, Any]) -> GeocoderAnswer | None:
    """The road; None where there is none, or where a building was matched all the same."""
    parts = reply.get("address") or {}
    kind = reply.get("category") or reply.get("class")
    street = next((parts[k] for k in ("road", "pedestrian", "footway", "path", "square") if parts.get(k)), None)
    if street is None or kind == "building" or "house_number" in parts:
        return None
    names = ("neighbourhood", "quarter", "suburb", "city_district", "borough")
    return GeocoderAnswer(street, next((parts[k] for k in names if parts.get(k)), None))


def _nominatim_check(reply: dict[str, Any]) -> None:
    """Nominatim says what is wrong by status, and `error` where it knows no address."""
    if "address" not in reply and "error" not in reply:
        raise InputError("the geocoder's reply has no address: check that city.geocoder.url is Nominatim's /reverse.")


# Google


def _google_key() -> dict[str, str]:
    key = os.environ.get(KEY, "")
    if not key:
        raise InputError(f"{KEY} is not set and city.geocoder.service is google: set it where the job runs, or use nominatim.")
    return {"key": key}


def _google_parameters(lat: str, lon: str, language: str | None) -> dict[str, str]:
    return {"latlng": f"{lat},{lon}"} | ({"language": language} if language else {})


def _google_check(reply: dict[str, Any]) -> None:
    """Google answers 200 and says in `status` what it is."""
    status = str(reply.get("status"))
    if status in ("OVER_QUERY_LIMIT", "UNKNOWN_ERROR", "RESOURCE_EXHAUSTED"):
        raise UnavailableError(f"says {status}", quota=status != "UNKNOWN_ERROR")
    if status == "OVER_DAILY_LIMIT":
        raise InputError(f"Google says {status}: check the billing and the quota of {KEY}, or run again tomorrow.")
    if status == "REQUEST_DENIED":
        raise InputError(f"Google refuses us ({status}): check {KEY} and that the Geocoding API is enabled for it.")
    if status not in ("OK", "ZERO_RESULTS"):
        raise InputError(f"Google's geocoder says {status[:40]!r} instead of an address: check city.geocoder.url.")


def _google_answer(reply: dict[str, Any]) -> GeocoderAnswer | None:
    """The vote among the results, those matched to a building (ROOFTOP) set aside."""
    streets: list[str] = []
    districts: list[str] = []
    for result in reply.get("results", []):
        if result.get("geometry", {}).get("location_type") == "ROOFTOP":
            continue
        for part in result.get("address_components", []):
            kinds = set(part.get("types", []))
            if "route" in kinds:
                streets.append(part["long_name"])
            elif kinds & {"neighborhood", "sublocality"}:
                districts.append(part["long_name"])
    votes = Counter(streets).most_common(2)  # first come first on a tie
    if not votes:
        return None
    second, count = votes[1] if len(votes) > 1 else (None, 0)
    return GeocoderAnswer(
        votes[0][0], Counter(districts).most_common(1)[0][0] if districts else None, second, count == votes[0][1]
    )


SERVICES = {
    "nominatim": GeocoderService(
        url="https://nominatim.openstreetmap.org/reverse",
        refused="set city.geocoder.user_agent to your contact, or run a Nominatim of your own and set city.geocoder.url to it",
        parameters=_nominatim_parameters,
        secret=dict,
        check=_nominatim_check,
        answer=_nominatim_answer,
    ),
    "google": GeocoderService(
        url="https://maps.googleapis.com/maps/api/geocode/json",
        refused=f"check {KEY} and that the Geocoding API is enabled for it",
        parameters=_google_parameters,
        secret=_google_key,
        check=_google_check,
        answer=_google_answer,
    ),
}
