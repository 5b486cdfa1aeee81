"""What is known beforehand, as weights of addresses."""

import math

import numpy as np
import pytest
import shapely

from addressvlm import InputError
from addressvlm.gazetteer.gazetteer import Address, Gazetteer
from addressvlm.gazetteer.spatial_index import METRES_PER_DEGREE
from addressvlm.inference import Circle, Prior
from tests.support import north

STEP = 100 / METRES_PER_DEGREE  # degrees of latitude in 100 m; the city lies on the equator
ADDRESSES = [
    Address("Elm Row", "Old Town"),
    Address("Mill Street", "Harbour"),
    Address("Mill Street", "Old Town"),
    Address("Oak Avenue", "Harbour"),
]
LINES = {
    "Elm Row": shapely.LineString([(0, 3 * STEP), (STEP, 3 * STEP)]),
    "Mill Street": shapely.LineString([(0, 0), (STEP, 0)]),
}  # Oak Avenue has no shape
CITY = Gazetteer(ADDRESSES, LINES, city="Toytown", variants={"Mill Street": ["Molengasse"]})


def left(prior):
    return [a.text() for a, w in zip(CITY.addresses, prior.log_weights(CITY), strict=True) if w > -math.inf]


def test_nothing_known():
    assert np.array_equal(Prior().log_weights(CITY), np.zeros(4))


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (Prior(districts=("Harbour",)), ["Mill Street, Harbour", "Oak Avenue, Harbour"]),
        (Prior(streets=("Elm Row", "oak ave")), ["Elm Row, Old Town", "Oak Avenue, Harbour"]),
        (Prior(streets=("Molengasse",)), ["Mill Street, Harbour", "Mill Street, Old Town"]),
        (Prior(districts=("Old Town",), streets=("Mill Street",)), ["Mill Street, Old Town"]),
        (Prior(circle=Circle(STEP, 0, 101)), ["Mill Street, Harbour", "Mill Street, Old Town"]),
        (Prior(circle=Circle(STEP, 0, 201)), ["Elm Row, Old Town", "Mill Street, Harbour", "Mill Street, Old Town"]),
        (Prior(weights={"Mill Street": 0}), ["Elm Row, Old Town", "Oak Avenue, Harbour"]),
    ],
)
def test_what_is_left(prior, expected):
    assert left(prior) == expected


def test_weights_multiply_probabilities():
    weights = Prior(weights={"Mill Street": 3.0, "Elm Row": 0.5}).log_weights(CITY)
    assert np.exp(weights) == pytest.approx([0.5, 3, 3, 1])


def test_a_soft_circle_falls_with_the_distance():
    weights = Prior(circle=Circle(STEP, STEP / 2, 100, soft=True)).log_weights(CITY)
    assert weights[:3] == pytest.approx([-2, -0.5, -0.5], rel=1e-3)
    assert weights[3] == -math.inf  # it has no shape


@pytest.mark.parametrize(
    ("prior", "sentence"),
    [
        (Prior(streets=("Mil Street",)), "no street 'Mil Street' in Toytown: .*nearest is Mill Street"),
        (Prior(districts=("Atlantis",)), "no district 'Atlantis' in Toytown: .*such as Harbour, Old Town"),
        (Prior(streets=("",)), "no street ''"),
        (Prior(districts=("Harbour",), streets=("Elm Row",)), "no address of Toytown is left.*widen districts or streets"),
        (Prior(circle=Circle(1, 1, 50)), "no address of Toytown is left.*widen circle"),
        (Prior(circle=Circle(91, 0, 50)), "give latitude and longitude"),
        (Prior(circle=Circle(float("nan"), 0, 50)), "give latitude and longitude"),
        (Prior(circle=Circle(0, -180.5, 50)), "give latitude and longitude"),
        (Prior(circle=Circle(0, 0, 0)), "radius_m is 0: give metres above 0"),
        (Prior(circle=Circle(0, 0, float("inf"))), "radius_m is inf"),
        (Prior(weights={"Mill Street": 2, "mill st": 3}), "name 'Mill Street' twice, once as 'mill st'"),
        (Prior(weights={"Mill Street": -1}), "weight of 'Mill Street' is -1"),
        (Prior(weights={"Mill Street": float("nan")}), "weight of 'Mill Street' is nan"),
    ],
)
def test_what_can_be_no_prior_is_one_sentence(prior, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        prior.log_weights(CITY)
    assert str(caught.value).endswith(".")


def test_names_alike_are_proposed_three_at_most():
    names = ["Mill Street", "Mill Lane", "Mill Street North", "Mill Row", "Harbour Road", "Quay"]
    city = Gazetteer([Address(name, "Town") for name in names], city="Toytown")
    with pytest.raises(InputError, match=r"nearest is Mill Street or Mill \w+( North)? or Mill \w+( North)?\.$"):
        Prior(streets=("Mil Street",)).log_weights(city)
    with pytest.raises(InputError, match=r"such as [^,]+, [^,]+, [^,]+\.$"):
        Prior(streets=("Xyzzy",)).log_weights(city)


def test_the_likeliest_of_very_many_names_is_proposed():
    names = [f"{letter}{number} Way" for letter in "ABC" for number in range(60)]
    city = Gazetteer([Address(name, "Town") for name in ["Kirchstrasse", *names]])
    with pytest.raises(InputError, match="nearest is Kirchstrasse"):
        Prior(streets=("Krichstrasse",)).log_weights(city)


def test_a_circle_anywhere_on_earth():
    line = shapely.LineString([(179.5, -89), (179.5, -88.9)])
    city = Gazetteer([Address("Far Street", "Town"), Address("Elm Row", "Town")], {"Far Street": line})
    assert Prior(circle=Circle(-89, 179.5, 5)).log_weights(city).tolist() == [-math.inf, 0]  # sorted: Elm Row, Far Street


def test_no_circle_without_shapes():
    with pytest.raises(InputError, match="no street of the city has a shape"):
        Prior(circle=Circle(0, 0, 50)).log_weights(Gazetteer(ADDRESSES))


def test_a_circle_is_round_far_from_the_equator():
    """Sixteen streets around a place at 60 degrees north, 90 m and 110 m away in eight directions."""
    places = {
        f"{metres} {angle}": north.at(metres * math.sin(angle), metres * math.cos(angle))
        for metres in (90, 110)
        for angle in np.arange(8) * math.pi / 4
    }
    lines = {name: shapely.LineString([(lon, lat), (lon + 1e-9, lat)]) for name, (lat, lon) in places.items()}
    city = Gazetteer([Address(name, "Town") for name in places], lines)
    hard, soft = (Prior(circle=Circle(north.LAT, north.LON, 100, soft)).log_weights(city) for soft in (False, True))
    assert [w == 0 for w in hard] == [address.street.startswith("90 ") for address in city.addresses]
    metres = np.array([north.metres((north.LAT, north.LON), places[a.street]) for a in city.addresses])
    assert soft == pytest.approx(-((metres / 100) ** 2) / 2, rel=0.01)


def test_all_that_is_known_holds_together():
    parts = [
        Prior(districts=("Old Town",)),
        Prior(streets=("Mill Street", "Elm Row")),
        Prior(weights={"Mill Street": 3.0, "Elm Row": 0.5}),
        Prior(circle=Circle(STEP, STEP / 2, 100, soft=True)),
    ]
    whole = Prior(("Old Town",), ("Mill Street", "Elm Row"), parts[3].circle, parts[2].weights).log_weights(CITY)
    assert np.array_equal(whole, sum(part.log_weights(CITY) for part in parts))
    assert np.isfinite(whole).sum() == 2
