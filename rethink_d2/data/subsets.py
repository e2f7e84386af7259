"""Subsets of COCO-format data sets: draws that come out the same everywhere, and the paper's small COCO sets.

A draw ranks the source's images by the SHA-256 of ``<source>:<seed>:<image id>`` and takes the first ones:
neither the file's order nor a library's random numbers matter, and draws of one seed are nested. Of a source
with keypoints, only the images with a labelled person (``num_keypoints`` above 0, no crowd) are ranked.

Importing this module registers these names for the sources ``coco_2017_train`` and
``keypoints_coco_2017_train``, and some of built-in data; it reads no file.

=========================  ==================================================================================
``<source>_35k``           val35k, exactly: the images of val2014 that are in train2017 (paper, section 5.2);
                           needs ``instances_val2014.json``; for keypoints the same images, persons or not
``<source>_35k_sampled``   a draw of as many images, 35,504; it contains the smaller draws, val35k does not
``<source>_10k``           draws of 10,000, 3,500 and 1,000 images; which ones the paper drew is unpublished
``<source>_3.5k``
``<source>_1k``
``<draw>_seed1``..``9``    other draws of the same sizes; the seed of the names above is 0
=========================  ==================================================================================

``glyphs_train_35k``, ``_10k``, ``_3.5k`` and ``_1k`` are draws of 600, 169, 59 and 17 of the 2,000 pictures
of ``glyphs_train``, their share of COCO's.

``python -m rethink_d2.data.subsets coco_2017_train_1k --ids`` prints which images they are.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import os
import sys
import warnings
from dataclasses import astuple, dataclass

import msgspec
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager
from filelock import FileLock

from ..files import replace_atomically
from ._index_build import pieces, read_text
from .content import content_digest
from .files import is_generated, remedy
from .glyphs import CACHE_ENV, cache_root

logger = logging.getLogger(__name__)

PREFIX = "subset://"
VAL35K = 35_504
DRAWS = {"35k_sampled": VAL35K, "10k": 10_000, "3.5k": 3_500, "1k": 1_000}
TRAIN2017 = 118_287


@dataclass(frozen=True)
class Subset:
    """Which images of another data set a subset holds; ``MetadataCatalog.get(name).subset``.

    Attributes:
        source (str): the registered data set that it is part of.
        size (int): number of images; with ``images_of``, the number that is expected.
        seed (int): of the draw.
        images_of (str or None): instead of a draw, the images that this data set has too.
    """

    source: str
    size: int
    seed: int = 0
    images_of: str | None = None

    @property
    def reads(self):
        """The data sets whose annotation files it is made from."""
        return [self.source] if self.images_of is None else [self.source, self.images_of]


def rank(ids, name, seed):
    """Order image ids by a hash that is keyed by the data set and the seed.

    Args:
        ids (Iterable[int]): in any order.
        name (str): the data set that they belong to.
        seed (int): another seed, another order.

    Returns:
        list[int]
    """
    return sorted(ids, key=lambda i: hashlib.sha256(f"{name}:{seed}:{i}".encode()).digest())


def sample(ids, size, name, seed):
    """The first ``size`` of :func:`rank`.

    Raises:
        ValueError: there are fewer ids, or ``size`` is not positive.
    """
    ranked = rank(ids, name, seed)
    if not 0 < size <= len(ranked):
        raise ValueError(f"{name}: {size} images asked for, but there are {len(ranked)} to choose from")
    return ranked[:size]


def digest(ids):
    """SHA-256 over the ascending ids, one per line without a last newline, as hexadecimal digits."""
    return hashlib.sha256("\n".join(map(str, sorted(ids))).encode()).hexdigest()


def register_subset(name, source, size, seed=0, images_of=None):
    """Register a part of a COCO-format data set under a name of its own; no file is read.

    Its metadata is its source's, but for ``json_file``: that holds the subset's images only, so that
    Detectron2's ``COCOEvaluator`` scores nothing else. It is a path for Detectron2's ``PathManager``, whose
    ``get_local_path`` and ``open`` make the file at first use; it is kept in ``subsets_v1`` below
    :func:`rethink_d2.data.glyphs.cache_root`.

    Args:
        name (str): the new name.
        source (str): a registered data set with ``json_file`` and ``image_root``.
        size (int): number of images to draw; with ``images_of``, the number that is expected.
        seed (int): of the draw.
        images_of (str or None): a COCO-format data set; instead of a draw, take the images that it has too.

    Raises:
        ValueError: a data set that is not registered, or not in COCO format.
    """
    subset = Subset(source, size, seed, images_of)
    for read in subset.reads:
        if read not in DatasetCatalog.list() or not MetadataCatalog.get(read).get("json_file"):
            raise ValueError(f"{name}: {read} is not a registered data set in COCO format; register it first")
    own = {"name": name, "json_file": PREFIX + name, "subset": subset}
    if images_of is None:
        own["num_images"] = size
    inherited = MetadataCatalog.get(source).as_dict()
    inherited.pop("num_images", None)
    DatasetCatalog.register(name, functools.partial(_load, name))
    MetadataCatalog.get(name).set(**{**inherited, **own})


def subset_ids(name):
    """The ids of a subset's images, ascending.

    Args:
        name (str): a registered subset.

    Raises:
        ValueError: not a subset; a file that is missing or damaged; too few images.
        OSError: the cache cannot be written.
    """
    return sorted(_Coco(ensure(name)).image_ids())


def ensure(name):
    """Make sure that a subset's own annotation file exists; safe with several processes at once.

    Returns:
        str: its path. The name holds a digest of what it was made from, so a changed source gets a new one.

    Raises:
        As :func:`subset_ids`.
    """
    subset = MetadataCatalog.get(name).get("subset") if name in DatasetCatalog.list() else None
    if subset is None:
        found = {n: MetadataCatalog.get(n).get("subset") for n in DatasetCatalog.list()}
        names = ", ".join(n for n, s in found.items() if s and not s.seed)
        raise ValueError(f"{name} is not a subset; there are {names}, and other seeds of draws")
    paths = [_source_file(read, name) for read in subset.reads]
    sources = json.dumps([astuple(subset), *map(content_digest, paths)])
    key = hashlib.sha256(sources.encode()).hexdigest()[:16]
    path = cache_root() / "subsets_v1" / f"{name}-{key}.json"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / f".{path.name}.lock"):
                if not path.exists():
                    with replace_atomically(path) as f:
                        f.write(_cut(subset, paths))
        except OSError as e:
            raise OSError(
                f"cannot write {path} ({e}); set {CACHE_ENV} to a folder that can be written to"
            ) from e
    return str(path)


def _source_file(data_set, name):
    path = PathManager.get_local_path(MetadataCatalog.get(data_set).json_file)
    if not os.path.isfile(path) and is_generated(data_set):
        DatasetCatalog.get(data_set)  # which draws it
    if not os.path.isfile(path):
        raise ValueError(f"{name} needs {path}, which is not there; {remedy(name)}")
    return path


class _Image(msgspec.Struct):
    id: int | str


class _Box(msgspec.Struct):
    image_id: int | str
    num_keypoints: int = 0
    iscrowd: int = 0


class _Coco:
    """A COCO file, of which little is parsed: as objects, one of train2017's size takes gigabytes."""

    def __init__(self, path):
        self._path = path
        with self._explained():
            self._values = msgspec.json.decode(read_text(path), type=dict[str, msgspec.Raw])
            self._values["images"]

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except (OSError, ValueError, KeyError) as e:
            reason = f"{type(e).__name__}: {e}"
            raise ValueError(f"{self._path} cannot be read as COCO annotations ({reason})") from e

    def entries(self, key, kind):
        """Pairs of an entry's text and the entry as a msgspec type."""
        decoder = msgspec.json.Decoder(kind)
        with self._explained():
            for piece, _ in pieces(self._values.get(key, b"[]"), msgspec.Raw):
                for text in piece:
                    yield text, decoder.decode(text)

    def image_ids(self):
        return {image.id for _, image in self.entries("images", _Image)}

    def cut(self, ids):
        """The text of this file without other images and their annotations."""
        images = [bytes(text) for text, image in self.entries("images", _Image) if image.id in ids]
        boxes = [bytes(text) for text, box in self.entries("annotations", _Box) if box.image_id in ids]
        kept = {"images": images, "annotations": boxes}
        arrays = {key: msgspec.Raw(b"[" + b",".join(texts) + b"]") for key, texts in kept.items()}
        return msgspec.json.encode({key: arrays.get(key, value) for key, value in self._values.items()})


