"""From registered data sets to batches."""

import itertools
import logging
import math
import random
from collections import Counter

import numpy as np
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ..preemption import end_workers, ignore_signals
from . import index, subsets
from .mapper import build_mapper
from .order import GroupOrder, mix

logger = logging.getLogger(__name__)


def drop_unusable(records):
    """Leave out boxes without an area in the image and count what a data set holds.

    Args:
        records (list[dict] or IndexedRecords): images in Detectron2's data set format; not changed.

    Returns:
        list[dict] or IndexedRecords, Counter: the images, those with such boxes as copies without them; the
        numbers of images, instances, crowd regions, zero-size boxes and images without annotations.
    """
    if isinstance(records, index.IndexedRecords):
        return records.usable()
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


def other_classes(names):
    """Say which of several data sets do not have the same classes in the same order.

    Args:
        names (Iterable[str]): registered; those whose classes are not known (yet) are passed over.

    Returns:
        str: "" when nothing is wrong.
    """
    found = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    found = [(name, list(classes)) for name, classes in found.items() if classes]
    for name, classes in found[1:]:
        first, expected = found[0]
        if classes != expected:
            pairs = itertools.zip_longest(expected, classes)
            at, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            return f"class {at} is {a!r} in {first}, but {b!r} in {name}"
    return ""


