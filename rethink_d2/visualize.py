"""Pictures of detections."""

import os

import cv2
import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.utils.visualizer import Visualizer  # noqa: E402


def draw_detections(image, instances, metadata, scale=1.0):
    """Draw predicted instances.

    Args:
        image (ndarray): H x W x 3, BGR, 0-255.
        instances (Instances): a model's output, on any device.
        metadata (Metadata): of the data set, for the class names.
        scale (float): enlargement of the picture.

    Returns:
        ndarray: (scale H) x (scale W) x 3, BGR.
    """
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale)
    return visualizer.draw_instance_predictions(instances.to("cpu")).get_image()[:, :, ::-1]


def draw_ground_truth(record, metadata, scale=1.0):
    """Draw the annotations of one image in Detectron2's data set format; returns as above."""
    image = cv2.imread(record["file_name"])
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale=scale)
    return visualizer.draw_dataset_dict(record).get_image()[:, :, ::-1]


def _without_mask(annotation):
    return {key: value for key, value in annotation.items() if key != "segmentation"}


def detections_picture(predictor, name, path, count=4, threshold=0.5):
    """Save ground truth (above) and detections (below) of the first images of a data set.

    Args:
        predictor (callable): BGR image -> ``{"instances": Instances}``, a ``DefaultPredictor``.
        name (str): a registered data set.
        path (str): the picture to write.
        count (int): number of images.
        threshold (float): lowest score drawn, 0-1.
    """
    metadata = MetadataCatalog.get(name)
    _, axes = plt.subplots(2, count, figsize=(3 * count, 6), squeeze=False)
    for column, record in zip(axes.T, DatasetCatalog.get(name), strict=False):
        image = cv2.imread(record["file_name"])
        instances = predictor(image)["instances"]
        detected = draw_detections(image, instances[instances.scores > threshold], metadata, scale=3)
        if not instances.has("pred_masks"):
            record = {**record, "annotations": [_without_mask(a) for a in record["annotations"]]}
        pictures = (draw_ground_truth(record, metadata, scale=3), detected)
        for axis, picture, title in zip(column, pictures, ("ground truth", "detected"), strict=True):
            axis.imshow(np.ascontiguousarray(picture[:, :, ::-1]))
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    plt.tight_layout()
    plt.savefig(path, dpi=80)
    plt.close()
