"""``python -m rethink_d2.data.check NAME ...``: look for faults in a data set before training on it.

Every image is decoded, as Detectron2 reads it. COCO and VOC annotations are read from their files, because
Detectron2's records of them no longer show everything; of other data sets the records are checked.

- error: training would fail or be wrong. Images that are missing, damaged or of another size than annotated;
  ids that are not unique; unknown classes; masks (RLE) of another size; keypoint lists of a wrong length;
  entries that cannot be understood.
- warning: Detectron2 leaves it out or repairs it. Boxes without an area or beyond the image, polygons beyond
  the image, annotations of unknown images, polygons of fewer than three points (an error in records). Also
  a wrong ``num_keypoints``, which COCO's evaluation believes, and objects without a mask among others.
- note: counts. Images (without annotations, with crowds only), instances (crowds, difficult ones of VOC, with
  visible keypoints), instances of each class without crowds.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..spelling import nearest
from .classification import class_names
from .files import is_generated, missing_files, remedy
from .voc import image_ids, list_file, read_annotation

EXAMPLES = 10
TOLERANCE = 1.0  # pixels beyond the image that are rounding, not a fault
# What reading an entry of a wrong form may raise.
_BAD = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class Finding:
    """One fault of a data set, or one count.

    Attributes:
        level (str): "error", "warning" or "note".
        kind (str): e.g. "zero-size-box"; always of the same level within one data set.
        where (str): the file or entry; for a count, the data set or class.
        message (str): what is wrong; may be empty for a count.
        count (int): of a note; 1 for a fault.
    """

    level: str
    kind: str
    where: str
    message: str = ""
    count: int = 1


def check_dataset(name, workers=0):
    """Look for faults in a registered data set; see this module's docstring.

    Args:
        name (str): a name in Detectron2's ``DatasetCatalog``.
        workers (int): processes that decode the images; 0 for this one.

    Returns:
        list[Finding]: errors first, then warnings, then notes.

    Raises:
        ValueError: there is no such data set, or its files are not there.
    """
    _require(name)
    check = _Check(name)
    check.run(check.read(), workers)
    return sorted(check.findings, key=lambda f: ("error", "warning", "note").index(f.level))


def _require(name):
    if name not in DatasetCatalog.list():
        raise ValueError(f"{name} is not registered{nearest(name, DatasetCatalog.list())}")
    if missing := missing_files(name):
        raise ValueError(f"{name} is not on this machine: tried {', '.join(missing)}; {remedy(name)}")


def _reason(error):
    return f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


class _Check:
    """The findings on one data set, and what reading its annotations says about it."""

    def __init__(self, name):
        self.name = name
        self.meta = MetadataCatalog.get(name)
        self.findings = []
        self.classes = {}  # category_id, as the records have it -> name
        self.counts = Counter()
        self.instances = Counter()  # by class
        self.masks, self.without_mask = 0, []
        self.coco = self.meta.get("evaluator_type") == "coco" and bool(self.meta.get("json_file"))
        self.no_side = 1e-5  # as detection_utils.filter_empty_instances

    def add(self, level, kind, where, message="", count=1):
        self.findings.append(Finding(level, kind, where, message, count))

    def once(self, seen, key, kind, where, level="error"):
        """Report a key that has been seen before; whether it had not."""
        if known := key in seen:
            self.add(level, kind, where, "there is more than one")
        seen.add(key)
        return not known

    @contextlib.contextmanager
    def entry(self, where, kind="malformed"):
        """Report what cannot be understood, and go on."""
        try:
            yield
        except _BAD as e:
            self.add("error", kind, where, _reason(e))

    def read(self):
        """The records, in Detectron2's format but for what ``category_id`` is."""
        if self.coco:
            return self._read_coco(self.meta.json_file)
        if parts := self.meta.get("voc_parts"):
            return self._read_voc(parts)
        if all(part := [self.meta.get(key) for key in ("dirname", "split", "year")]):
            return self._read_voc([part])
        return self._read_plain()

    def _read_coco(self, path):
        images = annotations = ()
        with self.entry(path, "annotation-file"):
            if is_generated(self.name):
                DatasetCatalog.get(self.name)  # which draws it
            with PathManager.open(path, "rb") as f:
                document = json.load(f)
            self._coco_classes(path, document["categories"])
            images, annotations = list(document["images"]), list(document.get("annotations", ()))
        level = "warning" if "minival" in path else "error"  # as load_coco_json excuses these files
        records, seen, annotation_ids = {}, set(), set()
        for number, image in enumerate(images, 1):
            with self.entry(f"{path}, entry {number} of images"):
                file_name = os.path.join(self.meta.image_root, image["file_name"])
                record = {"file_name": file_name, "height": image["height"], "width": image["width"]}
                if self.once(seen, image["id"], "duplicate-image", f"{path}, image {image['id']}"):
                    records[image["id"]] = record | {"annotations": []}
        for number, annotation in enumerate(annotations, 1):
            with self.entry(f"{path}, entry {number} of annotations"):
                where = f"{path}, annotation {annotation['id']}"
                self.once(annotation_ids, annotation["id"], "duplicate-annotation", where, level)
                annotation["bbox_mode"] = BoxMode.XYWH_ABS
                if record := records.get(annotation["image_id"]):
                    record["annotations"].append(annotation)
                else:
                    self.add("warning", "unknown-image", where, f"no image {annotation['image_id']}")
        return list(records.values())

    def _coco_classes(self, path, categories):
        if not categories:
            raise ValueError("there are no categories")
        self.classes = {c["id"]: c["name"] for c in sorted(categories, key=lambda c: c["id"])}
        if len(self.classes) < len(categories):
            self.add("error", "classes", path, "some categories have the same id")
        names = list(self.classes.values())
        if self.meta.get("thing_classes", names) != names:
            self.add("error", "classes", path, f"not the thing_classes of {self.name}, or in another order")

    def _read_voc(self, parts):
        self.classes = {name: name for name in self.meta.thing_classes}
        self.no_side = 1.0  # a box that ends where it begins, the end being exclusive here
        records, seen = [], set()
        for dirname, split, _ in parts:
            ids = []
            with self.entry(list_file(dirname, split), "annotation-file"):
                ids = image_ids(dirname, split)
            for image_id in ids:
                path = os.path.join(dirname, "Annotations", f"{image_id}.xml")
                if not self.once(seen, path, "duplicate-image", path):
                    continue
                image = os.path.join(dirname, "JPEGImages", f"{image_id}.jpg")
                records.append(record := {"file_name": image, "annotations": []})
                with self.entry(path, "annotation-file"):
                    record["height"], record["width"], objects = read_annotation(path)
                    for name, (x0, y0, x1, y1), difficult in objects:
                        self.counts["difficult"] += difficult
                        box = {"bbox": [x0 - 1, y0 - 1, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
                        record["annotations"].append(box | {"category_id": name})
        return records

    def _read_plain(self):
        try:
            records = list(DatasetCatalog.get(self.name))
        except Exception as e:  # the loader may be anyone's
            self.add("error", "loader", self.name, _reason(e))
            return []
        folders = self.meta.get("evaluator_type") == "classification"
        names = class_names(self.name) if folders else self.meta.get("thing_classes", ())
        self.classes = dict(enumerate(names))
        good, seen = [], set()
        for number, record in enumerate(records, 1):
            with self.entry(f"{self.name}, record {number}"):
                if record.get("image_id") is not None:
                    self.once(seen, record["image_id"], "duplicate-image", record["file_name"])
                good.append(record | {"file_name": os.fspath(record["file_name"])})
        return good

    def run(self, records, workers):
        """Check all images and annotations, and count."""
        if not records and not self.findings:
            self.add("error", "no-images", self.name, "there is nothing to train on")
        paths = [record["file_name"] for record in records]
        # PyTorch's pool notices when a decoder takes its process down. None: one by one, not in batches.
        pool = DataLoader(paths, None, num_workers=workers, collate_fn=_decode, worker_init_fn=_begin)
        for record, image in zip(records, tqdm(pool, self.name, unit="image", disable=None), strict=True):
            with self.entry(record["file_name"]):
                self._record(record, *image)
        self._notes()

    def _record(self, record, shape, kind, message):
        path, size = record["file_name"], (record.get("height"), record.get("width"))
        if shape is None:
            self.add("error", kind, path, message)
        else:
            size = tuple(real if side is None else side for side, real in zip(size, shape, strict=True))
            if size != shape:
                what = f"{shape[1]}x{shape[0]} pixels (EXIF rotation applied), annotated {size[1]}x{size[0]}"
                self.add("error", "image-size", path, what)
        self.counts["images"] += 1
        if "label" in record:
            self._class(record["label"], path)
        if (annotations := record.get("annotations")) is None:
            return
        crowds = sum(bool(a.get("iscrowd", 0)) for a in annotations)
        self.counts["instances"] += len(annotations)
        self.counts["crowds"] += crowds
        self.counts["images-without-annotations"] += not annotations
        self.counts["images-with-crowds-only"] += 0 < crowds == len(annotations)
        if None in size:
            return  # not annotated, and the image, which would tell, cannot be read
        for number, annotation in enumerate(annotations, 1):
            where = f"{path}, annotation {annotation.get('id', number)}"
            with self.entry(where):
                self._annotation(annotation, where, *size)

    def _class(self, key, where, crowd=False):
        if self.classes and key not in self.classes:
            self.add("error", "unknown-category", where, f"{key!r} is not one of {len(self.classes)} classes")
        elif not crowd:
            self.instances[self.classes.get(key, str(key))] += 1

    def _annotation(self, annotation, where, height, width):
        crowd = bool(annotation.get("iscrowd", 0))
        self._class(annotation["category_id"], where, crowd)
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = (float(side) for side in box)
        said = f"{x0:g}, {y0:g} to {x1:g}, {y1:g}"
        if self.coco and annotation.get("ignore"):
            raise ValueError("Detectron2 does not support 'ignore'")
        if not math.isfinite(x0 + y0 + x1 + y1):
            raise ValueError(f"the box {said} is not finite")
        if min(x1 - x0, y1 - y0) <= self.no_side:
            self.add("warning", "zero-size-box", where, f"{said}; left out")
        if _beyond((x0, x1), (y0, y1), height, width):
            self.add("warning", "box-outside", where, f"{said} in an image of {width}x{height}; clipped")
        self._mask(annotation.get("segmentation"), where, crowd, height, width)
        self._keypoints(annotation, where, crowd)

    def _mask(self, mask, where, crowd, height, width):
        self.masks += bool(mask) and not crowd
        if not mask and not crowd:
            self.without_mask.append(where)
        if isinstance(mask, dict):
            counts, pixels = mask["counts"], height * width
            listed = self.coco and isinstance(counts, list)  # which Detectron2 compresses, but not of records
            fits = sum(counts) == pixels if listed else _has(counts, pixels)
            if list(mask["size"]) != [height, width] or not fits:
                self.add("error", "rle-size", where, f"not that of the image, {width}x{height} pixels")
            mask = ()
        polygons = [np.asarray(polygon, dtype=float).ravel() for polygon in mask or ()]
        fit = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0]
        if len(fit) < len(polygons):
            level = "warning" if self.coco else "error"
            self.add(level, "short-polygon", where, "fewer than 6 coordinates, or an odd number")
        if any(_beyond(p[0::2], p[1::2], height, width) for p in fit):
            self.add("warning", "polygon-outside", where, f"beyond the image of {width}x{height}")

    def _keypoints(self, annotation, where, crowd):
        keypoints = np.asarray(annotation.get("keypoints", ()), dtype=float).ravel()
        wanted = 3 * len(self.meta.get("keypoint_names", ()))
        if not len(keypoints) and (crowd or not wanted):
            return
        visible = int((keypoints[2::3] > 0).sum())
        self.counts["with-visible-keypoints"] += bool(visible) and not crowd
        if len(keypoints) != wanted if wanted else len(keypoints) % 3:
            self.add("error", "keypoints-length", where, f"{len(keypoints)} instead of {wanted or '3 each'}")
        elif (said := annotation.get("num_keypoints", visible)) != visible:
            self.add("warning", "num-keypoints", where, f"{said}, but {visible} are visible")

    def _notes(self):
        for where in self.without_mask if self.masks else ():
            self.add("warning", "no-mask", where, "others have one; a model with masks fails on this")
        for kind, count in self.counts.items():
            self.add("note", kind, self.name, count=count)
        self.instances.update(dict.fromkeys(self.classes.values(), 0))
        for name, count in self.instances.most_common():
            self.add("note", "class", name, f"{count}", count)


def _has(counts, pixels):
    """Whether a compressed RLE has so many pixels; decoding refuses more, but leaves the rest undefined."""
    for size in (pixels - 1, pixels):
        with contextlib.suppress(ValueError):
            mask_util.decode({"counts": counts, "size": [size, 1]})
            return size == pixels
    return False


def _beyond(xs, ys, height, width):
    return max(-min(xs), -min(ys), max(xs) - width, max(ys) - height) > TOLERANCE


def _decode(path):
    """(height, width) or None, kind of fault, message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF tags and the like, which do no harm
            return read_image(path, "BGR").shape[:2], "", ""
    except FileNotFoundError:
        return None, "missing-image", "there is no such file"
    except Exception as e:  # Pillow's decoders raise many kinds
        return None, "unreadable-image", _reason(e)


def _begin(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    gc.freeze()  # or collecting garbage would copy the parent's annotations


def _report(name, findings, examples):
    """A table of the kinds of findings, and at most so many examples of each."""
    groups = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.kind), []).append(finding)
    rows = [[*key, sum(finding.count for finding in group)] for key, group in groups.items()]
    lines = [name, tabulate(rows, ["level", "kind", "count"], "simple")]
    for (level, kind), group in groups.items():
        told = [f"  {finding.where}: {finding.message}" for finding in group if finding.message]
        more = [f"  ... and {len(told) - examples} more (--all)"] if len(told) > examples else []
        lines += ["", f"{level} {kind}", *told[:examples], *more] if told else []
    return "\n".join(lines)


def cli(argv=None):
    """The command line.

    Returns:
        int: 0 without errors, 1 with errors, 2 where a name or a file is wrong, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.data.check",
        description="Look for faults in data sets. Exit code: 1 with errors, 2 if one is unknown or absent.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="a registered data set, e.g. voc_2012_train")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode images")
    parser.add_argument("--json", action="store_true", help="all findings as JSON, by data set")
    parser.add_argument("--all", action="store_true", help=f"not only {EXAMPLES} examples of each kind")
    args = parser.parse_args(argv)
    if args.workers < 0:
        parser.error("--workers must not be negative")
    for name in args.names:
        try:
            _require(name)
        except ValueError as e:
            parser.error(str(e))
    try:
        found = {name: check_dataset(name, args.workers) for name in args.names}
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps({name: [asdict(f) for f in findings] for name, findings in found.items()}, indent=1))
    else:
        for name, findings in found.items():
            print(_report(name, findings, len(findings) if args.all else EXAMPLES), end="\n\n")
    return int(any(finding.level == "error" for findings in found.values() for finding in findings))


if __name__ == "__main__":
    sys.exit(cli())