def _candidates(coco, source):
    """The ids of the images that a draw chooses from, given the source's annotations."""
    ids = coco.image_ids()
    if not MetadataCatalog.get(source).get("keypoint_names"):
        return ids
    boxes = (box for _, box in coco.entries("annotations", _Box))
    labelled = ids.intersection(b.image_id for b in boxes if b.num_keypoints > 0 and not b.iscrowd)
    logger.info("%s: %d of %d images have labelled keypoints", source, len(labelled), len(ids))
    return labelled


def _cut(subset, paths):
    """The text of a subset's own file; ``paths`` are the files of ``subset.reads``."""
    coco = _Coco(paths[0])
    if subset.images_of is None:
        ids = set(sample(_candidates(coco, subset.source), subset.size, subset.source, subset.seed))
    else:
        ids = coco.image_ids() & _Coco(paths[1]).image_ids()
        if not ids:
            raise ValueError(f"{paths[1]} has none of the images of {paths[0]}; is it the right file?")
    return coco.cut(ids)


def _load(name):
    meta = MetadataCatalog.get(name)
    records = load_coco_json(meta.json_file, meta.image_root, name)
    report(name, [record["image_id"] for record in records])
    return records


def report(name, ids):
    """Log which images were loaded of a subset, and whether they are as many as expected."""
    logger.info(_describe(name, ids))
    expected = MetadataCatalog.get(name).subset.size
    if len(ids) != expected:
        logger.warning("%s: %d images, where %d are expected", name, len(ids), expected)


