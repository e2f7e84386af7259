"""The built-in data: pictures of letters, drawn here and therefore available offline.

A deterministic generator writes genuine JPEG files and COCO JSON (boxes, polygons, keypoints), at the first
use of a data set, into a folder under :func:`cache_root`. Importing this module only registers names.

=========================================  ==========================================================
``glyphs_train``, ``glyphs_val``           2,000 and 400 pictures, 20 classes, boxes and masks
``glyphs_train_100``, ``glyphs_val_100``   the first 100 pictures of ``glyphs_train``, ``glyphs_val``
``glyphs_tiny_train``, ``glyphs_tiny_val`` 32 and 16 pictures, for tests
``glyphs_keypoints_<split>``               the pictures of ``glyphs_<split>``, with four keypoints a letter
``glyphs_classify_train``, ``..._val``     4,000 and 480 single characters, of classes that are not above
=========================================  ==========================================================
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from . import _glyph_render as render
from ._glyph_render import CLASSIFICATION_CLASSES, DETECTION_CLASSES, KEYPOINT_NAMES

__all__ = [
    "CACHE_ENV",
    "CLASSIFICATION_CLASSES",
    "DETECTION_CLASSES",
    "KEYPOINT_FLIP_MAP",
    "KEYPOINT_NAMES",
    "KEYPOINT_OKS_SIGMAS",
    "GlyphCacheError",
    "cache_root",
    "classification_root",
    "ensure",
    "register",
]

CACHE_ENV = "RETHINK_D2_CACHE"
KEYPOINT_FLIP_MAP: tuple[tuple[str, str], ...] = (("left", "right"),)
KEYPOINT_OKS_SIGMAS: tuple[float, ...] = (0.075, 0.075, 0.075, 0.075)
"""For ``cfg.TEST.KEYPOINT_OKS_SIGMAS``: 0.075 is about that of a person's shoulders in COCO."""

_LOG = logging.getLogger(__name__)


class GlyphCacheError(OSError):
    """The built-in data could not be written (or read back) under the cache folder."""


@dataclass(frozen=True)
class _Split:
    """A folder of pictures: where it is, what seeds it, and how many pictures it has."""

    folder: str
    stream: str
    count: int
    kind: str = "detect"


# Splits of one stream share their first pictures; a subset is drawn anew, to need no larger set.
_SPLITS: dict[str, _Split] = {
    "train": _Split("train", "train", 2000),
    "val": _Split("val", "val", 400),
    "train_100": _Split("train_100", "train", 100),
    "val_100": _Split("val_100", "val", 100),
    "tiny_train": _Split("tiny_train", "tiny_train", 32),
    "tiny_val": _Split("tiny_val", "tiny_val", 16),
    "classify_train": _Split("classify/train", "classify_train", 4000, "classify"),
    "classify_val": _Split("classify/val", "classify_val", 480, "classify"),
}


def cache_root() -> Path:
    """The folder for generated data: no folder is made by this.

    Returns:
        The value of ``RETHINK_D2_CACHE`` if set, else ``rethink_d2`` within ``XDG_CACHE_HOME``, else within
        ``~/.cache`` if HOME is a folder one can write to, else a folder of the user's within the system's one
        for temporary files. Always absolute.
    """
    if own := os.environ.get(CACHE_ENV):
        return Path(own).expanduser().absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "rethink_d2"
    home = os.environ.get("HOME", "")
    if home and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return Path(home).absolute() / ".cache" / "rethink_d2"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"rethink_d2-{user}"


def _version_folder() -> str:
    digest = hashlib.sha256(json.dumps(render.PARAMS, sort_keys=True).encode()).hexdigest()
    return f"glyphs_v{render.PARAMS['version']}_{digest[:10]}"


def _split_dir(root: Path, split: str) -> Path:
    return root / _version_folder() / _SPLITS[split].folder


# ---------------------------------------------------------------- writing


def _draw(out: str, split: _Split, index: int) -> dict[str, Any]:
    """Writes one picture and returns its record, ready for JSON."""
    if split.kind == "classify":
        image, label = render.render_single(split.stream, index)
        name, letters = f"{list(CLASSIFICATION_CLASSES)[label]}/{index:06d}.jpg", []
    else:
        image, letters = render.render_scene(split.stream, index)
        name, label = f"images/{index:06d}.jpg", -1
    height, width = image.shape[:2]
    Image.fromarray(image).save(os.path.join(out, name), quality=render.PARAMS["jpeg_quality"])
    annotations = []
    for letter in letters:
        points = np.concatenate(letter["polygons"])
        low, high = points.min(0), points.max(0)
        # Simplifying the outline may leave a keypoint outside by a fraction of a pixel. COCO's keypoints are
        # indices of pixels; Detectron2 adds the half again when it loads them.
        keypoints = np.clip(letter["keypoints"], low, high) - 0.5
        flat = [[round(x, 2), round(y, 2), 2] for x, y in keypoints.tolist()]
        annotations.append(
            {
                "category_id": letter["label"] + 1,
                "bbox": np.round([*low, *(high - low)], 2).tolist(),
                "area": int(letter["mask"].sum()),
                "iscrowd": 0,
                "segmentation": [np.round(p, 2).reshape(-1).tolist() for p in letter["polygons"]],
                "keypoints": [value for point in flat for value in point],
                "num_keypoints": len(flat),
            }
        )
    return {"name": name, "height": height, "width": width, "label": label, "annotations": annotations}


