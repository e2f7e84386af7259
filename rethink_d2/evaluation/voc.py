"""PASCAL VOC's average precision."""

import logging
import os
import tempfile
import xml.etree.ElementTree as ET

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval
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
    whole pixels, which is all that Detectron2's evaluation can read; no object is too small to count.
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
        with tempfile.TemporaryDirectory(prefix="voc_") as folder:
            self._write_objects(folder)
            for index, name in enumerate(self._class_names):
                if name in present:
                    lines = [line for predictions in gathered for line in predictions.get(index, [])]
                    ap[index] = self._average_precision(folder, name, lines)
            parse_rec.cache_clear()  # it holds on to every file that it ever read
        mean = dict(zip(IOU_THRESHOLDS, np.nanmean(ap, axis=0).tolist(), strict=True))
        result = {"AP": float(np.mean(list(mean.values()))), "AP50": mean[50], "AP75": mean[75]}
        result.update({f"AP50-{n}": x for n, x in zip(self._class_names, ap[:, 0].tolist(), strict=True)})
        return {"bbox": result}

    def _write_objects(self, folder):
        """Write the objects as Detectron2's evaluation reads them, which wants every field."""
        _write_lines(os.path.join(folder, "images.txt"), self._objects)
        for image_id, objects in self._objects.items():
            root = ET.Element("annotation")
            for obj in objects:
                element = ET.SubElement(root, "object")
                fields = {"name": obj.name, "pose": "", "truncated": 0, "difficult": int(obj.difficult)}
                box = zip(("xmin", "ymin", "xmax", "ymax"), map(round, obj.box), strict=True)
                for parent, values in ((element, fields), (ET.SubElement(element, "bndbox"), dict(box))):
                    for key, value in values.items():
                        ET.SubElement(parent, key).text = str(value)
            path = os.path.join(folder, f"{image_id}.xml")
            os.makedirs(os.path.dirname(path), exist_ok=True)  # an image's name may have a folder
            ET.ElementTree(root).write(path)

    def _average_precision(self, folder, name, lines):
        """AP (0-100) at each IoU threshold for detections as lines of text."""
        detections = os.path.join(folder, "detections.txt")
        _write_lines(detections, lines)
        files = (detections, os.path.join(folder, "{}.xml"), os.path.join(folder, "images.txt"))
        return [100 * voc_eval(*files, name, t / 100, self._is_2007)[2] for t in IOU_THRESHOLDS]


def _write_lines(path, lines):
    with open(path, "w") as f:
        f.write("\n".join(lines))
