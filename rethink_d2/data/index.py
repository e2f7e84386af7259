"""A compact index of COCO annotations, kept on disk and shared by all processes through the page cache.

Detectron2 parses a COCO file at every start of every process, and keeps all of it in each. Here the first
start writes an index below :func:`rethink_d2.data.glyphs.cache_root`, named by the file's content; later
ones map it into memory. Once the content is another, the index of what it was is removed. The records are
those of Detectron2's ``load_coco_json``, made when they are asked for; what a start asks of all records
(sizes, classes, crowds, keypoints) are arrays.

It serves data sets registered by ``register_coco_instances``, Detectron2's own COCO sets among them, and
their subsets (data/subsets.py). Others are loaded as their own functions do.
"""

import contextlib
import copy
import fcntl
import glob
import hashlib
import inspect
import itertools
import logging
import mmap
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog, print_instances_class_histogram
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from filelock import FileLock

from ._index_build import Unfit, build, read_header
from .content import content_digest, known_digests
from .glyphs import CACHE_ENV, cache_root

__all__ = ["IndexedRecords", "dataset_digest", "load"]

logger = logging.getLogger(__name__)

_VERSION = "index_v1"


class IndexedRecords(Sequence):
    """Images in Detectron2's data set format, decoded from an index when they are asked for.

    Pickling it, for loader workers, takes the path and which images these are.

    Args:
        path (str or PathLike): an index.
        image_root (str or PathLike): the folder of the image files.

    Attributes:
        digest (str): SHA-256 of the JSON file, as hexadecimal digits.
        classes (list[str]): names by ``category_id``.
        category_ids (list[int]): the file's own ids, by ``category_id``.
        unmatched, without_polygon (int): annotations of the file that are in no record, because it does not
            list their image, or because no polygon of theirs has three points.

    Raises:
        ValueError: the file is no index, or damaged.
        OSError: from the file system.
    """

    def __init__(self, path, image_root):
        self._path, self._image_root = os.fspath(path), os.fspath(image_root)
        self._usable_only = False
        self._open()
        self._rows = np.arange(len(self._all.id))

    def _open(self):
        with open(self._path, "rb") as f:
            if not os.fstat(f.fileno()).st_size:
                raise Unfit("it is empty")
            # Says that it is in use, for as long as it is mapped; some file systems cannot.
            with contextlib.suppress(OSError):
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            self._file = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        header = read_header(self._file)
        self.digest = header.sha256
        self.category_ids, self.classes = map(list, zip(*header.categories, strict=True))
        self.unmatched, self.without_polygon = header.unmatched, header.without_polygon
        spans = header.arrays.items()
        arrays = {name: np.frombuffer(self._file, kind, size, start) for name, (kind, start, size) in spans}
        self._all = SimpleNamespace(**arrays)

    def __reduce__(self):
        return _restore, (self._path, self._image_root, self._rows, self._usable_only)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        """One record, a new object each time; of a slice, the records of these images."""
        if isinstance(index, slice):
            return self._of(self._rows[index])
        row = self._rows[index]
        own = slice(self._all.first[row], self._all.first[row + 1])
        lines = np.append(self._all.order[own], row)
        spans = zip(self._all.line[lines].tolist(), self._all.line[lines + 1].tolist(), strict=True)
        *annotations, file_name = _decode_lines(b"".join([self._file[start:stop] for start, stop in spans]))
        if self._usable_only:
            dropped = self._all.unusable[own].tolist()
            annotations = [a for a, drop in zip(annotations, dropped, strict=True) if not drop]
        return {
            "file_name": os.path.join(self._image_root, file_name),
            "height": int(self._all.height[row]),
            "width": int(self._all.width[row]),
            "image_id": int(self._all.id[row]),
            "annotations": [_complete(annotation) for annotation in annotations],
        }

    @property
    def ids(self):
        """The images' ids (np.ndarray of int64)."""
        return self._all.id[self._rows]

    @property
    def portrait(self):
        """Whether images are higher than wide (np.ndarray of bool)."""
        return (self._all.height > self._all.width)[self._rows]

    def with_keypoints(self, minimum):
        """The images with so many visible keypoints, as ``filter_images_with_few_keypoints``."""
        kept = self._of(self._rows[self._all.keypoints[self._rows] >= minimum])
        logger.info("%d images with fewer than %d keypoints left out", len(self) - len(kept), minimum)
        return kept

    def with_instances(self):
        """The images with more than crowd regions, as ``filter_images_with_only_crowd_annotations``."""
        kept = self._of(self._rows[self._per_image(~self._all.crowd)[self._rows] > 0])
        logger.info("%d images without instances left out; %d are left", len(self) - len(kept), len(kept))
        return kept

    def usable(self):
        """The same images without boxes that have no area in them: data/loader.py's ``drop_unusable``.

        Returns:
            IndexedRecords, Counter: as that function.
        """
        kept = self._of(self._rows)
        kept._usable_only = True
        numbers = {
            "instances": kept._per_image(~self._all.crowd),
            "crowd regions": kept._per_image(self._all.crowd),
            "zero-size boxes left out": self._per_image(self._all.unusable),
            "images without annotations": kept._per_image(np.ones_like(self._all.crowd)) == 0,
        }
        counts = {what: int(by_image[self._rows].sum()) for what, by_image in numbers.items()}
        return kept, Counter({"images": len(self), **counts})

    def instances_per_class(self):
        """Numbers of instances, without crowd regions (np.ndarray of int, one per class)."""
        chosen = np.zeros(len(self._all.id), bool)
        chosen[self._rows] = True
        counted = np.repeat(chosen, np.diff(self._all.first)) & ~self._all.crowd & self._present()
        return np.bincount(self._all.category[counted], minlength=len(self.classes))

    def log_histogram(self):
        """Detectron2's table of instances per class."""
        numbers = self.instances_per_class().tolist()
        shared = [itertools.repeat({"category_id": c}, number) for c, number in enumerate(numbers)]
        print_instances_class_histogram([{"annotations": list(itertools.chain(*shared))}], self.classes)

    def _of(self, rows):
        other = copy.copy(self)
        other._rows = rows
        return other

    def _present(self):
        """Which annotations the records have (of all images)."""
        return ~self._all.unusable if self._usable_only else np.ones_like(self._all.unusable)

    def _per_image(self, chosen):
        """Number of chosen annotations that the records have, by row."""
        total = np.concatenate([[0], np.cumsum(chosen & self._present())])
        return np.diff(total[self._all.first])


