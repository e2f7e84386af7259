"""``python -m rethink_d2.sweep``: everything that the paper reports, with one command.

``plan`` shows what there is to run and what it costs, ``run`` runs it, ``status`` shows how far it is, and
``stop`` ends single runs in order. docs/sweep.md has examples.
"""

import argparse
import os
import sys
from fnmatch import fnmatchcase

from rich.console import Console

from ..paper import ARMS
from ..preemption import EXIT_CODE
from . import sbatch, show
from .costs import measure
from .launch import LocalSweep, summary, write_report
from .plan import plan
from .preflight import preflight
from .process import current, hold_back, stop
from .state import State, node_state, planned, table, watch

REFUSED = 2
# Of runs that a sweep under way may be about to start.
WAITS = (State.WAITING, State.PREEMPTED, State.INTERRUPTED)


def argument_parser():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m rethink_d2.sweep", description=__doc__.replace("``", ""))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    part = argparse.ArgumentParser(add_help=False)
    part.add_argument("--only", metavar="PATTERN", action="append", default=[], help="run ids: 'base-r50-*'")
    part.add_argument("--figure", metavar="N", action="append", default=[], help="1, or 'Table 3'")
    part.add_argument("--arm", choices=ARMS)
    part.add_argument("--schedules", metavar="2x,6x", type=_words, default=[])
    part.add_argument("--seeds", metavar="N", type=int, default=1, help="every run with seeds 1 to N")
    part.add_argument("--optional", action="store_true", help="also searches and other readings of the paper")
    part.add_argument("--mini", action="store_true", help="all in miniature, on built-in data")
    part.add_argument("--one-x", metavar="N", type=int, help="of --mini: 1x, in iterations of 16 images")
    part.add_argument("--out", metavar="FOLDER", default="output", help="of the run folders (%(default)s)")
    part.add_argument("--num-gpus", metavar="N", type=int, default=1, help="per run; on Slurm, per machine")
    part.add_argument("--measured", action="store_true", help="costs from the finished runs")

    launcher = argparse.ArgumentParser(add_help=False)
    launcher.add_argument("--launcher", choices=("local", "slurm"), default="local")
    launcher.add_argument("--parallel", metavar="N", type=int, help="runs at a time, at most")
    launcher.add_argument(
        "--slurm", metavar="KEY=VALUE", action="append", default=[], help="option of sbatch"
    )
    launcher.add_argument("--dry-run", action="store_true", help="show the plan; launch nothing")

    def add(name, help, *parents):
        made = commands.add_parser(name, help=help, description=help, parents=parents)
        if parents:
            made.add_argument("opts", metavar="KEY VALUE", nargs="...", help="for all runs; last")
        return made

    graph = add("plan", "show what there is to run, and what it costs", part)
    graph.add_argument("--dot", action="store_true", help="the graph for Graphviz alone")
    add("run", "run it, until nothing can go on", part, launcher)
    status = add("status", "show how far the runs are")
    status.add_argument("out", metavar="FOLDER", nargs="?", default="output")
    status.add_argument("--watch", action="store_true", help="anew every few seconds")
    ask = add("stop", "let runs write a checkpoint and end; a later `run` goes on with them")
    ask.add_argument(
        "ids", metavar="ID", nargs="+", help="such as base-r50-gn-scratch-6x/seed1, or a pattern"
    )
    ask.add_argument("--out", metavar="FOLDER", default="output")
    return parser


def _words(text):
    return [word.strip() for word in text.split(",")]


def make_plan(args, processes):
    """The plan that the arguments select."""
    selection = {
        "only": args.only,
        "figures": args.figure,
        "arm": args.arm,
        "schedules": args.schedules,
        "seeds": args.seeds,
        "optional": args.optional,
        "mini": args.mini,
        "one_x": args.one_x,
        "num_gpus": processes,
        "options": args.opts,
    }
    out = os.path.abspath(args.out)
    nodes = plan(out, **selection)
    if not args.measured:
        return nodes
    return plan(out, **selection, measured=measure([current(node, processes) for node in nodes]))


def sbatch_options(args):
    """The options of ``--slurm``; None for another launcher."""
    if args.launcher != "slurm":
        if args.slurm:
            raise ValueError("--slurm: only with --launcher slurm")
        return None
    if args.parallel:
        raise ValueError("--parallel: not with --launcher slurm, which decides that itself")
    return sbatch.parse(args.slurm)


def run(args):
    """Check, run, report; returns the exit code."""
    slurm = sbatch_options(args)
    out = os.path.abspath(args.out)
    if (slurm or {}).get("gpus_per_node") == "0":
        args.opts = ["MODEL.DEVICE", "cpu", *args.opts]  # with several processes the norm depends on it
    nodes = make_plan(args, args.num_gpus * sbatch.machines(slurm or {}))
    if args.dry_run:
        return show_plan(nodes)
    problems = preflight(out, nodes, num_gpus=args.num_gpus, slurm=slurm)
    if problems:
        print("Nothing was started:", *problems, sep="\n- ", file=sys.stderr)
        return REFUSED
    if slurm is None:
        sweep = LocalSweep(out, nodes, num_gpus=args.num_gpus, parallel=args.parallel)
    else:
        from .slurm import SlurmSweep  # here, because it takes submitit along

        sweep = SlurmSweep(out, nodes, num_gpus=args.num_gpus, options=slurm)
    text, code = summary(out, nodes, sweep.run())
    print(text, flush=True)
    if code == EXIT_CODE:
        return code
    reported = write_report(out)
    return code or reported


def show_plan(nodes, dot=False):
    """Print the plan."""
    if dot:
        print(show.dot(nodes))
        return 0
    print(f"{show.tree(nodes)}\n-> report", show.table(nodes), show.summary(nodes), sep="\n\n")
    return 0


def show_status(args):
    """Print how the runs stand, once or until all are finished."""
    if args.watch:
        watch(args.out, Console())
    else:
        # A file or a pipe has no width of its own: there every run is one line.
        Console(width=None if sys.stdout.isatty() else 160).print(table(args.out)[0])
    return 0


def stop_runs(args):
    """Stop what runs of the runs that are named, and hold back what waits; returns 1 where nothing does."""
    nodes, stopped = planned(args.out), 0
    for id in args.ids:
        fitting = [node for node in nodes if fnmatchcase(node.id, id) or fnmatchcase(node.run.id, id)]
        if not fitting:
            raise ValueError(f"{id}: {args.out} has no such run; `status {args.out}` lists them")
        for node in fitting:
            try:
                print(stop(args.out, node.id))
                stopped += 1
            except ValueError as e:
                if node_state(args.out, node) in WAITS:
                    hold_back(os.path.join(args.out, node.id))
                    print(f"{node.id}: does not run; sweeps that are under way will not start it")
                    stopped += 1
                else:
                    print(f"error: {e}", file=sys.stderr)
    return 0 if stopped else 1


def cli(argv=None):
    """The command line.

    Returns:
        int: 0; 1 where runs have failed or have other settings now, or there was nothing to stop; 2 for an
        error in what was asked for (jobs that Slurm has by then stay in its queue); 75 where the sweep or a
        run was stopped, and the same command goes on.
    """
    args = argument_parser().parse_args(argv)
    try:
        for option in ("num_gpus", "parallel"):
            if (number := getattr(args, option, None)) is not None and number < 1:
                raise ValueError(f"--{option.replace('_', '-')} {number}: at least 1 is needed")
        if args.command == "plan":
            return show_plan(make_plan(args, args.num_gpus), args.dot)
        return {"run": run, "status": show_status, "stop": stop_runs}[args.command](args)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(cli())
