"""What a check of the configs consists of: lines to hold against runs, and what breaks them."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator

from torch import nn

from .. import model_zoo, recipe
from ..modeling.inspection import build_meta
from . import manifest
from .manifest import Run

__all__ = ["Line", "Subject", "Subjects", "Violation", "resolved"]


@dataclasses.dataclass(frozen=True)
class Violation:
    """One line that one run breaks.

    Attributes:
        line: name of the line.
        run: id of the run.
        message: what is wrong.
        source: who says so.
    """

    line: str
    run: str
    message: str
    source: str

    def __str__(self):
        return f"{self.run}: {self.message} ({self.source})"


@functools.cache
def _resolved(config):
    cfg = recipe.resolve(recipe.load(model_zoo.get_config_file(config), []))
    cfg.freeze()
    return cfg


def resolved(run: Run):
    """The resolved config of a run, frozen."""
    return _resolved(run.config)


class Subject:
    """A run as the lines see it.

    Attributes:
        run (Run): the row of the manifest.
        cfg (CfgNode): its resolved config.
        leaves (dict): value by dotted key, with lists for tuples.
    """

    def __init__(self, run, others):
        self.run = run
        self.cfg = others.load(run)
        self.leaves = json.loads(json.dumps(recipe.flatten(self.cfg)))
        self._others = others

    def of(self, id) -> "Subject":
        """Another run."""
        return self._others.of(manifest.find(id))

    @property
    def model(self) -> nn.Module:
        """The network, on the meta device."""
        return self._others.model(self)

    @functools.cached_property
    def settings(self):
        """As :func:`rethink_d2.recipe.settings`."""
        return recipe.settings(self.cfg)

    def differences(self, other) -> dict:
        """Own and the other's value by key, of what decides on the result."""
        return recipe.differences(self.settings, other.settings)


class Subjects:
    """The subjects of one check: each config is loaded once, each network built once.

    Args:
        load (Callable): gives the resolved config of a run.
    """

    def __init__(self, load):
        self.load = load
        self.of = functools.cache(lambda run: Subject(run, self))
        self._models = {}

    def model(self, subject):
        decisive = {
            k: v for k, v in subject.leaves.items() if k.startswith("MODEL.") and k != "MODEL.WEIGHTS"
        }
        key = json.dumps(decisive)
        if key not in self._models:
            self._models[key] = build_meta(subject.cfg)
        return self._models[key]


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that is checked.

    Attributes:
        name: unique.
        what: what must hold, in words.
        source: who says so.
        applies: tells of a run whether the line is about it.
        find: yields what is wrong with a subject.
        covers: config keys that it accounts for.
    """

    name: str
    what: str
    source: str
    applies: Callable[[Run], bool]
    find: Callable[[Subject], Iterator[str]]
    covers: frozenset
