"""PASCAL VOC without difficult objects, the paper's union of 2007 and 2012, and data laid out like VOC.

===========================  ========================================================================
``<name>_no_difficult``      Detectron2's ``voc_2007_trainval``, ``voc_2012_train``, ..., without the
                             objects marked difficult: for training
``voc_0712_train``           trainval2007 + train2012, 10,728 images: the sets that the paper names
``voc_0712_train_15k``       these and test2007, 15,680 images: the number that the paper gives
===========================  ========================================================================

Neither union has difficult objects. The paper (section 5.2) tests on Detectron2's ``voc_2012_val``.
Difficult objects are left out of training as in Detectron, on which the paper's figures were measured;
Detectron2's own names train on them.
"""

import functools
import logging
import os
import xml.etree.ElementTree as ET
from collections import Counter
from typing import NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

__all__ = ["VOCObject", "image_ids", "list_file", "load_voc", "read_annotation", "register_voc"]

logger = logging.getLogger(__name__)


class VOCObject(NamedTuple):
    """An object as a file has it: class, (xmin, ymin, xmax, ymax) in pixels counted from 1, difficult."""

    name: str
    box: tuple
    difficult: bool


def register_voc(name, parts, difficult=False, class_names=CLASS_NAMES):
    """Register a data set in VOC's layout, with one's own classes if need be.

    Args:
        name (str): a new name for Detectron2's catalogs.
        parts (list[tuple[str, str, int]]): folder (with Annotations, ImageSets/Main and JPEGImages), split
            (the name of a list in ImageSets/Main) and year: 2007 or 2012, which selects VOC's 11-point or
            area metric, for one's own data too.
        difficult (bool): whether to keep objects marked difficult. Evaluation reads the files itself and
            never counts them, whatever is said here.
        class_names (Sequence[str]): the classes, in the order of the model's outputs.

    Several parts can be trained on; :class:`~rethink_d2.evaluation.voc.VOCEvaluator` takes one at a time.

    Raises:
        ValueError: no part, or a year that is neither.
    """
    parts = [(os.fspath(dirname), split, year) for dirname, split, year in parts]
    if not parts or any(year not in (2007, 2012) for *_, year in parts):
        raise ValueError(
            f"{name}: parts {parts} must be one or more of (folder, split, year), the year 2007 (for the "
            "11-point metric) or 2012 (area metric)"
        )
    DatasetCatalog.register(name, functools.partial(load_voc, parts, difficult, class_names))
    meta = MetadataCatalog.get(name)
    meta.set(thing_classes=list(class_names), evaluator_type="pascal_voc")
    if len(parts) == 1:
        meta.set(dirname=parts[0][0], split=parts[0][1], year=parts[0][2])
    else:
        meta.set(voc_parts=parts)


def load_voc(parts, difficult=False, class_names=CLASS_NAMES):
    """Read annotations in VOC's layout; what is left out is counted in the log.

    With ``difficult`` the records are those of Detectron2's ``load_voc_instances`` but for boxes that end
    where they begin or before (xmax <= xmin): Detectron2 makes one pixel of the former.

    Args:
        parts (list[tuple[str, str, int]]): as for :func:`register_voc`.
        difficult (bool): whether to keep objects marked difficult.
        class_names (Sequence[str]): the classes, in the order of ``category_id``.

    Returns:
        list[dict]: Detectron2's data set format.

    Raises:
        ValueError: a file is missing or cannot be understood, or an object is of no known class.
    """
    records = []
    for dirname, split, _ in parts:
        counts = Counter()
        for image_id in image_ids(dirname, split):
            path = os.path.join(dirname, "Annotations", f"{image_id}.xml")
            image = os.path.join(dirname, "JPEGImages", f"{image_id}.jpg")
            if not PathManager.isfile(image):
                raise ValueError(f"{image} is missing, but {list_file(dirname, split)} names it")
            height, width, objects = read_annotation(path)
            record = {"file_name": image, "image_id": image_id, "height": height, "width": width}
            record["annotations"] = []
            for obj in objects:
                annotation = _annotation(obj, list(class_names), path)
                empty = obj.box[2] <= obj.box[0] or obj.box[3] <= obj.box[1]
                counts.update(difficult=obj.difficult, empty=empty)
                if not empty and (difficult or not obj.difficult):
                    record["annotations"].append(annotation)
            records.append(record)
        logger.info(
            "%s: %d difficult objects %s, %d zero-size boxes left out",
            list_file(dirname, split),
            counts["difficult"],
            "kept" if difficult else "left out",
            counts["empty"],
        )
    return records


def _annotation(obj, class_names, path):
    if obj.name not in class_names:
        raise ValueError(
            f"{path}: class {obj.name!r} is not among {', '.join(class_names)}; give register_voc the "
            "class_names of this data"
        )
    x0, y0, x1, y1 = obj.box
    # From 0 and with exclusive ends, as Detectron2 data/datasets/pascal_voc.py has it.
    box = [x0 - 1.0, y0 - 1.0, x1, y1]
    return {"category_id": class_names.index(obj.name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}


def list_file(dirname, split):
    """The file that lists a split's images."""
    return os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")


def image_ids(dirname, split):
    """The images of a split, by file name without ending.

    Raises:
        ValueError: there is no such list, it is empty, or a line has more than a name.
    """
    path = list_file(dirname, split)
    if not PathManager.isfile(path):
        raise ValueError(f"{path} is missing: it lists the images of split {split!r}")
    with PathManager.open(path) as f:
        lines = [line.split() for line in f if line.strip()]
    if not lines:
        raise ValueError(f"{path} lists no images")
    if wrong := [line for line in lines if len(line) > 1]:
        raise ValueError(
            f"{path}: one image per line, without blanks in its name; not {' '.join(wrong[0])!r}"
        )
    return [line[0] for line in lines]


def read_annotation(path):
    """Read one annotation file.

    Returns:
        int, int, list[VOCObject]: height and width in pixels; the objects, without parts of objects.

    Raises:
        ValueError: there is no such file, it is not XML, or something is missing in it.
    """
    if not PathManager.isfile(path):
        raise ValueError(f"{path} is missing, but a list in ImageSets/Main names its image")
    try:
        with PathManager.open(path, "rb") as f:
            root = ET.parse(f).getroot()
        height, width = (int(_text(root, f"size/{side}")) for side in ("height", "width"))
        # Only children of the root: the <part> of an <object>, such as a person's head, is no object.
        return height, width, [_object(element) for element in root.findall("object")]
    except (ET.ParseError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e


def _object(element):
    box = tuple(float(_text(element, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    # Files of other programs may not say whether an object is difficult.
    return VOCObject(_text(element, "name"), box, bool(int(element.findtext("difficult", "0"))))


def _text(element, path):
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    return text


def _register_paper_sets():
    """Register what the module's docstring lists, where Detectron2 expects VOC to be."""
    names = [f"voc_2007_{split}" for split in ("train", "val", "trainval", "test")]
    names += [f"voc_2012_{split}" for split in ("train", "val", "trainval")]
    parts = {}
    for name in names:
        meta = MetadataCatalog.get(name)
        parts[name] = (meta.dirname, meta.split, meta.year)
        register_voc(f"{name}_no_difficult", [parts[name]])
    union = [parts["voc_2007_trainval"], parts["voc_2012_train"]]
    register_voc("voc_0712_train", union)
    register_voc("voc_0712_train_15k", [*union, parts["voc_2007_test"]])


_register_paper_sets()
