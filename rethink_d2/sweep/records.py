"""Reading what runs and sweeps have left in a folder, which may be damaged or another version's."""

import os

from ..files import read_json

__all__ = ["read", "run_record"]

_NAMES = {dict: "an object", list: "a list of objects"}


def read(path, default):
    """The JSON value in a file, which is of the same kind as `default`.

    Args:
        path (str): the file.
        default (dict or list): returned where there is none; a list holds objects.

    Raises:
        ValueError: the file is damaged, or holds something else; names it.
    """
    try:
        value = read_json(path, default)
    except ValueError as e:
        raise ValueError(f"{path} cannot be read: {e}") from e
    items = value if isinstance(default, list) and isinstance(value, list) else []
    if not isinstance(value, type(default)) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path} cannot be read: it does not hold {_NAMES[type(default)]}")
    return value


def run_record(folder):
    """What run.json says about a run; {} where it has not begun.

    Raises:
        ValueError: as :func:`read`.
    """
    path = os.path.join(folder, "run.json")
    record = read(path, {})
    states = ("running", "preempted", "failed", "done")
    if record and ("identity" not in record or record.get("state") not in states):
        raise ValueError(
            f"{path} cannot be read: it has no identity, or a state other than {', '.join(states)}"
        )
    return record
