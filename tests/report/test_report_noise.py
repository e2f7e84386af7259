import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rethink_d2.report.noise import difference, mean, signed, t_quantile

VALUES = st.lists(st.floats(0, 100), min_size=2, max_size=6)


@pytest.mark.parametrize(
    "freedom, confidence, expected",
    # Of the usual printed tables; the last one is of the normal distribution, nearly.
    [
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (3, 0.95, 3.182),
        (4, 0.95, 2.776),
        (10, 0.95, 2.228),
        (30, 0.95, 2.042),
        (4, 0.99, 4.604),
        (2, 0.90, 2.920),
        (1000, 0.95, 1.962),
    ],
)
def test_quantiles_of_students_t(freedom, confidence, expected):
    assert t_quantile(freedom, confidence) == pytest.approx(expected, abs=6e-4)


def test_quantiles_between_whole_degrees_of_freedom():
    assert t_quantile(3) < t_quantile(2.5) < t_quantile(2)


def test_mean_and_noise():
    assert mean([]) is None
    assert mean([41.0]).noise is None
    found = mean([40.0, 41.0, 42.0])
    assert (found.value, found.noise, found.seeds) == (41.0, 1.0, 3)


def test_welchs_interval_by_hand():
    # Variances of the means 1/3 and 4/3: 5/3 squared over (1/9 + 16/9) / 2 are 2.941 degrees of freedom.
    found = difference([40, 41, 42], [38, 40, 42])
    assert found.value == pytest.approx(1.0)
    assert found.margin == pytest.approx(t_quantile(50 / 17) * math.sqrt(5 / 3))
    # Equal variances: the ordinary test with four degrees of freedom.
    assert difference([40, 41, 42], [40, 41, 42]).margin == pytest.approx(
        2.77645 * math.sqrt(2 / 3), rel=1e-5
    )


def test_one_seed_has_no_interval():
    assert difference([41.0], [40.0, 42.0]).margin is None
    assert difference([], [40.0]) is None
    assert str(difference([41.0], [40.8])) == "+0.2, one seed: no interval"


def test_words():
    assert str(difference([41.0, 41.0], [40.5, 40.5])) == "+0.5 ± 0.0, 2 seeds"
    assert "3 and 2 seeds" in str(difference([1, 2, 3], [1, 2]))
    assert signed(-0.04) == "+0.0" and signed(-0.06) == "-0.1"


@given(VALUES, VALUES)
def test_the_difference_turned_round_has_the_same_interval(one, other):
    there, back = difference(one, other), difference(other, one)
    assert there.value == pytest.approx(-back.value)
    assert there.margin == pytest.approx(back.margin) and there.margin >= 0
