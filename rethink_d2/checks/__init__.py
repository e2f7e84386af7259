"""What can be known to be wrong before the first iteration, each with the key to change.

Every rule is a generator of :class:`Problem`; :func:`check` runs them all, so one look shows everything.
"""

import os
import traceback

from ..modeling.inspection import build_meta, norms
from . import model, training
from .problem import Problem, Subject

__all__ = ["UNBUILDABLE", "Problem", "check"]

# The key of the problem that there is no model to look at.
UNBUILDABLE = "MODEL"


def check(cfg, world_size=1):
    """Say what in a recipe does not belong together.

    Args:
        cfg (CfgNode): a resolved config; a rule that cannot judge another one says so.
        world_size (int): number of processes that share the batch.

    Returns:
        list[Problem]: errors first; empty when nothing is wrong. Raises nothing.
    """
    problems, built = [], None
    try:
        built = build_meta(cfg)
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{type(e).__name__} in {os.path.basename(at.filename)}, {at.name}: {e or at.line}"
        what = f"the model cannot be built ({where})"
        problems.append(Problem(UNBUILDABLE, what, "correct the keys of the part that it names"))
    subject = Subject(cfg, max(1, world_size), built, norms(built) if built is not None else {})
    for rule in model.RULES + training.RULES:
        try:
            problems += rule(subject)
        except Exception as e:
            what = f"{rule.__name__.strip('_')} could not be checked ({type(e).__name__}: {e})"
            problems.append(Problem("config", what, "correct the value that it names"))
    return sorted(problems, key=lambda p: p.level != "error")