def _records(out: str, split: _Split, workers: int) -> Iterator[dict[str, Any]]:
    job = functools.partial(_draw, out, split)
    if workers <= 1:
        yield from map(job, range(split.count))
        return
    # A forked child could inherit a lock held by one of the parent's threads (torch, OpenCV).
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(job, range(split.count), chunksize=8)


def _coco(records: list[dict[str, Any]], keypoints: bool) -> dict[str, Any]:
    categories: list[dict[str, Any]] = [{"id": i + 1, "name": c} for i, c in enumerate(DETECTION_CLASSES)]
    if keypoints:
        for category in categories:
            category.update(keypoints=list(KEYPOINT_NAMES), skeleton=[])
    images, annotations = [], []
    for number, record in enumerate(records, 1):
        name = os.path.basename(record["name"])
        images.append({"id": number, "file_name": name, "height": record["height"], "width": record["width"]})
        for entry in record["annotations"]:
            kept = {k: v for k, v in entry.items() if keypoints or "keypoints" not in k}
            annotations.append({"id": len(annotations) + 1, "image_id": number, **kept})
    info = {"description": "rethink_d2 glyphs", "version": str(render.PARAMS["version"])}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _write(out: Path, split: _Split, workers: int) -> None:
    """Writes a whole split into the empty folder ``out``, its manifest last."""
    for name in CLASSIFICATION_CLASSES if split.kind == "classify" else ["images"]:
        (out / name).mkdir()
    drawn = _records(str(out), split, workers)
    # disable=None: no bar where standard error is a file
    records = list(tqdm(drawn, total=split.count, desc=f"glyphs {split.folder}", disable=None))
    if split.kind == "classify":
        entries = [{k: v for k, v in r.items() if k != "annotations"} for r in records]
        documents: dict[str, Any] = {"index.json": entries}
    else:
        documents = {"instances.json": _coco(records, False), "keypoints.json": _coco(records, True)}
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, separators=(",", ":")))
    (out / "manifest.json").write_text(json.dumps(_measure(out, split, list(documents)), indent=1))


# ---------------------------------------------------------------- checking and publishing


def _measure(folder: Path, split: _Split, documents: list[str]) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.glob("*/*.jpg")]
    return {
        "split": asdict(split),
        "sha256": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in documents},
        "images": len(sizes),
        "image_bytes": sum(sizes),
    }


