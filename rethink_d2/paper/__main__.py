"""``python -m rethink_d2.paper``: the paper's runs and their published numbers, as a Markdown table."""

from tabulate import tabulate

from .manifest import load


def table():
    """One row per curve (family and arm), one column per schedule, each cell the published number.

    Returns:
        str: Markdown; a dash where the paper shows a picture only.
    """
    runs = load()
    schedules = list(dict.fromkeys(run.schedule for run in runs))
    curves = {}
    for run in runs:
        name = f"`{run.config.rpartition('_')[0]}_<schedule>.yaml`"
        curves.setdefault((run.figure, name), {})[run.schedule] = run.published
    rows = [
        [figure, name, *("-" if cells.get(s) is None else f"{cells[s]:.1f}" for s in schedules)]
        for (figure, name), cells in curves.items()
    ]
    return tabulate(rows, headers=["paper", "config", *schedules], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    print(table())
