"""Draw detections on images: ``python -m rethink_d2.predict --config-file ... --input a.jpg``."""

import argparse
import os
import sys

import cv2
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from . import recipe
from .launch import fall_back_to_cpu
from .modeling.safe_weights import SafeCheckpointer
from .visualize import draw_detections


def cli(argv=None):
    """The command line.

    Returns:
        int: 0, or 2 where an argument or a file is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.predict", description="Draw a model's detections on images."
    )
    parser.add_argument("--config-file", required=True, help="the model's config")
    parser.add_argument("--input", nargs="+", required=True, help="image files")
    parser.add_argument("--output", default="output/predictions", help="folder for the pictures")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score drawn (0-1)")
    parser.add_argument("--weights", required=True, help="a checkpoint of this project or of Detectron2")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    args = parser.parse_args(argv)
    try:
        cfg = recipe.load(args.config_file, args.opts)
        if not os.path.isfile(args.weights) and "://" not in args.weights:
            raise ValueError(f"--weights {args.weights}: no such file")
        cfg.MODEL.WEIGHTS = ""
        fall_back_to_cpu(cfg)
        predictor = DefaultPredictor(cfg)
        SafeCheckpointer(predictor.model).load(args.weights)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    os.makedirs(args.output, exist_ok=True)
    unreadable = 0
    for path in args.input:
        image = cv2.imread(path)
        if image is None:
            print(f"error: --input {path}: not an image that can be read", file=sys.stderr)
            unreadable += 1
            continue
        instances = predictor(image)["instances"]
        instances = instances[instances.scores > args.threshold]
        target = os.path.join(args.output, os.path.basename(path))
        cv2.imwrite(target, draw_detections(image, instances, metadata))
        print(f"{target}: {len(instances)} detections")
    return 2 if unreadable else 0


if __name__ == "__main__":
    sys.exit(cli())
