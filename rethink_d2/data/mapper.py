"""Detectron2's mapper, noting what it met on the way."""

from detectron2.data import DatasetMapper
from PIL import Image


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
