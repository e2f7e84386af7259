"""Mappers from a data set's record to a training sample, chosen by INPUT.MAPPER."""

from detectron2.data import DatasetMapper
from detectron2.utils.registry import Registry
from PIL import Image

DATASET_MAPPER_REGISTRY = Registry("DATASET_MAPPER")
DATASET_MAPPER_REGISTRY.__doc__ = """
Classes for INPUT.MAPPER. Called as ``mapper(cfg, is_train)``, they return a callable from one record
of a data set to the sample that a model takes.
"""


@DATASET_MAPPER_REGISTRY.register()
class CountingMapper(DatasetMapper):
    """Detectron2's :class:`DatasetMapper`, which also marks the samples of greyscale files.

    Detectron2 turns greyscale into three equal channels; the mark lets a run count them.
    Usable as ``build_detection_train_loader(cfg, mapper=CountingMapper(cfg, True))``.
    """

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image in Detectron2's data set format.

        Returns:
            dict: what :class:`DatasetMapper` returns, plus ``greyscale`` (bool).
        """
        sample = super().__call__(dataset_dict)
        with Image.open(dataset_dict["file_name"]) as image:  # reads the header only
            sample["greyscale"] = image.mode in ("1", "L", "LA")
        return sample


def build_mapper(cfg, is_train):
    """The mapper that INPUT.MAPPER names.

    Raises:
        ValueError: there is no such mapper; names the key and those that exist.
    """
    name = cfg.INPUT.MAPPER
    if name not in DATASET_MAPPER_REGISTRY:
        known = ", ".join(known for known, _ in DATASET_MAPPER_REGISTRY)
        raise ValueError(f"INPUT.MAPPER: {name!r} is not one of {known}")
    return DATASET_MAPPER_REGISTRY.get(name)(cfg, is_train)
