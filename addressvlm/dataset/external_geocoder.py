"""External reverse geocoders: a sample of the places is queried, the rest take the answer of the nearest (paper 002, A.2).

A new service is one class of SERVICES: `parameters` of a request, `secret` ones that are never stored, `check` raises
InputError, or UnavailableError for another attempt, if a reply is no answer, `parse` reads it. Google's key comes from
GOOGLE_MAPS_API_KEY and from nowhere else; it is in no log, error or cache.
"""

import json
import os
import random
import sqlite3
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import shapely
from numpy.typing import NDArray

from addressvlm.config.city import GeocoderConfig
from addressvlm.errors import InputError
from addressvlm.storage.http_client import HttpClient, RateLimiter, Response, UnavailableError

API_KEY_VARIABLE = "GOOGLE_MAPS_API_KEY"
MAX_FILL_M = 250.0  # an answer from further away says nothing about a place
MAX_FAILURES = 8  # consecutive points without an answer, although each was tried again
MAX_THREADS = 8
MAX_WAIT_S = 300.0  # a server that asks for more is over its quota for now
MAX_BYTES = 4 << 20
DECIMALS = 6  # of a degree, about 0.1 m


@dataclass(frozen=True)
class GeocoderAnswer:
    """The address at a point, buildings set aside.

    Attributes:
        street: the street that most of the results name, the first of them on a tie.
        second: the runner-up, None if there is no other.
        tie: as many results name the second.
        district: the neighbourhood, None if the service gives none.
    """

    street: str
    district: str | None = None
    second: str | None = None
    tie: bool = False


class Nominatim:
    """OpenStreetMap's geocoder: one result, the nearest road."""

    url = "https://nominatim.openstreetmap.org/reverse"
    access_hint = "set city.geocoder.user_agent to your contact, or run your own Nominatim and set city.geocoder.url to it"

    def parameters(self, lat: str, lon: str, language: str | None) -> dict[str, str]:
        """Zoom 17 is for streets, so that no building comes first."""
        parameters = {"format": "jsonv2", "lat": lat, "lon": lon, "zoom": "17", "addressdetails": "1"}
        return parameters | ({"accept-language": language} if language else {})

    def secret(self) -> dict[str, str]:
        """No key is needed."""
        return {}

    def check(self, reply: dict[str, Any]) -> None:
        """A reply has an address, or `error` where there is none."""
        if "address" not in reply and "error" not in reply:
            raise InputError("the geocoder's reply has no address: check that city.geocoder.url is Nominatim's /reverse.")

    def parse(self, reply: dict[str, Any]) -> GeocoderAnswer | None:
        """The road; None where there is none, or where the result is a building all the same."""
        address = reply.get("address") or {}
        kind = reply.get("category") or reply.get("class")
        street = next((address[k] for k in ("road", "pedestrian", "footway", "path", "square") if address.get(k)), None)
        if street is None or kind == "building" or "house_number" in address:
            return None
        levels = ("neighbourhood", "quarter", "suburb", "city_district", "borough")
        return GeocoderAnswer(street, next((address[k] for k in levels if address.get(k)), None))