def _describe(name, ids):
    subset = MetadataCatalog.get(name).subset
    how = f"also in {subset.images_of}" if subset.images_of else f"seed {subset.seed}"
    return f"{name}: {len(ids)} images of {subset.source}, {how}, sha256 of ids {digest(ids)}"


class SubsetHandler(PathHandler):
    """Lets Detectron2's ``PathManager`` make the file behind ``subset://<name>`` when it is asked for."""

    def _get_supported_prefixes(self):
        return [PREFIX]

    def _get_local_path(self, path, **kwargs):
        return ensure(path.removeprefix(PREFIX))

    def _open(self, path, mode="r", **kwargs):
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


def _register_coco():
    for source in ("coco_2017_train", "keypoints_coco_2017_train"):
        register_subset(f"{source}_35k", source, VAL35K, images_of="coco_2014_val")
        for short, size in DRAWS.items():
            for seed in range(10):
                suffix = f"_seed{seed}" if seed else ""
                register_subset(f"{source}_{short}{suffix}", source, size, seed)


def _register_glyphs():
    images = MetadataCatalog.get("glyphs_train").num_images
    for short, size in DRAWS.items():
        name = f"glyphs_train_{short.removesuffix('_sampled')}"
        register_subset(name, "glyphs_train", round(size / TRAIN2017 * images))


def cli(argv=None):
    """The command line.

    Returns:
        int: 0, or 2 where the name or a file is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.data.subsets", description="Print which images a subset holds."
    )
    parser.add_argument("name", help="a registered subset, e.g. coco_2017_train_1k")
    parser.add_argument("--ids", action="store_true", help="print the ids too, one per line")
    args = parser.parse_args(argv)
    try:
        ids = subset_ids(args.name)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"# {_describe(args.name, ids)}")
    if args.ids:
        print(*ids, sep="\n")
    return 0


if __name__ == "__main__":
    # The package imports this module to register its names, so here it runs a second time.
    from rethink_d2.data import subsets

    sys.exit(subsets.cli())
else:
    PathManager.register_handler(SubsetHandler())
    _register_coco()
    _register_glyphs()
    # Of `python -m`, about that second time.
    warnings.filterwarnings("ignore", f"'{__name__}' found in sys.modules", RuntimeWarning)
