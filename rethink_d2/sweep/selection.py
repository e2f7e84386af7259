"""Which of the paper's runs a sweep is asked for."""

from fnmatch import fnmatchcase

from .. import paper

__all__ = ["select"]


def select(only, figures, arm, schedules, optional):
    """The runs of the manifest that fit, in its order; an analysis has nothing to run.

    Args:
        only, figures, arm, schedules, optional: as :func:`rethink_d2.sweep.plan.plan`.

    Returns:
        list[Run]: at least one.

    Raises:
        ValueError: nothing fits a filter, or all of them.
    """
    runs = [run for run in paper.load() if run.config]
    figures = [f"Fig {figure}" if str(figure).isdecimal() else str(figure) for figure in figures]
    filters = {
        "--only": (only, lambda run, pattern: fnmatchcase(run.id, pattern)),
        "--figure": (figures, lambda run, figure: figure in run.figure.split("; ")),
        "--arm": ([arm] if arm else [], lambda run, arm: run.arm == arm),
        "--schedules": (schedules, lambda run, schedule: schedule and run.schedule == schedule),
    }
    for option, (values, fits) in filters.items():
        for value in values:
            if not any(fits(run, value) for run in runs):
                raise ValueError(
                    f"{option} {value or repr(value)}: no run of the paper fits; "
                    "python -m rethink_d2.paper lists them all"
                )
    fitting = [
        run
        for run in runs
        if all(not values or any(fits(run, v) for v in values) for values, fits in filters.values())
    ]
    selected = [run for run in fitting if optional or not run.optional or run.id in only]
    if not selected:
        what = "fits all of these options" if not fitting else "is left without optional runs (--optional)"
        raise ValueError(f"no run {what}: {', '.join(o for o, (values, _) in filters.items() if values)}")
    return selected
