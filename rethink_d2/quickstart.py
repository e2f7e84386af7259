"""The main job on built-in data: a small Mask R-CNN from random weights, evaluated and drawn."""

import argparse
import os
import sys
import time

from detectron2.engine import DefaultPredictor
from tabulate import tabulate

from . import model_zoo, recipe, train
from .files import read_json
from .launch import fall_back_to_cpu
from .visualize import curve_picture, detections_picture

CONFIG = "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml"
HELD_OUT = "glyphs_val"
METRICS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP")


def show(folder, cfg):
    """Print a finished run's AP and save its learning curve and some detections.

    Args:
        folder (str): the run folder.
        cfg (CfgNode): its resolved config, with its weights and HELD_OUT to test on.
    """
    results = read_json(os.path.join(folder, "results.json"))
    print(f"\nAverage precision; the last row is all of {HELD_OUT}, the others its first images")
    rows = [[r["iteration"], r["dataset"], *(r.get(m) for m in METRICS)] for r in results]
    print(tabulate(rows, headers=["iteration", "data set", *METRICS], floatfmt=".1f"))

    curve = os.path.join(folder, "ap_curve.png")
    points = [(r["iteration"], r["bbox/AP"]) for r in results if r["dataset"] != HELD_OUT]
    points = [(i, 0.0 if ap is None else ap) for i, ap in points]  # nothing detected yet
    curve_picture({"from random weights": points}, cfg.SOLVER.STEPS, curve, "box AP")
    fall_back_to_cpu(cfg)
    picture = os.path.join(folder, "detections.png")
    detections_picture(DefaultPredictor(cfg), cfg.DATASETS.TEST[0], picture)


def cli(argv=None):
    """Train, evaluate, draw; prints where everything is and what to run next."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="output/quickstart", help="run folder")
    parser.add_argument("--seed", type=int, default=1)
    args, opts = parser.parse_known_args(argv)

    start = time.monotonic()
    config = ["--config-file", model_zoo.get_config_file(CONFIG)]
    options = ["OUTPUT_DIR", args.output, "SEED", str(args.seed), *opts]
    weights = os.path.join(args.output, "model_final.pth")
    final = ["DATASETS.TEST", f"('{HELD_OUT}',)", "MODEL.WEIGHTS", weights]
    code = train.cli([*config, *options]) or train.cli(["--eval-only", *config, *options, *final])
    if code:
        return code
    minutes = (time.monotonic() - start) / 60

    show(args.output, recipe.resolve(recipe.load(config[1], [*options, *final]), 1))
    print(
        f"\nTrained and evaluated in {minutes:.1f} minutes."
        f"\n  learning curve  {args.output}/ap_curve.png"
        f"\n  detections      {args.output}/detections.png"
        f"\n  everything else {args.output}/"
        "\n\nNext, on your own GPUs and COCO (DETECTRON2_DATASETS names the folder that holds coco/):"
        "\n  .venv/bin/python train_net.py --num-gpus 8 --dry-run"
        " --config-file configs/scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml"
        "\n  the same without --dry-run trains it."
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli())
