import pytest
from detectron2.utils.events import EventStorage

from rethink_d2.engine.history import WINDOW, restore_scalars, save_scalars


def put(storage, iterations, groups):
    """Scalars as a training leaves them: one an iteration, one in each of its groups, a rare one."""
    for iteration in iterations:
        storage.iter = iteration
        storage.put_scalar("once", iteration**2 % 13)
        for group in range(groups):
            storage.put_scalar("grouped", (iteration + group) ** 2 % 17)
        if iteration % 15 == 0:
            storage.put_scalar("rare", iteration, smoothing_hint=False)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stop", [3, 50])
def test_smoothed_values_go_on_as_if_nothing_had_happened(groups, stop):
    with EventStorage() as unbroken:
        put(unbroken, range(stop + 7), groups)
    with EventStorage() as before:
        put(before, range(stop), groups)
    with EventStorage(stop) as after:
        restore_scalars(after, save_scalars(before))
        put(after, range(stop, stop + 7), groups)
    assert after.latest_with_smoothing_hint(WINDOW) == unbroken.latest_with_smoothing_hint(WINDOW)


def test_what_is_kept_does_not_grow():
    with EventStorage() as storage:
        put(storage, range(100), 4)
    assert {name: len(s["values"]) for name, s in save_scalars(storage).items()} == {
        "once": WINDOW,
        "grouped": 4 * WINDOW,
        "rare": 7,
    }
