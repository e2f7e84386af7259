"""The options of ``--slurm``: those that this project reads itself; sbatch judges the others."""

import math

__all__ = ["hours", "limit", "machines", "parse"]

DEFAULT_HOURS = "24"


def parse(items):
    """Read and check ``KEY=VALUE`` texts.

    Args:
        items (list[str]): such as ``["partition=gpu", "time=24"]``.

    Returns:
        dict[str, str]: value by sbatch's long option, with underscores.

    Raises:
        ValueError: an option that is no such text, or has a value that makes no sense; names it.
    """
    for item in items:
        if "=" not in item:
            raise ValueError(f"--slurm {item}: write KEY=VALUE, such as partition=gpu")
    options = {key.replace("-", "_"): value for key, _, value in (item.partition("=") for item in items)}
    hours(options)
    machines(options)
    return options


def hours(options):
    """The time limit of a job.

    Raises:
        ValueError: it is not a number, or less than Slurm's smallest.
    """
    text = options.get("time", DEFAULT_HOURS)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 / 60 <= value < math.inf:
        raise ValueError(f"--slurm time={text}: give hours, such as 24 or 0.5, and at least a minute (0.017)")
    return value


def machines(options):
    """On how many machines a run is.

    Raises:
        ValueError: it is no whole number.
    """
    text = str(options.get("nodes", 1))
    if not text.isdecimal() or not int(text):
        raise ValueError(f"--slurm nodes={text}: give the number of machines of each run, such as 2")
    return int(text)


def limit(text):
    """The hours of a time limit as sinfo shows it: ``1-00:00:00``, ``30:00`` for minutes, or ``infinite``."""
    if not text[:1].isdigit():
        return math.inf
    days, _, clock = text.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = 60 * seconds + int(part)
    return 24 * int(days or 0) + seconds / 3600
