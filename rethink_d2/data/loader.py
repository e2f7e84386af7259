"""From registered data sets to batches."""

import logging
import math
from collections import Counter

from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.structures import BoxMode
from detectron2.utils import comm

from .mapper import build_mapper

logger = logging.getLogger(__name__)


def drop_unusable(records):
    """Leave out boxes without an area in the image and count what a data set holds.

    Args:
        records (list[dict]): images in Detectron2's data set format; not changed.

    Returns:
        list[dict], Counter: the images, those with such boxes as copies without them; the numbers
        of images, instances, crowd regions, zero-size boxes and images without annotations.
    """
    kept, counts = [], Counter()
    for record in records:
        annotations = [a for a in record.get("annotations", []) if _has_area(a, record)]
        dropped = len(record.get("annotations", [])) - len(annotations)
        crowds = sum(a.get("iscrowd", 0) for a in annotations)
        counts.update(
            {
                "images": 1,
                "instances": len(annotations) - crowds,
                "crowd regions": crowds,
                "zero-size boxes left out": dropped,
                "images without annotations": not annotations,
            }
        )
        kept.append({**record, "annotations": annotations} if dropped else record)
    return kept, counts


def _has_area(annotation, record):
    """Whether anything of the box is left within the image."""
    x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    width, height = record.get("width", math.inf), record.get("height", math.inf)
    return min(x1, width) > max(x0, 0) and min(y1, height) > max(y0, 0)


def training_records(cfg):
    """The images that ``cfg`` trains on, counted in the log.

    Raises:
        ValueError: nothing to train on is left.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=False, min_keypoints=keypoints, check_consistency=False
    )
    records, counts = drop_unusable(records)
    logger.info("%s: %s", ", ".join(cfg.DATASETS.TRAIN), ", ".join(f"{v} {k}" for k, v in counts.items()))
    # Image classification has no annotations to be empty.
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and any("annotations" in r for r in records):
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(
            f"DATASETS.TRAIN: no image of {', '.join(cfg.DATASETS.TRAIN)} has an object to train on"
        )
    return records


def count_images(name):
    """Number of images of a registered data set, without generating or reading it where it says so."""
    declared = MetadataCatalog.get(name).get("num_images", None)
    return len(DatasetCatalog.get(name)) if declared is None else declared


def build_train_loader(cfg, records):
    """Groups of images for one process, without end.

    Returns:
        iterable[list[dict]]: each a group of ``SOLVER.IMS_PER_GROUP`` samples of like orientation.
    """
    return build_detection_train_loader(
        cfg,
        dataset=records,
        mapper=build_mapper(cfg, True),
        total_batch_size=cfg.SOLVER.IMS_PER_GROUP * comm.get_world_size(),
    )


def build_test_loader(cfg, name):
    """Detectron2's test loader for the data set `name`."""
    return build_detection_test_loader(cfg, name)