def _is_good(folder: Path, split: _Split) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest == _measure(folder, split, list(manifest["sha256"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent or damaged: both are mended by generating


def _ensure_split(root: Path, name: str, workers: int = 0) -> Path:
    """Returns the folder of a split, generated if it is missing or damaged."""
    split, folder = _SPLITS[name], _split_dir(root, name)
    if _is_good(folder, split):  # without the lock, so that a finished cache may be read-only
        return folder
    scratch_prefix = f".{folder.name}.tmp-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder.parent / f".{folder.name}.lock")):
            if _is_good(folder, split):
                return folder
            # Only the holder of the lock writes, so these are left over from processes that were killed.
            for stale in folder.parent.glob(scratch_prefix + "*"):
                shutil.rmtree(stale)
            if folder.exists():
                _LOG.warning("%s is damaged and is generated again", folder)
            _LOG.info("Generating %d images of glyphs/%s in %s", split.count, split.folder, folder)
            start = time.perf_counter()
            scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix, dir=folder.parent))
            try:
                scratch.chmod(0o755)  # mkdtemp's 0700 would keep other users from a shared cache
                _write(scratch, split, workers)
                if folder.exists():
                    # A full folder cannot be replaced in one step; this name is swept up as scratch is.
                    os.replace(folder, folder.parent / f"{scratch_prefix}old-{os.getpid()}")
                os.replace(scratch, folder)
            finally:
                for left in folder.parent.glob(scratch_prefix + "*"):
                    shutil.rmtree(left, ignore_errors=True)
            _LOG.info("Generated in %.1f s", time.perf_counter() - start)
    except OSError as e:
        raise GlyphCacheError(
            f"cannot write the built-in data under {root} ({e.strerror or e}); set the environment variable "
            f"{CACHE_ENV} to a folder that can be written to and has 100 MB free"
        ) from e
    return folder


# ---------------------------------------------------------------- registration

_ROOTS: dict[str, Path] = {}  # name of a data set -> the root it is registered with


def _split_of(name: str) -> tuple[str, bool]:
    """Returns the split that a data set is read from, and whether with keypoints."""
    short = name.removeprefix("glyphs_")
    return short.removeprefix("keypoints_"), short.startswith("keypoints_")


def ensure(name: str, workers: int = 0) -> str:
    """Makes sure that the files of a registered data set exist, generating them if need be.

    Loading through ``DatasetCatalog`` calls it; call it before reading ``MetadataCatalog``'s ``json_file``
    without having loaded, e.g. before building a ``COCOEvaluator`` ahead of the data loader. Safe with
    several processes at once: one generates, the others wait.

    Args:
        name: e.g. ``glyphs_val``.
        workers: processes that draw; the files do not depend on it. Up to 1: this process.

    Returns:
        The path of the COCO JSON, or of ``index.json`` for the classification sets.

    Raises:
        KeyError: ``name`` is not one of this module's.
        GlyphCacheError: the cache cannot be written; nothing half-written is left.
    """
    if name not in _ROOTS:
        raise KeyError(f"{name!r} is not a built-in data set; there are {', '.join(sorted(_ROOTS))}")
    split, keypoints = _split_of(name)
    folder = _ensure_split(_ROOTS[name], split, workers)
    if _SPLITS[split].kind == "classify":
        return str(folder / "index.json")
    return str(folder / ("keypoints.json" if keypoints else "instances.json"))


def _load_detection(name: str) -> list[dict[str, Any]]:
    json_file = ensure(name)
    return load_coco_json(json_file, os.path.join(os.path.dirname(json_file), "images"), name)


def _load_classification(name: str) -> list[dict[str, Any]]:
    index = Path(ensure(name))
    return [
        {
            "file_name": str(index.parent / entry["name"]),
            "image_id": number,
            "label": entry["label"],
            "height": entry["height"],
            "width": entry["width"],
        }
        for number, entry in enumerate(json.loads(index.read_text()))
    ]


def classification_root(split: str, root: str | os.PathLike[str] | None = None) -> str:
    """Returns a folder for torchvision's ``ImageFolder``: ``<class>/<n>.jpg``, 64 by 64 pixels.

    Its classes are the keys of ``CLASSIFICATION_CLASSES``, in that order. It is generated if it is missing.

    Args:
        split: ``train`` or ``val``.
        root: the cache's folder; None: the one registered.

    Raises:
        ValueError: there is no such split.
        GlyphCacheError: the cache cannot be written.
    """
    name = f"classify_{split}"
    if name not in _SPLITS:
        raise ValueError(f"no split {split!r} of the classification set; there are 'train' and 'val'")
    base = _ROOTS[f"glyphs_{name}"] if root is None else Path(root).expanduser().absolute()
    return str(_ensure_split(base, name))


def _add(name: str, root: Path, load: Callable[[str], list[dict[str, Any]]], **metadata: Any) -> None:
    if _ROOTS.get(name) == root:
        return
    if name in _ROOTS:  # a new root; metadata cannot be changed, only begun anew
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, functools.partial(load, name))
    MetadataCatalog.get(name).set(**metadata)
    _ROOTS[name] = root


def register(root: str | os.PathLike[str] | None = None) -> None:
    """Registers the data sets of this module with Detectron2; nothing is read or generated yet.

    Called once at import. Calling it again does nothing, unless the root is another one than before (also
    when the environment has changed since): then the names refer to the new root.

    Args:
        root: the cache's folder; None: :func:`cache_root`.
    """
    base = cache_root() if root is None else Path(root).expanduser().absolute()
    for split, spec in _SPLITS.items():
        folder = _split_dir(base, split)
        if spec.kind == "classify":
            classes = list(CLASSIFICATION_CLASSES)
            _add(
                f"glyphs_{split}",
                base,
                _load_classification,
                image_root=str(folder),
                evaluator_type="classification",
                num_images=spec.count,
                classes=classes,
            )
            continue
        common = {
            "image_root": str(folder / "images"),
            "evaluator_type": "coco",
            "num_images": spec.count,
            "thing_classes": list(DETECTION_CLASSES),
            "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(DETECTION_CLASSES))},
        }
        _add(f"glyphs_{split}", base, _load_detection, json_file=str(folder / "instances.json"), **common)
        _add(
            f"glyphs_keypoints_{split}",
            base,
            _load_detection,
            json_file=str(folder / "keypoints.json"),
            keypoint_names=list(KEYPOINT_NAMES),
            keypoint_flip_map=list(KEYPOINT_FLIP_MAP),
            **common,
        )


register()
