"""``python -m rethink_d2.paper``: the paper's runs, its configs checked, what follows from its results.

``list`` prints a Markdown table of the curves, or every row as JSON; ``check`` holds the configs against the
paper; ``fidelity``, ``samples`` and ``localization`` print docs/fidelity.md, Figure 2 and section 5.1's AP75.
"""

import argparse
import dataclasses
import json
import sys
from fnmatch import fnmatchcase

from tabulate import tabulate

from . import fidelity, localization, samples
from .check import examine
from .lines import resolved
from .manifest import find, load


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


def check_configs(args):
    """Print every line and what breaks it, as text or JSON; 1 if anything does."""
    results = examine()
    violations = [violation for _, _, found in results for violation in found]
    if args.json:
        rows = [
            {
                "line": line.name,
                "what": line.what,
                "source": line.source,
                "runs": len(runs),
                "violations": len(found),
            }
            for line, runs, found in results
        ]
        print(json.dumps({"lines": rows, "violations": list(map(dataclasses.asdict, violations))}, indent=1))
    else:
        for line, runs, found in results:
            print(f"{'FAIL' if found else 'OK':<4} {len(runs):3} runs  {line.name}")
        for violation in violations:
            print(violation)
        print(f"{len(results)} lines, {len(violations)} violations")
    return 1 if violations else 0


def print_fidelity(args):
    """Print docs/fidelity.md."""
    print(fidelity.document())
    return 0


def print_samples(args):
    """Print Figure 2 by the paper's arithmetic and by the configs'."""
    coco = samples.count(resolved(find("base-r50-gn-scratch-6x"))) if args.count else samples.COCO
    readings = {"the paper's arithmetic": samples.paper_reading()}
    readings["the configs'" + (", COCO counted" if args.count else "")] = samples.configs_reading(coco=coco)
    print(samples.table(readings))
    return 0


def print_localization(args):
    """Print the difference in box AP75 between the arms of finished runs."""
    results = localization.localization(args.folder)
    if not any(result.scratch or result.pretrained for result in results):
        print(f"error: {args.folder} holds no finished run of base-r50-gn or base-r101-gn", file=sys.stderr)
        return 2
    print(localization.table(results))
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
    checking = commands.add_parser("check", help="whether the configs are the paper's; exit code 1 if not")
    checking.set_defaults(function=check_configs)
    checking.add_argument("--json", action="store_true", help="lines and violations as JSON")
    document = commands.add_parser("fidelity", help="every setting with its source: docs/fidelity.md")
    document.set_defaults(function=print_fidelity)
    figure = commands.add_parser("samples", help="Figure 2: images, instances and pixels seen by each arm")
    figure.set_defaults(function=print_samples)
    figure.add_argument("--count", action="store_true", help="count COCO's train2017 instead of assuming it")
    ap75 = commands.add_parser("localization", help="section 5.1: box AP75 of finished runs")
    ap75.set_defaults(function=print_localization)
    ap75.add_argument("folder", metavar="OUT", help="holds <run id>/seed<k>/results.json")
    return parser


def cli(argv=None):
    """The command line.

    Returns:
        int: 0; 1 where the configs are not the paper's; 2 where there is nothing to print, or input is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("--") and argv[0] != "--help":
        argv = ["list", *argv]
    args = argument_parser().parse_args(argv)
    try:
        return args.function(args)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli())