class Google:
    """Google's Geocoding API: several results, which vote."""

    url = "https://maps.googleapis.com/maps/api/geocode/json"
    access_hint = f"check {API_KEY_VARIABLE} and that the Geocoding API is enabled for it"

    def parameters(self, lat: str, lon: str, language: str | None) -> dict[str, str]:
        """Position and language."""
        return {"latlng": f"{lat},{lon}"} | ({"language": language} if language else {})

    def secret(self) -> dict[str, str]:
        """The key from the environment."""
        key = os.environ.get(API_KEY_VARIABLE, "")
        if not key:
            raise InputError(
                f"{API_KEY_VARIABLE} is not set and city.geocoder.service is google: set it where the job runs, or use "
                "nominatim."
            )
        return {"key": key}

    def check(self, reply: dict[str, Any]) -> None:
        """Google answers 200 whatever happens; `status` says how it went."""
        status = str(reply.get("status"))
        if status in ("OVER_QUERY_LIMIT", "UNKNOWN_ERROR", "RESOURCE_EXHAUSTED"):
            raise UnavailableError(f"it says {status}", over_quota=status != "UNKNOWN_ERROR")
        if status == "OVER_DAILY_LIMIT":
            raise InputError(f"Google says {status}: check the billing and the quota of {API_KEY_VARIABLE}, or rerun tomorrow.")
        if status == "REQUEST_DENIED":
            raise InputError(f"Google refuses us ({status}): {self.access_hint}.")
        if status not in ("OK", "ZERO_RESULTS"):
            raise InputError(f"Google's geocoder says {status[:40]!r} instead of an address: check city.geocoder.url.")

    def parse(self, reply: dict[str, Any]) -> GeocoderAnswer | None:
        """The vote of the results, without those that are a building (ROOFTOP)."""
        streets: Counter[str] = Counter()
        districts: Counter[str] = Counter()
        for result in reply.get("results", []):
            if result.get("geometry", {}).get("location_type") == "ROOFTOP":
                continue
            for component in result.get("address_components", []):
                types = set(component.get("types", []))
                if "route" in types:
                    streets[component["long_name"]] += 1
                elif types & {"neighborhood", "sublocality"}:
                    districts[component["long_name"]] += 1
        if not streets:
            return None
        (first, votes), *others = streets.most_common(2)  # the first of equals on a tie
        second, second_votes = others[0] if others else (None, 0)
        district = districts.most_common(1)[0][0] if districts else None
        return GeocoderAnswer(first, district, second, tie=second_votes == votes)


SERVICES: dict[str, Nominatim | Google] = {"nominatim": Nominatim(), "google": Google()}