def _restore(path, image_root, rows, usable_only):
    records = IndexedRecords(path, image_root)
    records._rows, records._usable_only = rows, usable_only
    return records


_decode_lines = msgspec.json.Decoder().decode_lines


def _complete(annotation):
    """What Detectron2 data/datasets/coco.py makes of an annotation of the file, in place."""
    mask = annotation.get("segmentation")
    if isinstance(mask, dict) and isinstance(mask["counts"], list):
        annotation["segmentation"] = mask_util.frPyObjects(mask, *mask["size"])
    if points := annotation.get("keypoints"):
        # From indices of pixels to coordinates.
        annotation["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(points)]
    annotation["bbox_mode"] = BoxMode.XYWH_ABS
    return annotation


def load(name):
    """The records of a registered data set from its index, which is written at first.

    As ``load_coco_json``, it sets ``thing_classes`` and ``thing_dataset_id_to_contiguous_id`` in the data
    set's metadata. Safe with several processes at once: one writes, the others wait.

    Args:
        name (str): a data set.

    Returns:
        IndexedRecords, or None for ``DatasetCatalog`` to load it: it is not in COCO format, a file is
        missing, the cache cannot be written, or Detectron2 may refuse the file or read it in another way.
        The last two are logged.

    Raises:
        ValueError, OSError: a subset cannot be made (data/subsets.py).
    """
    json_file, image_root = _source(name)
    if json_file is None or not os.path.isfile(json_file):
        return None
    try:
        records = IndexedRecords(_ensure(json_file), image_root)
    except (Unfit, msgspec.DecodeError, UnicodeDecodeError) as e:
        logger.warning("%s: no index of %s, because %s; it is loaded without", name, json_file, e)
        return None
    except OSError as e:
        logger.warning(
            "%s: no index (%s); it is loaded at every start. Set %s to a folder that can be written to",
            name,
            e,
            CACHE_ENV,
        )
        return None
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = records.classes
    metadata.thing_dataset_id_to_contiguous_id = {c: i for i, c in enumerate(records.category_ids)}
    if records.unmatched:
        logger.warning("%s: %d annotations are of no image in the file", json_file, records.unmatched)
    if records.without_polygon:
        logger.warning(
            "%s: %d instances without a polygon of three points left out", json_file, records.without_polygon
        )
    logger.info("%s: %d images from the index of %s", name, len(records), json_file)
    return records


def dataset_digest(name):
    """SHA-256 of a data set's annotation file, for telling whether two data sets are the same.

    It costs nothing where data/content.py has it; otherwise the file is read, once in a process as long as it
    stays. A subset, which follows from its name and its sources, has theirs.

    Args:
        name (str): a data set.

    Returns:
        str or None: hexadecimal digits; None for data sets that this module does not serve, and where the
        file, or what a subset is made from, is not there.
    """
    if subset := name in DatasetCatalog.list() and MetadataCatalog.get(name).get("subset"):
        found = [dataset_digest(source) for source in subset.reads]
        return None if None in found else hashlib.sha256("".join(found).encode()).hexdigest()
    json_file = _source(name)[0]
    if json_file is None or not os.path.isfile(json_file):
        return None
    return content_digest(json_file)


def _source(name):
    """The JSON file and image folder of a data set that is what load_coco_json makes of them, else Nones."""
    if name not in DatasetCatalog.list():
        return None, None
    metadata, function = MetadataCatalog.get(name), DatasetCatalog[name]
    if metadata.get("subset"):
        json_file, image_root = metadata.json_file, metadata.image_root
    # Metadata alone would not tell: a function of somebody's own may give other records.
    elif inspect.isfunction(function) and function.__code__ in register_coco_instances.__code__.co_consts:
        held = inspect.getclosurevars(function).nonlocals
        json_file, image_root = held["json_file"], held["image_root"]
    else:
        return None, None
    return PathManager.get_local_path(os.fspath(json_file)), image_root


def _opened(path, digest):
    """Whether there is an index of that content."""
    try:
        return IndexedRecords(path, "").digest == digest
    except (OSError, ValueError):  # absent or damaged: both are mended by writing it
        return False


def _ensure(json_file):
    digest, stem = content_digest(json_file), Path(json_file).stem
    path = cache_root() / _VERSION / f"{stem}-{digest[:16]}.index"
    if _opened(path, digest):  # without the lock, so that a finished cache may be read-only
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{stem}.lock"):
        if not _opened(path, digest):
            size = os.stat(json_file).st_size / 2**20
            logger.info("Writing the index of %s (%.0f MiB), once: %s", json_file, size, path)
            build(json_file, path)
            _remove_others(path.parent, stem, {digest, *known_digests(stem)})
    return path


def _remove_others(folder, stem, digests):
    """Remove indexes of what files of this name held before, but for those that a process has mapped."""
    kept = {digest[:16] for digest in digests}
    for path in folder.glob(f"{glob.escape(stem)}-{'[0-9a-f]' * 16}.index"):
        if path.stem[-16:] not in kept:
            with contextlib.suppress(OSError), open(path, "rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                logger.info("Removed %s: nothing holds these annotations any more", path)
