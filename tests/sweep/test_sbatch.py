import math

import pytest

from rethink_d2.sweep.sbatch import hours, limit, machines, parse


def test_options_are_sbatch_s_long_ones():
    options = parse(["cpus-per-task=8", "time=0.5", "gres=gpu:a=b", "nodes=2"])
    assert options == {"cpus_per_task": "8", "time": "0.5", "gres": "gpu:a=b", "nodes": "2"}
    assert (hours(options), machines(options)) == (0.5, 2)
    assert (hours({}), machines({})) == (24, 1)


@pytest.mark.parametrize(
    "item",
    [
        "partition",
        "time=24:00:00",
        "time=0.001",
        "time=nan",
        "time=inf",
        "time=",
        "nodes=two",
        "nodes=0",
        "nodes=-1",
    ],
)
def test_values_without_sense_are_refused_by_name(item):
    with pytest.raises(ValueError, match=f"--slurm {item}: "):
        parse(["partition=gpu", item])


@pytest.mark.parametrize(
    "text, expected",
    [("infinite", math.inf), ("30:00", 0.5), ("6:00:00", 6), ("2-12:00:00", 60), ("n/a", math.inf)],
)
def test_limits_as_sinfo_shows_them(text, expected):
    assert limit(text) == expected
