"""``python -m rethink_d2.benchmarks WHAT``: one benchmark, or ``all`` of them with their defaults."""

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys

from .. import benchmarks
from .common import environment, table

# Every module here but these is a benchmark: add_arguments(parser) and run(args) -> [Result].
_SHARED = ("common",)
NAMES = sorted({m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name[0] != "_"} - set(_SHARED))


def cli(argv=None):
    """The command line.

    Returns:
        int: 0; it exits with 2 where something is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m rethink_d2.benchmarks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="every value instead of a table")
    commands = parser.add_subparsers(dest="name", required=True)
    for name in NAMES:
        module = importlib.import_module(f"{benchmarks.__name__}.{name}")
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        command.add_argument("--repeats", type=int, default=5)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    commands.add_parser("all", help="each of these, with its defaults")
    args = parser.parse_args(argv)
    runs = [parser.parse_args([name]) for name in NAMES] if args.name == "all" else [args]
    try:
        results = [result for run in runs for result in run.run(run)]
    except ValueError as e:
        parser.exit(2, f"error: {e}\n")
    if args.json:
        values = [{**dataclasses.asdict(r), "ratio": r.ratio} for r in results]
        print(json.dumps({"environment": environment(), "results": values}, indent=1))
    else:
        print(", ".join(f"{k} {v}" for k, v in environment().items()))
        print(f"\n{table(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli())
