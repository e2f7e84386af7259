"""PASCAL VOC's average precision."""

import logging
from collections import defaultdict

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.utils import comm

from ..data.voc import image_ids, read_annotation

logger = logging.getLogger(__name__)

# In percent: Detectron2's.
IOU_THRESHOLDS = range(50, 100, 5)


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's VOC evaluator, with each class's AP50 and for data that is only laid out like VOC.

    The paper's VOC mAP is ``AP50``: the area under the precision-recall curve, or the mean of 11 points
    where the data set's ``year`` is 2007. Difficult objects are neither hits nor misses. As in Detectron,
    scores are rounded to three decimals and boxes to one. Fractional coordinates of objects are rounded to
    whole pixels, which is all that Detectron2's evaluator can read; no object is too small to count.
    """

    def __init__(self, dataset_name):
        """
        Args:
            dataset_name (str): registered with ``dirname``, ``split`` and ``year`` (2007 or 2012).

        Raises:
            ValueError: the data set has several folders, or a file cannot be read.
        """
        meta = MetadataCatalog.get(dataset_name)
        if meta.get("dirname") is None:
            raise ValueError(
                f"DATASETS.TEST: {dataset_name} is not one folder in VOC's layout: evaluate on its parts"
            )
        super().__init__(dataset_name)
        ids = image_ids(meta.dirname, meta.split)
        self._objects = {i: read_annotation(self._anno_file_template.format(i))[2] for i in ids}
        if any(x != round(x) for objects in self._objects.values() for o in objects for x in o.box):
            logger.warning("%s: coordinates are rounded to whole pixels for evaluation", dataset_name)

    def evaluate(self):
        """Compare the detections of all processes with the objects; every process must call this.

        Returns:
            dict[str, dict[str, float]] or None: under "bbox", 0-100: "AP" (mean over IoU 0.5, 0.55, ...,
            0.95), "AP50", "AP75", each the mean over the classes that have objects, and "AP50-<class>",
            NaN for the others. None except on the main process.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        present = {o.name for objects in self._objects.values() for o in objects if not o.difficult}
        if absent := [name for name in self._class_names if name not in present]:
            logger.warning("%s: no objects of %s: not in the means", self._dataset_name, ", ".join(absent))
        ap = np.full((len(self._class_names), len(IOU_THRESHOLDS)), np.nan)
        for index, name in enumerate(self._class_names):
            if name in present:
                lines = [line for predictions in gathered for line in predictions.get(index, [])]
                ap[index] = self._average_precision(name, lines)
        mean = dict(zip(IOU_THRESHOLDS, np.nanmean(ap, axis=0).tolist(), strict=True))
        result = {"AP": float(np.mean(list(mean.values()))), "AP50": mean[50], "AP75": mean[75]}
        result.update({f"AP50-{n}": x for n, x in zip(self._class_names, ap[:, 0].tolist(), strict=True)})
        return {"bbox": result}

    def _average_precision(self, name, lines):
        """AP (0-100) of a class at each IoU threshold, for detections as lines of text."""
        words = [line.rsplit(" ", 5) for line in lines]  # image, score, xmin, ymin, xmax, ymax
        numbers = np.array([found[1:] for found in words], dtype=float).reshape(-1, 5)
        order = np.argsort(-numbers[:, 0])  # Detectron2's: it decides between equal scores
        overlap, best, difficult = self._best_objects(name, [words[i][0] for i in order], numbers[order, 1:])
        result = []
        for threshold in IOU_THRESHOLDS:
            hit = overlap > threshold / 100
            ignored = hit & difficult[best]
            # Of several detections of one object the first, which has the highest score, is right.
            candidates = np.flatnonzero(hit & ~ignored)
            right = np.zeros(len(hit))
            right[candidates[np.unique(best[candidates], return_index=True)[1]]] = 1
            tp, fp = np.cumsum(right), np.cumsum(1 - right - ignored)
            precision = tp / np.maximum(tp + fp, np.finfo(float).eps)
            recall = tp / np.count_nonzero(~difficult)
            result.append(100 * voc_ap(recall, precision, self._is_2007))
        return result

    def _best_objects(self, name, images, boxes):
        """Which object of a class each detection overlaps most.

        Args:
            name (str): the class.
            images (list[str]): of N detections.
            boxes (ndarray): theirs (N, 4).

        Returns:
            tuple[ndarray, ndarray, ndarray]: for each detection the highest IoU, -inf in an image without
            such objects, and the object's index; for each object of the data set whether it is difficult.

        Raises:
            ValueError: a detection in an image that the data set does not have.
        """
        found = defaultdict(list)
        for index, image_id in enumerate(images):
            found[image_id].append(index)
        if strange := found.keys() - self._objects.keys():
            raise ValueError(f"predictions for image {min(strange)}, which is not in {self._dataset_name}")
        overlap, best, difficult = np.full(len(images), -np.inf), np.zeros(len(images), dtype=int), []
        for image_id, listed in self._objects.items():
            objects = [obj for obj in listed if obj.name == name]
            if objects and image_id in found:
                iou = _overlaps(boxes[found[image_id]], np.round([obj.box for obj in objects]))
                overlap[found[image_id]] = iou.max(axis=1)
                best[found[image_id]] = len(difficult) + iou.argmax(axis=1)
            difficult += [obj.difficult for obj in objects]
        return overlap, best, np.array(difficult)


def _overlaps(boxes, others):
    """IoU (N, M) of boxes (N, 4) and (M, 4) of pixels, the last ones included."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = np.maximum(high - low + 1, 0).prod(axis=-1)
    area, other_area = ((b[:, 2:] - b[:, :2] + 1).prod(axis=-1) for b in (boxes, others))
    return common / (area[:, None] + other_area - common)
