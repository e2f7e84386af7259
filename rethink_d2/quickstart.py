"""The paper's Figure 1 in miniature, on built-in data: both arms, three schedules, their table and pictures.

A classifier of single characters is the pre-training. A small Faster R-CNN then learns to find other ones in
pictures, from random weights and from the classifier's, for 2x, 4x and 6x. ``--figure 8`` does the same for
the breakdown with few images (paper, section 5.2). Both are parts of ``python -m rethink_d2.sweep run
--mini``, trained for longer.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass

from detectron2.engine import DefaultPredictor
from tabulate import tabulate

from . import recipe
from .files import read_json
from .launch import fall_back_to_cpu
from .sweep.launch import LocalSweep, summary, write_report
from .sweep.plan import plan
from .sweep.preflight import preflight
from .visualize import curve_picture, detections_picture

ARMS = {"scratch": "from random weights", "pretrained": "pre-trained"}
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


def ap_points(folder):
    """A run's evaluations: iteration and box AP, 0 where nothing was detected yet."""
    rows = read_json(os.path.join(folder, "results.json"))
    return [(row["iteration"], row["bbox/AP"] or 0.0) for row in rows]


def loss_points(folder):
    """A run's training: iteration and total loss, the median of the last 20 iterations."""
    with open(os.path.join(folder, "metrics.json")) as f:
        rows = [json.loads(line) for line in f]
    return [(row["iteration"] + 1, row["total_loss"]) for row in rows if "total_loss" in row]


def mean_points(nodes, read):
    """What `read` gives for the folder of each node, which differ in their seeds, averaged."""
    return [
        (points[0][0], statistics.fmean(value for _, value in points))
        for points in zip(*(read(node.folder) for node in nodes), strict=True)
    ]


def by_schedule(nodes):
    """Detection runs by arm and schedule.

    Returns:
        dict[str, dict[str, list[Node]]]: the nodes of all seeds, shortest schedules first.
    """
    found = {arm: {} for arm in ARMS}
    for node in sorted(nodes, key=lambda node: (node.start + node.iterations, node.seed)):
        if node.kind != "pretrain":
            found[node.run.arm].setdefault(node.run.schedule, []).append(node)
    return found


def table(arms):
    """Final box AP and training loss of both arms, and the gap, one row for each pair of schedules.

    Args:
        arms (dict): from :func:`by_schedule`. With few images each arm has a schedule of its own.
    """
    rows = []
    for pair in zip(*(arms[arm].items() for arm in ARMS), strict=True):
        schedules = dict.fromkeys(schedule for schedule, _ in pair)
        aps = [mean_points(nodes, ap_points)[-1][1] for _, nodes in pair]
        losses = [mean_points(nodes, loss_points)[-1][1] for _, nodes in pair]
        rows.append([" / ".join(schedules), *aps, aps[1] - aps[0], *losses])
    what = [f"{name}\n{arm}" for name in ("box AP", "loss") for arm in ARMS.values()]
    digits = ("", ".1f", ".1f", ".1f", ".2f", ".2f")
    return tabulate(rows, headers=["schedule", *what[:2], "gap", *what[2:]], floatfmt=digits)


def curves(arms, read):
    """Every arm's schedules as one broken line, by the arm's name; for :func:`curve_picture`.

    Pre-training comes first, and so has the colour that it has in the report.
    """
    gap = (float("nan"), float("nan"))
    return {
        name: [point for nodes in arms[arm].values() for point in (*mean_points(nodes, read), gap)]
        for arm, name in reversed(ARMS.items())
    }


def config(node, *options):
    """A node's resolved config, with more options."""
    return recipe.resolve(recipe.load(node.config_file, [*node.options, *options]), 1)


def pictures(arms, out):
    """Draw curves, and what the longest training from random weights detects; returns the files."""
    of_one_seed = [nodes[0] for schedules in arms.values() for nodes in schedules.values()]
    drops = sorted({step for node in of_one_seed for step in config(node).SOLVER.STEPS})
    files = [os.path.join(out, name) for name in ("ap_curve.png", "loss_curve.png", "detections.png")]
    curve_picture(curves(arms, ap_points), drops, files[0], "box AP on held-out images")
    curve_picture(curves(arms, loss_points), drops, files[1], "training loss")
    longest = list(arms["scratch"].values())[-1][0]
    cfg = config(longest, "MODEL.WEIGHTS", os.path.join(longest.folder, "model_final.pth"))
    fall_back_to_cpu(cfg)
    detections_picture(DefaultPredictor(cfg), cfg.DATASETS.TEST[0], files[2])
    return files


def argument_parser():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.quickstart", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--figure", choices=FIGURES, default="1", help="8: the breakdown with few images")
    parser.add_argument("--output", metavar="FOLDER", help="of the run folders (output/quickstart)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", metavar="K", type=int, default=1, help="this one alone (1)")
    seeds.add_argument("--seeds", metavar="N", type=int, help="seeds 1 to N, and their mean")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="...", help="for all runs; last")
    return parser


def main(args):
    """Run what is missing, print, draw, report; returns the exit code."""
    mini, start = FIGURES[args.figure], time.monotonic()
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
    arms = by_schedule(nodes)
    print(f"\n{table(arms)}\n", *pictures(arms, out), sep="\n", flush=True)
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