def training_records(cfg):
    """The images that ``cfg`` trains on, counted in the log.

    Returns:
        IndexedRecords, which takes no memory to speak of, for a single data set that data/index.py serves;
        list[dict] for others.

    Raises:
        ValueError: nothing to train on is left, or several data sets have other classes.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records = _indexed(*cfg.DATASETS.TRAIN) if len(cfg.DATASETS.TRAIN) == 1 else None
    if records is None:
        records = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=False, min_keypoints=keypoints, check_consistency=False
        )
        if differ := other_classes(cfg.DATASETS.TRAIN):
            raise ValueError(f"DATASETS.TRAIN: {differ}; train on sets with the same classes")
    elif keypoints:
        records = records.with_keypoints(keypoints)
    records, counts = drop_unusable(records)
    logger.info("%s: %s", ", ".join(cfg.DATASETS.TRAIN), ", ".join(f"{v} {k}" for k, v in counts.items()))
    if isinstance(records, index.IndexedRecords):
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            records = records.with_instances()
    # Image classification has no annotations to be empty.
    elif cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and any("annotations" in r for r in records):
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise ValueError(
            f"DATASETS.TRAIN: no image of {', '.join(cfg.DATASETS.TRAIN)} has an object to train on"
        )
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    if isinstance(records, index.IndexedRecords):
        records.log_histogram()
    elif classes and "annotations" in records[0]:
        print_instances_class_histogram(records, classes)
    return records


def _indexed(name):
    records = index.load(name)
    if records is not None and MetadataCatalog.get(name).get("subset"):
        subsets.report(name, records.ids.tolist())
    return records


def count_images(name):
    """Number of images of a registered data set, without generating or reading it where it says so."""
    declared = MetadataCatalog.get(name).get("num_images", None)
    if declared is not None:
        return declared
    records = _indexed(name)
    return len(DatasetCatalog.get(name) if records is None else records)


# What an image file that is missing, damaged or another one raises: SyntaxError is PIL's PNG reader's.
# Other errors are not the image's, so nothing may pass over them.
UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError, SizeMismatchError)


class BadImageError(RuntimeError):
    """A training image that cannot be read."""

    def __init__(self, message):
        # A loader worker's comes with the worker's traceback before it, which says nothing about the file.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def _unreadable(error):
    """Whether an error, or the one that a mapper explains by it, means that a file cannot be read."""
    return isinstance(error, UNREADABLE) or isinstance(error.__cause__, UNREADABLE)


class Groups(Dataset):
    """Training samples by the position of their group in the run's sequence.

    Args:
        records (list[dict] or IndexedRecords): images in Detectron2's data set format.
        mapper (callable): makes a sample of a record; its randomness may come from numpy's or Python's global
            generator, which are seeded for each sample.
        group_size (int), seed (int): see :class:`~rethink_d2.data.order.GroupOrder`.
        by_orientation (bool): whether groups hold images of like orientation.
        skip_bad (bool): take another image in the place of one that cannot be read.
    """

    # Images tried for one place before the data set is given up.
    TRIES = 10

    def __init__(self, records, mapper, group_size, seed, *, by_orientation, skip_bad=False):
        compact = isinstance(records, index.IndexedRecords)
        if not by_orientation:
            portrait = np.zeros(len(records), bool)
        elif compact:
            portrait = records.portrait
        else:
            portrait = [r.get("height", 0) > r.get("width", 0) for r in records]
        self._order = GroupOrder(portrait, group_size, seed)
        # One serialized block, which loader workers share.
        self._records = records if compact else DatasetFromList(records)
        self._mapper, self._seed, self._skip_bad = mapper, seed, skip_bad

    def __getitem__(self, position):
        return [self._sample(index, epoch) for index, epoch in self._order.group(position)]

    def _sample(self, index, epoch):
        bad = []
        for attempt in range(self.TRIES if self._skip_bad else 1):
            # The place alone decides on the replacement, so skipping changes nothing elsewhere.
            chosen = int(mix(self._seed, epoch, 3, index, attempt)) % len(self._records) if attempt else index
            record = self._records[chosen]
            name = record["file_name"]
            np.random.seed(int(mix(self._seed, epoch, 2, chosen)) & 0xFFFFFFFF)
            random.seed(int(mix(self._seed, epoch, 2, chosen)))
            try:
                return {**self._mapper(record), "bad_images": bad}
            except Exception as e:
                reason = f"{type(e).__name__}: {e}"
                if not _unreadable(e):
                    raise RuntimeError(f"{name}: INPUT.MAPPER failed on it ({reason})") from e
                bad.append(name)
        cure = (
            f"all {self.TRIES} images tried for one place are like that"
            if self._skip_bad
            else "restore the file, or set DATALOADER.ON_BAD_IMAGE skip to train on other images in its place"
        )
        raise BadImageError(
            f"{', '.join(dict.fromkeys(bad))}: cannot be read ({reason}); {cure}. "
            "python -m rethink_d2.data.check finds all such files"
        )


class _Positions(Sampler):
    """Positions of the groups that this process runs, from an iteration on, without end."""

    def __init__(self, start_iter, groups, rank, processes):
        self._start, self._groups, self._rank, self._processes = start_iter, groups, rank, processes

    def __iter__(self):
        for iteration in itertools.count(self._start):
            first = iteration * self._groups
            yield from range(first + self._rank, first + self._groups, self._processes)


def build_train_loader(cfg, records, start_iter=0):
    """Groups of images for one process, without end.

    Which images they hold, and how they are augmented, depends on the records, the seed and the iteration
    alone: not on where a run was resumed, the number of loader workers, or the number of processes.

    Args:
        cfg (CfgNode): a resolved config.
        records (list[dict] or IndexedRecords): from :func:`training_records`.
        start_iter (int): the first iteration to load for.

    Returns:
        iterable[list[dict]]: each a group of ``SOLVER.IMS_PER_GROUP`` samples of like orientation; this
        process's share of one iteration's groups, then of the next's.
    """
    groups = Groups(
        records,
        build_mapper(cfg, True),
        cfg.SOLVER.IMS_PER_GROUP,
        cfg.SEED,
        by_orientation=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        skip_bad=cfg.DATALOADER.ON_BAD_IMAGE == "skip",
    )
    end_workers()
    count = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.IMS_PER_GROUP
    return DataLoader(
        groups,
        sampler=_Positions(start_iter, count, comm.get_rank(), comm.get_world_size()),
        batch_size=None,  # a group is a batch already
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=ignore_signals,  # it is still needed when the run is asked to stop
    )


def build_test_loader(cfg, name):
    """Detectron2's test loader for the data set `name`, with the mapper of INPUT.MAPPER."""
    loader = build_detection_test_loader(cfg, name, mapper=build_mapper(cfg, False))
    loader.worker_init_fn = ignore_signals
    end_workers()
    return loader
