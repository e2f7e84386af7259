"""The order of images, over sizes, batches and seeds."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rethink_d2.data.order import GroupOrder, mix

ORDERS = st.tuples(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 2**40))


def epoch(order, e):
    return [order.group(e * order.groups_per_epoch + k) for k in range(order.groups_per_epoch)]


@given(ORDERS, st.integers(0, 5))
def test_every_image_comes_once_in_an_epoch(args, e):
    order = GroupOrder(*args)
    groups = epoch(order, e)
    assert {len(g) for g in groups} == {args[1]}
    own = [image for group in groups for image, of in group if of == e]
    assert sorted(own) == list(range(len(args[0])))
    borrowed = [of for group in groups for _, of in group if of != e]
    assert set(borrowed) <= {e + 1} and len(borrowed) < args[1]


@given(ORDERS, st.integers(0, 200), st.integers(0, 200))
def test_a_position_does_not_depend_on_what_was_asked_before(args, first, second):
    used = GroupOrder(*args)
    used.group(first)
    assert used.group(second) == GroupOrder(*args).group(second)


@given(ORDERS)
def test_groups_are_of_one_orientation_but_for_the_leftovers(args):
    portrait, size, _ = args
    mixed = sum(len({portrait[i] for i, e in group if e == 0}) > 1 for group in epoch(GroupOrder(*args), 0))
    # At most size - 1 of each kind are left.
    assert mixed <= 2


@given(st.integers(20, 60), st.integers(0, 2**30))
def test_epochs_and_seeds_differ(images, seed):
    order, other = GroupOrder([False] * images, 2, seed), GroupOrder([False] * images, 2, seed + 1)
    assert epoch(order, 0) != [[(i, 0) for i, _ in g] for g in epoch(order, 1)]
    assert epoch(order, 0) != epoch(other, 0)


def test_the_order_is_the_same_on_every_machine_and_version():
    """A change of these numbers changes what every seed trains."""
    assert int(mix(1, 2, 3)) == 0x6AE515C1C0AC7E37
    order = GroupOrder([False, True, False, False, True, False, False], 2, seed=1)
    assert [order.group(k) for k in range(4)] == [
        [(5, 0), (0, 0)],
        [(6, 0), (2, 0)],
        [(4, 0), (1, 0)],
        [(3, 0), (4, 1)],
    ]


def test_permutations_are_even():
    order = GroupOrder([False] * 6, 1, seed=3)
    first = Counter(order.group(6 * e)[0][0] for e in range(1200))
    assert all(140 < first[i] < 260 for i in range(6))


def test_mix_broadcasts():
    assert mix(5, np.arange(3)).tolist() == [int(mix(5, k)) for k in range(3)]
    assert mix(1, 2) != mix(2, 1)
