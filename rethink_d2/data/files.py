"""The files that a registered data set reads."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

# Generated when first read, so their files are never missing, and no COCO recipe fits them.
GENERATED = "glyphs_"


def data_paths(name):
    """List the files and folders that a registered data set reads.

    Args:
        name (str): a registered data set.

    Returns:
        tuple[list[str], str or None]: the paths, and among them VOC's list of image ids.
    """
    meta = MetadataCatalog.get(name)
    paths = [meta.get(key) for key in ("json_file", "image_root", "dirname")]
    split = None
    if meta.get("dirname") and meta.get("split") and meta.get("year"):
        split = os.path.join(meta.dirname, "ImageSets", "Main", f"{meta.split}.txt")
        paths.append(split)
    return [p for p in paths if p], split


def missing_files(name):
    """List what a data set needs that is not there.

    Args:
        name (str): a data set; an unregistered one lacks itself.

    Returns:
        list[str]: paths as they were tried; empty when it can be read, or is generated on demand.
    """
    if name not in DatasetCatalog.list():
        return [name]
    if name.startswith(GENERATED):
        return []
    return [path for path in data_paths(name)[0] if not PathManager.exists(path)]
