"""The settings that the paper's runs must have, one row each in settings.csv beside this file."""

import csv
import dataclasses
import functools
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from .manifest import Run

_CSV = Path(__file__).with_name("settings.csv")


# Compared by identity: `value` may be a list.
@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """One key that some runs must have at one value.

    Attributes:
        group: heading that it stands under.
        scope: which runs it is about: patterns of ``family/arm/kind``, separated by spaces, of which one
            must fit. Parts at the end may be left out; a pattern after ``!`` must not fit.
        key: dotted config key.
        value: what it must be; where the config holds no list but this is one, one of these.
        what: what the paper or Detectron says, in words.
        source: where it says so; "" if it does not.
        choice: what this project decided and why; "" where nothing is left open.
    """

    group: str
    scope: str
    key: str
    value: object
    what: str
    source: str
    choice: str

    def __str__(self):
        return f"{self.key} = {self.value!r} [{self.scope}]"

    def about(self, run: Run) -> bool:
        """Whether a run is in scope."""
        names = (run.family, run.arm, run.kind)

        def fits(pattern):
            return all(map(fnmatchcase, names, pattern.split("/")))

        words = self.scope.split()
        return any(fits(w) for w in words if w[0] != "!") and not any(
            fits(w[1:]) for w in words if w[0] == "!"
        )

    def allows(self, value: object) -> bool:
        """Whether a config's value, with lists for tuples, is right."""
        if isinstance(self.value, list) and not isinstance(value, list):
            return value in self.value
        return value == self.value


@functools.cache
def load() -> tuple[Setting, ...]:
    """All settings, in the order of the file: from the general to the particular."""
    with open(_CSV, newline="", encoding="utf-8") as f:
        return tuple(Setting(**{**row, "value": yaml.safe_load(row["value"])}) for row in csv.DictReader(f))


@functools.cache
def of(run: Run) -> dict[str, Setting]:
    """What a run must have: of the rows about a key, the last one.

    Returns:
        by key; empty for an analysis, and for a search, whose config is another run's.
    """
    if not run.config or run.kind == "search":
        return {}
    return {setting.key: setting for setting in load() if setting.about(run)}
