"""The paper's Figure 1 in miniature, on built-in data: both arms, three schedules, their table and pictures.

A classifier of single characters is the pre-training. A small Faster R-CNN then learns to find other ones in
pictures, from random weights and from the classifier's, for 2x, 4x and 6x. ``--figure 8`` does the same for
the breakdown with few images (paper, section 5.2). Both are parts of ``python -m rethink_d2.sweep run
--mini``, trained for longer.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass

from detectron2.engine import DefaultPredictor
from tabulate import tabulate

from .launch import fall_back_to_cpu
from .paper import ARMS
from .report.runs import find_runs
from .report.verdicts import verdicts
from .sweep.launch import LocalSweep, summary, write_report
from .sweep.plan import plan, resolved
from .sweep.preflight import preflight
from .visualize import detections_picture

# One for each arm.
PARALLEL = 2
REFUSED = 2


@dataclass(frozen=True)
class Miniature:
    """What a figure needs: 1x in iterations of 16 images, a folder, schedules, and options for all runs."""

    one_x: int
    output: str
    schedules: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


FIGURES = {
    "1": Miniature(
        72,
        "output/quickstart",
        ("2x", "4x", "6x"),
        # Boxes alone halve the time. Frozen, as in the paper, the first layers of so short a pre-training
        # hold the arm back at the end.
        ("MODEL.MASK_ON", "False", "MODEL.BACKBONE.FREEZE_AT", "0"),
    ),
    # Shorter, the pre-trained arm has not learned its few images yet.
    "8": Miniature(2250, "output/breakdown", options=("MODEL.MASK_ON", "False", "TEST.EVAL_PERIOD", "300")),
}


def table(runs, nodes):
    """Final box AP and training loss of both arms, means over seeds, and the gap, by schedule.

    Args:
        runs (Runs): of the output folder.
        nodes (list[Node]): the finished runs that count. With few images each arm has a schedule of its own.
    """
    ends = {arm: {} for arm in ARMS}
    for node in sorted(nodes, key=lambda node: node.start + node.iterations):
        if node.kind != "pretrain":
            [folder] = [folder for folder in runs.seeds(node.run) if folder.seed == node.seed]
            *_, loss = runs.losses(folder).values()
            end = folder.final.metrics["bbox/AP"], loss
            ends[node.run.arm].setdefault(node.run.schedule, []).append(end)
    rows = []
    for pair in zip(*(ends[arm].items() for arm in ARMS), strict=True):
        schedules = dict.fromkeys(schedule for schedule, _ in pair)
        aps, losses = zip(
            *(map(statistics.fmean, zip(*seeds, strict=True)) for _, seeds in pair), strict=True
        )
        rows.append([" / ".join(schedules), *aps, aps[1] - aps[0], *losses])
    what = [f"{name}\n{arm}" for name in ("box AP", "loss") for arm in ARMS.values()]
    digits = ("", ".1f", ".1f", ".1f", ".2f", ".2f")
    return tabulate(rows, headers=["schedule", *what[:2], "gap", *what[2:]], floatfmt=digits)


def picture(nodes, path):
    """Draw what the longest training from random weights detects."""
    longest = max(
        (node for node in nodes if node.run.arm == "scratch"), key=lambda node: node.start + node.iterations
    )
    cfg = resolved(longest, 1)
    cfg.MODEL.WEIGHTS = os.path.join(longest.folder, "model_final.pth")
    fall_back_to_cpu(cfg)
    detections_picture(DefaultPredictor(cfg), cfg.DATASETS.TEST[0], path)


def argument_parser():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.quickstart", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--figure", choices=FIGURES, default="1", help="8: the breakdown with few images")
    output = "of the run folders (output/quickstart; of figure 8 output/breakdown)"
    parser.add_argument("--output", metavar="FOLDER", help=output)
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", metavar="K", type=int, default=1, help="this one alone (1)")
    seeds.add_argument("--seeds", metavar="N", type=int, help="seeds 1 to N, and their mean")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="...", help="for all runs; last")
    return parser


def main(args):
    """Run what is missing, print, draw, report; returns the exit code."""
    mini, start = FIGURES[args.figure], time.monotonic()
    if args.seed < 1:
        raise ValueError(f"--seed {args.seed}: seeds are at least 1")
    out = os.path.abspath(args.output or mini.output)
    nodes = plan(
        out,
        figures=[args.figure],
        schedules=mini.schedules,
        seeds=args.seed if args.seeds is None else args.seeds,
        mini=True,
        one_x=mini.one_x,
        options=[*mini.options, *args.opts],
    )
    if args.seeds is None:
        nodes = [node for node in nodes if node.seed == args.seed]
    problems = preflight(out, nodes)
    if problems:
        raise ValueError("\n- ".join(["nothing was started:", *problems]))
    text, code = summary(out, nodes, LocalSweep(out, nodes, parallel=PARALLEL).run())
    print(text, flush=True)
    if code:
        return code
    detections = os.path.join(out, "detections.png")
    picture(nodes, detections)
    runs = find_runs(out, mini.one_x)
    print(f"\n{table(runs, nodes)}\n")
    for verdict in verdicts(runs):
        print(*filter(None, (verdict.loss_sentence, verdict.sentence)), sep="; ")
    print(f"\n{detections}", flush=True)
    code = write_report(out)  # which prints its page
    print(
        f"\nThat took {(time.monotonic() - start) / 60:.1f} minutes."
        "\n\nNext, on your own GPUs and COCO (DETECTRON2_DATASETS names the folder that holds coco/):"
        f"\n  scripts/run_all.sh --figure {args.figure} --dry-run"
        "\n  the same without --dry-run trains both arms in full size."
    )
    return code


def cli(argv=None):
    """The command line; returns the exit codes of ``python -m rethink_d2.sweep``."""
    try:
        return main(argument_parser().parse_args(argv))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(cli())
