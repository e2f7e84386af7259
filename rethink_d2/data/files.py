"""The files that a registered data set reads."""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .voc import list_file

# Generated when first read, so their files are never missing, and no COCO recipe fits them.
GENERATED = "glyphs_"


def is_generated(name):
    """Whether a data set, or the one that it is a subset of, is drawn when it is first read."""
    while subset := MetadataCatalog.get(name).get("subset"):
        name = subset.source
    return name.startswith(GENERATED)


def data_paths(name):
    """List the files and folders that a registered data set reads.

    Args:
        name (str): a registered data set; a subset (data/subsets.py) reads what its source reads.

    Returns:
        tuple[list[str], str or None]: the paths, and among them VOC's list of image ids.
    """
    meta = MetadataCatalog.get(name)
    paths = [*_json_files(name), meta.get("image_root"), meta.get("dirname")]
    split = None
    if meta.get("dirname") and meta.get("split") and meta.get("year"):
        split = os.path.join(meta.dirname, "ImageSets", "Main", f"{meta.split}.txt")
        paths.append(split)
    for dirname, part, _ in meta.get("voc_parts", ()):
        paths += [dirname, list_file(dirname, part)]
    return list(dict.fromkeys(p for p in paths if p)), split


def _json_files(name):
    meta = MetadataCatalog.get(name)
    if subset := meta.get("subset"):
        return [path for read in subset.reads for path in _json_files(read)]
    return [meta.get("json_file")]


def missing_files(name):
    """List what a data set needs that is not there.

    Args:
        name (str): a data set; an unregistered one lacks itself.

    Returns:
        list[str]: paths as they were tried; empty when it can be read, or is generated on demand.
    """
    if name not in DatasetCatalog.list():
        return [name]
    if is_generated(name):
        return []
    return [path for path in data_paths(name)[0] if not PathManager.exists(path)]


def remedy(name):
    """What to do about the missing files of a data set.

    Returns:
        str: offers ``<name>_sampled`` where there is such a data set and it lacks nothing.
    """
    sampled = f"{name}_sampled"
    offer = "" if missing_files(sampled) else f", or take {sampled}, which does without"
    return f"set DETECTRON2_DATASETS to the folder that holds it, or fetch it{offer}"
