"""``python -m rethink_d2.paper [list]``: the paper's runs and their published numbers.

A Markdown table of the curves, or every row as JSON.
"""

import argparse
import dataclasses
import json
import sys
from fnmatch import fnmatchcase

from tabulate import tabulate

from .manifest import load


def table(runs=None):
    """One row per curve (family and arm): where the paper shows it, its config, the published numbers.

    Args:
        runs (Iterable[Run] or None): None for all that have a config and are not optional.

    Returns:
        str: Markdown. Numbers are box AP unless another metric is named; a dash stands for a
        picture.
    """
    if runs is None:
        runs = [run for run in load() if run.config and not run.optional]
    curves = {}
    for run in runs:
        curves.setdefault((run.family, run.arm, run.metric), []).append(run)
    rows = [[_figures(curve), _config(curve), _published(curve)] for curve in curves.values()]
    return tabulate(rows, headers=["paper", "config", "published"], tablefmt="github", disable_numparse=True)


def _figures(curve):
    return "; ".join(dict.fromkeys(figure for run in curve for figure in run.figure.split("; ")))


def _config(curve):
    name = curve[0].config
    if len(curve) > 1:
        name = name.removesuffix(f"_{curve[0].schedule}.yaml") + "_<schedule>.yaml"
    return f"`{name}`" if name else curve[0].family


def _published(curve):
    numbers = ", ".join(
        f"{run.schedule} {'-' if run.published is None else format(run.published, '.1f')}".strip()
        for run in curve
    )
    metric = curve[0].metric
    return numbers if metric in ("", "bbox/AP") else f"{metric}: {numbers}"


def select(runs, args):
    """Those runs that fit the filters given on the command line.

    Args:
        runs (Iterable[Run]): to choose from.
        args (Namespace): ``family``, ``arm``, ``figure``, ``kind``: patterns, or None for any.

    Returns:
        list[Run]: in the given order. A family's pattern may also fit the id, a figure's one of several.
    """
    wanted = {
        "family": lambda run: (run.family, run.id),
        "arm": lambda run: (run.arm,),
        "figure": lambda run: run.figure.split("; "),
        "kind": lambda run: (run.kind,),
    }
    patterns = [(getattr(args, name), names) for name, names in wanted.items() if getattr(args, name)]
    return [
        run
        for run in runs
        if all(any(fnmatchcase(name, pattern) for name in names(run)) for pattern, names in patterns)
    ]


def list_runs(args):
    """Print the table, or JSON."""
    runs = select(load(), args)
    if not runs:
        print("error: no run fits these filters", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=1))
    else:
        print(table(runs if args.family or args.arm or args.figure or args.kind else None))
    return 0


def argument_parser():
    """The sub-commands and their options; ``list`` may be left out."""
    parser = argparse.ArgumentParser(prog="python -m rethink_d2.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the runs and their published numbers (the default)")
    listing.set_defaults(function=list_runs)
    listing.add_argument("--family", metavar="PATTERN", help='family or id, e.g. "base-*" or "*-scratch-6x"')
    listing.add_argument("--arm", metavar="PATTERN", help="scratch or pretrained")
    listing.add_argument("--figure", metavar="PATTERN", help='where the paper shows it, e.g. "Fig 5"')
    listing.add_argument("--kind", metavar="PATTERN", help="train, cascade, evaluate, pretrain, search, ...")
    listing.add_argument("--json", action="store_true", help="every column, optional runs included")
    return parser


def cli(argv=None):
    """The command line.

    Returns:
        int: 0, or 2 where nothing fits the filters.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("--") and argv[0] != "--help":
        argv = ["list", *argv]
    args = argument_parser().parse_args(argv)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(cli())