def locate_by_geocoder(
    ids: Sequence[str],
    lat: NDArray[np.float64],
    lon: NDArray[np.float64],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    config: GeocoderConfig,
    cache_file: Path,
    seed: int,
    language: str | None = None,
) -> tuple[list[GeocoderAnswer | None], list[str]]:
    """Answers for N places and their sources: the service's name, or "neighbour" for those filled from the nearest.

    `config.share` of the places is drawn by seed, whatever their order, and queried; a place without an answer takes that of
    the nearest place that has one within MAX_FILL_M, None if there is none.

    Args:
        ids, lat, lon, x, y: (N,) names, degrees and metres of the places.
        cache_file: replies of earlier runs, which are not requested again.

    Raises:
        InputError: the service refuses us, is over its quota, keeps failing, or its key is missing.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    sample = sorted(random.Random(f"{seed}:geocoder").sample(order, max(1, round(config.share * len(order))))) if order else []
    service = SERVICES[config.service]
    url = config.url or service.url
    with closing(ReplyCache(cache_file, config.service, url, language)) as cache:
        missing = list(dict.fromkeys(rounded(lat[i], lon[i]) for i in sample if cache.get(lat[i], lon[i]) is None))
        if missing:
            _request(missing[: config.max_requests], service, url, config, cache, language)
        replies = {i: cache.get(lat[i], lon[i]) for i in sample}
    answers = [service.parse(reply) if (reply := replies.get(i)) is not None else None for i in range(len(ids))]
    answered = np.array([i for i in sample if answers[i]], dtype=np.int64)
    sources = [config.service if answer else "neighbour" for answer in answers]
    others = np.setdiff1d(np.arange(len(ids)), answered)
    if len(answered) and len(others):
        points = shapely.points(x, y)
        tree = shapely.STRtree(points[answered])
        filled, nearest = tree.query_nearest(points[others], max_distance=MAX_FILL_M, all_matches=False)
        for i, j in zip(others[filled], answered[nearest], strict=True):
            answers[i] = answers[j]
    return answers, sources


def _request(
    points: list[tuple[str, str]],
    service: Nominatim | Google,
    url: str,
    config: GeocoderConfig,
    cache: "ReplyCache",
    language: str | None,
) -> None:
    """Request every point and store each reply at once; points that fail for now are skipped."""
    secret, host = service.secret(), urlsplit(url).hostname or url
    limiter = RateLimiter(config.per_second)
    headers = {"User-Agent": config.user_agent, "Accept": "application/json"}
    client = HttpClient(limiter, headers, config.timeout_s, MAX_BYTES, MAX_WAIT_S, jitter=0.5)

    def request(point: tuple[str, str]) -> dict[str, Any]:
        parameters = service.parameters(*point, language) | secret
        response = client.get(url, config.retries + 1, parameters, lambda r: service.check(_json(r, host, service)))
        return _json(response, host, service)

    failures = 0
    with ThreadPoolExecutor(max(1, min(MAX_THREADS, int(config.per_second)))) as pool:
        requests = {pool.submit(request, point): point for point in points}
        try:
            for done in as_completed(requests):
                try:
                    reply = done.result()
                except UnavailableError as error:
                    failures += 1
                    if error.over_quota or failures == MAX_FAILURES:
                        raise InputError(
                            f"{host} is not available ({error}): the {len(cache):,} answers so far are in {cache.path}, rerun "
                            "the same command later, or lower city.geocoder.per_second."
                        ) from None
                else:
                    failures = 0
                    cache.put(float(requests[done][0]), float(requests[done][1]), reply)
        except BaseException:
            limiter.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _json(response: Response, host: str, service: Nominatim | Google) -> dict[str, Any]:
    """The JSON object in a response; InputError if the server refuses us or is no geocoder."""
    if response.status in (401, 403):
        raise InputError(f"{host} refuses us ({response.status}): {service.access_hint}.")
    if response.status != 200:
        raise InputError(f"{host} answers {response.status} instead of an address: check city.geocoder.url.")
    try:
        reply = json.loads(response.body)
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        html = response.content_type == "text/html" or response.body.lstrip()[:1] == b"<"
        raise InputError(
            f"{host} answers with {'a web page' if html else 'something else'} instead of JSON: check city.geocoder.url, and "
            "that there is no login page in between."
        )
    return reply


class ReplyCache:
    """An SQLite file of raw replies, one row a point and service; safe against kills and against several runs at once."""

    def __init__(self, path: Path, service: str, server: str, language: str | None) -> None:
        """Open or create the file for the replies of one service; InputError if that fails or it is something else."""
        self.path = Path(path)
        self._key = (service, server, language or "")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=60.0)  # another run may be writing
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (service TEXT, server TEXT, language TEXT, lat TEXT, lon TEXT, "
                "asked_at TEXT, reply TEXT, PRIMARY KEY (service, server, language, lat, lon))"
            )
            self._database.commit()
        except (sqlite3.Error, OSError) as error:
            raise InputError(
                f"the geocoder's answers can't be stored in {self.path} ({error}): set city.geocoder.cache to another file."
            ) from None

    def get(self, lat: float, lon: float) -> dict[str, Any] | None:
        """The reply about a point, None if it was never requested."""
        row = self._database.execute(
            "SELECT reply FROM answers WHERE service=? AND server=? AND language=? AND lat=? AND lon=?",
            (*self._key, *rounded(lat, lon)),
        ).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, lat: float, lon: float, reply: dict[str, Any]) -> None:
        """Store a reply; it is on disk when this returns."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        row = (*self._key, *rounded(lat, lon), now, json.dumps(reply, ensure_ascii=False))
        try:
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise InputError(
                f"the geocoder's answer can't be stored in {self.path} ({error}): make room, or set city.geocoder.cache to "
                "another file."
            ) from None

    def __len__(self) -> int:
        query = "SELECT count(*) FROM answers WHERE service=? AND server=? AND language=?"
        return int(self._database.execute(query, self._key).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def rounded(lat: float, lon: float) -> tuple[str, str]:
    """A point as it is requested and stored."""
    return f"{lat:.{DECIMALS}f}", f"{lon:.{DECIMALS}f}"
