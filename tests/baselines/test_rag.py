"""What is read out of a language model's words"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addressvlm.baselines.rag import Reply, dms, parse_coordinates

CITY = (0.10, 52.19, 0.14, 52.22)  # west, south, east, north
HERE = (52.205, 0.119)


@pytest.mark.parametrize(
    "text",
    [
        '{"lat": 52.205, "lon": 0.119}',
        '```json\n{"longitude": "0.119", "latitude": "52.205"}\n```',
        "The photo was taken at latitude 52.205 and longitude 0.119.",
        "**Latitude:** 52.205° N, **Longitude:** 0.119° E",
        "lat=52.205;lng=0.119",
        "{'lat': 52.205, 'lon': 0.119}",
        "52°12'18\"N 0°07'08.4\"E",
        "52° 12′ 18″ N, 0° 7′ 8.4″ E",
        '{"lat": "52°12\'18\\"N", "lon": "0°07\'08.4\\"E"}',
        "52 degrees 12 minutes 18 seconds North, 0 degrees 7 minutes 8.4 seconds East",
        "N 52.205, E 0.119",
        "It lies South of the river: 52.205, 0.119.",
        "(52.205, 0.119)",
        "latitude 10.5, longitude 20.5 at first, but latitude 52.205, longitude 0.119 in the end.",
        "At first 10.5 N, 20.5 E, then 52.205 N, 0.119 E.",
        "First I thought of 10.5, 20.5, but the 16 similar photos within 25 m say 52.205, 0.119.",
    ],
)
def test_coordinates_in_any_dress(text: str) -> None:
    reply = parse_coordinates(text, CITY)
    assert reply.point == pytest.approx(HERE)
    assert reply.why == ""


@pytest.mark.parametrize(
    "text", ["", "I can't tell.", "There are 16 similar photos, 2 of them at 25 m.", "version 1.2.3.4, 5.6"]
)
def test_prose_without_coordinates_is_a_refusal(text: str) -> None:
    assert parse_coordinates(text, CITY).why == "refused"
    assert parse_coordinates(text, CITY).point is None


def test_swapped_and_out_of_range() -> None:
    assert parse_coordinates("[0.119, 52.205]", CITY) == parse_coordinates('{"lat": 0.119, "lon": 52.205}', CITY)
    assert (parse_coordinates("[0.119, 52.205]", CITY).point, parse_coordinates("[0.119, 52.205]", CITY).why) == (
        HERE,
        "swapped",
    )
    assert parse_coordinates("0.119, 52.205").point == (0.119, 52.205)  # elsewhere nobody can tell
    assert parse_coordinates("-122.4194, 37.7749") == parse_coordinates("-122.4194, 37.7749", CITY)
    assert parse_coordinates("-122.4194, 37.7749").point == (37.7749, -122.4194)
    assert (parse_coordinates("95.5, 200.1").point, parse_coordinates("95.5, 200.1").why) == (None, "out of range")
    assert parse_coordinates("lat 51.5 S, lon 0.1 W").point == (-51.5, -0.1)
    assert parse_coordinates("95.5, 120.5") == Reply(None, "out of range")  # neither way
    assert parse_coordinates("190.5, 50.5") == Reply(None, "out of range")
    assert parse_coordinates("95.5, 90.0") == Reply((90.0, 95.5), "swapped")
    assert parse_coordinates("-90.0, 180.0") == Reply((-90.0, 180.0))
    assert parse_coordinates("1.1, 51.3", CITY) == Reply((51.3, 1.1), "swapped")  # less than a degree from the city
    assert parse_coordinates("1.2, 51.3", CITY) == Reply((1.2, 51.3))
    assert parse_coordinates("53.21, -0.89", CITY) == Reply((53.21, -0.89))


@given(st.floats(-90, 90), st.floats(-180, 180), st.booleans())
def test_what_is_written_is_read(lat: float, lon: float, as_dms: bool) -> None:
    lat, lon = round(lat, 5), round(lon, 5)
    tolerance = 0.06 / 3600 if as_dms else 1e-9
    pair = {"lat": dms(lat, "NS"), "lon": dms(lon, "EW")} if as_dms else {"lat": f"{lat:.5f}", "lon": f"{lon:.5f}"}
    for text in (json.dumps(pair, ensure_ascii=False), json.dumps(pair), " ".join(pair.values()), ", ".join(pair.values())):
        assert parse_coordinates(text).point == pytest.approx((lat, lon), abs=tolerance)


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    reply = parse_coordinates(text, CITY)
    assert (reply.point is None) == (reply.why in ("refused", "out of range"))
