"""Image classification: one folder of images per class, and how a model gets to see them.

``imagenet_train`` and ``imagenet_val`` are registered for ``imagenet/{train,val}/<class>/*`` under
``$DETECTRON2_DATASETS`` (``./datasets`` if not set); nothing is read before they are used.
"""

import os
from functools import partial

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from fvcore.transforms.transform import CropTransform, TransformList
from PIL import Image

from .mapper import DATASET_MAPPER_REGISTRY

__all__ = [
    "CenterCrop",
    "ClassificationMapper",
    "RandomResizedCrop",
    "class_names",
    "load_image_folder",
    "register_image_folder",
]

SUFFIXES = (".jpeg", ".jpg", ".png")


def _names(folder, wanted):
    """The sorted names in a folder for which ``wanted(os.DirEntry)`` holds; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and wanted(e))


def load_image_folder(root, classes=None):
    """List ``root/<class>/*.{jpeg,jpg,png}``, in upper or lower case.

    Args:
        root (str): the folder of class folders.
        classes (list[str] or None): folders in the order of their labels; None for all, sorted.

    Returns:
        list[dict]: ``file_name``, ``image_id`` (number within the list), ``label`` (number of the class).

    Raises:
        ValueError: a folder is missing, or has no images.
    """
    records = []
    try:
        classes = _names(root, os.DirEntry.is_dir) if classes is None else classes
        for label, name in enumerate(classes):
            folder = os.path.join(root, name)
            files = _names(folder, lambda entry: entry.name.lower().endswith(SUFFIXES))
            if not files:
                raise ValueError(
                    f"{folder} has no images ({', '.join(SUFFIXES)}): every folder in {root} is a class, so "
                    "fill it or remove it"
                )
            records += [{"file_name": os.path.join(folder, file), "label": label} for file in files]
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ValueError(f"{e.filename} is not a folder; expected {root}/<class>/<image>") from e
    if not records:
        raise ValueError(f"{root} has no class folders; expected {root}/<class>/<image>")
    return [{**record, "image_id": number} for number, record in enumerate(records)]


def register_image_folder(name, root, classes=None):
    """Register a data set for image classification; its files are not looked at yet.

    Args:
        name (str): of the data set.
        root, classes: as in :func:`load_image_folder`.
    """
    DatasetCatalog.register(name, partial(load_image_folder, root, classes))
    MetadataCatalog.get(name).set(image_root=root, evaluator_type="classification")
    if classes is not None:
        MetadataCatalog.get(name).classes = list(classes)


def class_names(name):
    """The classes of a registered data set for image classification, in the order of their labels.

    Raises:
        FileNotFoundError: they have to be read from its folder, which is not there.
    """
    meta = MetadataCatalog.get(name)
    return meta.get("classes") or _names(meta.image_root, os.DirEntry.is_dir)


class RandomResizedCrop(T.Augmentation):
    """Resize a random part of the image to a square.

    As GoogLeNet ("Going Deeper with Convolutions", section 6): the part's area is uniform in
    ``relative_area``. Its aspect ratio is uniform in the logarithm, as torchvision's. After ten draws
    that do not fit into the image, it is the largest central part of an aspect ratio that is allowed.

    Args:
        size (int): side of the result, in pixels.
        relative_area (tuple[float, float]): range of the part's area, that of the image being 1.
        aspect_ratio (tuple[float, float]): range of width by height.
    """

    def __init__(self, size, relative_area=(0.08, 1.0), aspect_ratio=(3 / 4, 4 / 3)):
        super().__init__()
        if not 0 < relative_area[0] <= relative_area[1] <= 1:
            raise ValueError(
                f"INPUT.CLASSIFICATION.RELATIVE_AREA is {tuple(relative_area)}: expected 0 < low <= high <= 1"
            )
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        low, high = self.aspect_ratio
        for _ in range(10):
            area = height * width * self._rand_range(*self.relative_area)
            aspect = np.exp(self._rand_range(np.log(low), np.log(high)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = np.random.randint(width - w + 1), np.random.randint(height - h + 1)
                break
        else:
            w, h = min(width, round(height * high)), min(height, round(width / low))
            x, y = (width - w) // 2, (height - h) // 2
        return TransformList([CropTransform(x, y, w, h), T.ResizeTransform(h, w, self.size, self.size)])


class CenterCrop(T.Augmentation):
    """Cut a central square out of the image.

    Args:
        size (int): its side, in pixels.
    """

    def __init__(self, size):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ValueError(
                f"INPUT.CLASSIFICATION.CROP_SIZE {self.size} does not fit into an image of {width}x{height} "
                f"pixels; set INPUT.MIN_SIZE_TEST to {self.size} or more"
            )
        return CropTransform((width - self.size) // 2, (height - self.size) // 2, self.size, self.size)


@DATASET_MAPPER_REGISTRY.register()
class ClassificationMapper:
    """From a record with a ``label`` to a sample of :class:`rethink_d2.modeling.classifier.Classifier`.

    Args:
        augmentations (list[Augmentation]): applied to the image.
        image_format (str): as INPUT.FORMAT.
        num_classes (int): labels are below it.
    """

    @configurable
    def __init__(self, *, augmentations, image_format, num_classes):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg, is_train=True):
        size, flip = cfg.INPUT.CLASSIFICATION.CROP_SIZE, cfg.INPUT.RANDOM_FLIP
        if is_train:
            augmentations = [RandomResizedCrop(size, cfg.INPUT.CLASSIFICATION.RELATIVE_AREA)]
            if flip != "none":
                augmentations.append(
                    T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
                )
        else:
            augmentations = [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST), CenterCrop(size)]
        return {
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
        }

    def __call__(self, record):
        """
        Args:
            record (dict): with ``file_name`` and ``label``.

        Returns:
            dict: the record with ``image``, a (3, CROP_SIZE, CROP_SIZE) uint8 tensor, and ``greyscale``
            (bool).

        Raises:
            ValueError: the file is not a readable image, or there is no such class in the model.
        """
        path, label = record["file_name"], record["label"]
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{path} has label {label}, but MODEL.CLASSIFIER.NUM_CLASSES is {self.num_classes}; set it "
                "to the number of classes of the data set"
            )
        try:
            with Image.open(path) as file:  # reads the header only
                greyscale = file.mode in ("1", "L", "LA")
            inputs = T.AugInput(read_image(path, self.image_format))
        except OSError as e:
            raise ValueError(f"{path} cannot be read as an image ({e}); replace or remove it") from e
        self.augmentations(inputs)
        image = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        return {**record, "image": image, "greyscale": greyscale}


# As Detectron2's own data sets: read once, at import.
_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
for _split in ("train", "val"):
    register_image_folder(f"imagenet_{_split}", os.path.join(_ROOT, "imagenet", _split))
