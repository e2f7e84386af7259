"""Reading COCO JSON piece by piece, and the file that data/index.py keeps of it.

An index file is lines of JSON, arrays, a header and where the header begins. The lines are first the images'
file names, in ascending order of ids, then the annotations in the file's order. Masks stay the text that they
are, because making objects of millions of coordinates is what takes time and memory.
"""

import hashlib
import itertools
import mmap
import os
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import numpy as np
from msgspec import UNSET, DecodeError, Meta, Raw, Struct, UnsetType, ValidationError
from msgspec.json import Decoder, Encoder, decode, format
from tqdm import tqdm

from ..files import replace_atomically
from ..garbage import without_garbage_collection

__all__ = ["Header", "Unfit", "build", "pieces", "read_header", "read_text"]

_MAGIC = b"rd2idx01"
_TRAILER = struct.Struct("<Q8s")  # where the header begins; _MAGIC
_PIECE = 1 << 24  # bytes of JSON parsed at a time
# Where one object of an array may end and the next begin.
_BETWEEN = re.compile(rb"\}\s*,")

_Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Number = int | float  # told apart, as Detectron2 does not treat boxes of integers like others


class Unfit(ValueError):
    """A file that Detectron2 reads in a way that an index does not reproduce, or refuses."""


class _Document(Struct):
    images: Raw
    categories: list["_Category"]
    annotations: Raw = Raw(b"[]")


class _Category(Struct):
    id: _Id
    name: str


class _Image(Struct):
    id: _Id
    file_name: str
    height: int
    width: int


class _Annotation(Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: Annotated[list[_Number], Meta(min_length=4, max_length=4)]
    iscrowd: int | UnsetType = UNSET
    keypoints: list[_Number] | UnsetType = UNSET
    segmentation: Raw = Raw(b"null")
    ignore: int = 0


class _RunLengths(Struct):
    size: tuple[int, int]
    counts: str | list[int]


class _Line(Struct, gc=False):
    """What an index keeps of an annotation, in the order of keys of Detectron2's records."""

    iscrowd: int | UnsetType
    bbox: list[_Number]
    keypoints: list[_Number] | UnsetType
    category_id: int
    segmentation: Raw | UnsetType


class Header(Struct):
    """What an index says of itself.

    Attributes:
        sha256 (str): of the JSON file.
        categories (list): id and name, ascending by id; the position is the ``category_id`` of records.
        unmatched (int): annotations of images that the file does not list.
        without_polygon (int): annotations left out because all their polygons have fewer than 3 points.
        arrays (dict): dtype, first byte and length by name. By image: ``id``, ``height``, ``width``,
            ``keypoints`` (visible ones), and ``first``, its first annotation, with one more entry. By
            annotation, those of an image together: ``order``, the number of its line, ``category``,
            ``crowd``, ``unusable`` (nothing of the box is in the image). By line: ``line``, its first byte,
            with one more entry.
    """

    sha256: str
    categories: list[tuple[int, str]]
    unmatched: int
    without_polygon: int
    arrays: dict[str, tuple[str, int, int]]


def read_text(path):
    """Map a file into memory, to be parsed without a copy of it.

    Raises:
        Unfit: it is empty.
        OSError: from the file system.
    """
    with open(path, "rb") as f:
        if not os.fstat(f.fileno()).st_size:
            raise Unfit("it is empty")
        return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def pieces(array, kind, size=_PIECE):
    """Parse an array of JSON objects a piece at a time, so that memory does not grow with its length.

    Args:
        array (Raw): its text.
        kind (type): of the elements, as msgspec takes it.
        size (int): bytes in a piece, about.

    Yields:
        list, int: some elements, and how many bytes of text they were.

    Raises:
        msgspec.DecodeError: an element is malformed, or not of this kind.
    """
    decoder = Decoder(list[kind])
    text = memoryview(array)
    start, end = 1, len(text) - 1  # without the brackets
    while start < end:
        searched = start + size
        while True:
            found = _BETWEEN.search(text, searched, end)
            stop, following = (found.start() + 1, found.end()) if found else (end, end)
            piece = b"".join([b"[", text[start:stop], b"]"])
            try:
                # A cut within an object, or within a string, leaves something open, which is an error here.
                elements = decoder.decode(format(piece, indent=-1) if b"\n" in piece else piece)
            except ValidationError:
                raise
            except DecodeError:
                if not found:
                    raise
                searched = found.end()
            else:
                break
        yield elements, following - start
        start = following


@without_garbage_collection()
def build(json_file, path):
    """Write the index of a COCO file; it appears whole or not at all.

    Args:
        json_file (str), path (str): the file to read, and the one to write.

    Raises:
        msgspec.DecodeError, Unfit: the file is not what an index can hold.
        OSError: from the file system.
    """
    text = read_text(json_file)
    with ThreadPoolExecutor(1) as pool, replace_atomically(path) as f:
        digest = pool.submit(lambda: hashlib.sha256(text).hexdigest())
        document = decode(text, type=_Document)
        images = _images(document)
        categories = sorted((c.id, c.name) for c in document.categories)
        found = _Annotations(images, categories, "minival" in json_file)
        sizes = [_write_lines(f, [image.file_name for image in images])]
        with tqdm(
            total=len(memoryview(document.annotations)),
            desc=f"index of {os.path.basename(json_file)}",
            unit="B",
            unit_scale=True,
            disable=None,  # no bar where standard error is a file
        ) as bar:
            for piece, length in pieces(document.annotations, _Annotation):
                sizes.append(_write_lines(f, found.add(piece)))
                bar.update(length)
        arrays = {**found.arrays(), "line": np.cumsum(np.concatenate([[0], *sizes]))}
        _finish(f, arrays, digest.result(), categories, found)


def _images(document):
    images = sorted(
        (image for piece, _ in pieces(document.images, _Image) for image in piece), key=lambda i: i.id
    )
    for what, ids in (
        ("image", [i.id for i in images]),
        ("category", [c.id for c in document.categories]),
    ):
        if not ids or len(set(ids)) < len(ids):
            raise Unfit(f"it has no {what}" if not ids else f"a {what} id comes twice")
    return images


class _Annotations:
    """Turns annotations into lines, piece by piece, and collects what is kept of them as arrays."""

    def __init__(self, images, categories, ids_may_repeat):
        self._by_image = {
            "id": np.array([i.id for i in images]),
            "height": np.array([i.height for i in images]),
            "width": np.array([i.width for i in images]),
            "keypoints": np.zeros(len(images), int),
        }
        self._categories = {category: position for position, (category, _) in enumerate(categories)}
        self._ids_may_repeat = ids_may_repeat  # as Detectron2 data/datasets/coco.py allows
        self._ids, self._parts = [], []
        self.unmatched = self.without_polygon = 0

    def add(self, annotations):
        """Take in a list of _Annotation; returns the lines of those that are kept."""
        given, rows = len(annotations), self._rows(annotations)
        annotations, rows = _where(rows >= 0, annotations, rows)
        self.unmatched += given - len(annotations)
        self._ids.append(np.array([a.id for a in annotations], int))
        if ignored := [a.id for a in annotations if a.ignore]:
            raise Unfit(f'annotation {ignored[0]} has "ignore"')
        masks = [_mask(a.segmentation) for a in annotations]
        kept = np.array([mask is not None for mask in masks], bool)
        self.without_polygon += int((~kept).sum())
        annotations, masks, rows = _where(kept, annotations, masks, rows)
        try:
            categories = [self._categories[a.category_id] for a in annotations]
        except KeyError as e:
            raise Unfit(f"category {e} of an annotation is not listed") from e
        visible = [sum(v > 0 for v in a.keypoints[2::3]) if a.keypoints else 0 for a in annotations]
        np.add.at(self._by_image["keypoints"], rows, visible)
        crowd = np.array([a.iscrowd not in (UNSET, 0) for a in annotations], bool)
        self._parts.append((rows, np.array(categories, np.int32), crowd, self._unusable(annotations, rows)))
        return [
            _Line(a.iscrowd, a.bbox, a.keypoints, category, mask)
            for a, category, mask in zip(annotations, categories, masks, strict=True)
        ]

    def _rows(self, annotations):
        """Positions of the annotations' images, -1 where there is no such image."""
        wanted, ids = np.array([a.image_id for a in annotations], int), self._by_image["id"]
        rows = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
        return np.where(ids[rows] == wanted, rows, -1)

    def _unusable(self, annotations, rows):
        """Whether nothing of a box is in its image, in single precision as BoxMode.convert computes."""
        numbers = itertools.chain.from_iterable(a.bbox for a in annotations)
        low, size = np.fromiter(numbers, np.float32).reshape(-1, 2, 2).swapaxes(0, 1)
        whole = np.stack([self._by_image["width"][rows], self._by_image["height"][rows]], 1)
        return ~(np.minimum(low + size, whole) > np.maximum(low, 0)).all(1)

    def arrays(self):
        """By name, as :class:`Header` lists them, but for ``line``."""
        ids = np.sort(np.concatenate([np.zeros(0, int), *self._ids]))
        if not self._ids_may_repeat and (ids[1:] == ids[:-1]).any():
            raise Unfit("an annotation id comes twice")
        none = (np.zeros(0, int), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, bool))
        rows, category, crowd, unusable = (
            np.concatenate(parts) for parts in zip(none, *self._parts, strict=True)
        )
        order = np.argsort(rows, kind="stable")
        images = len(self._by_image["id"])
        return {
            **self._by_image,
            "first": np.searchsorted(rows[order], np.arange(images + 1)),
            "order": order + images,  # the lines before are file names
            "category": category[order],
            "crowd": crowd[order],
            "unusable": unusable[order],
        }


def _where(kept, *sequences):
    """The elements of lists and arrays where ``kept`` is true."""
    if kept.all():
        return sequences
    return [s[kept] if isinstance(s, np.ndarray) else list(itertools.compress(s, kept)) for s in sequences]


_MASK = Decoder(list[list[_Number]] | _RunLengths | None)
_ENCODER = Encoder()


def _mask(raw):
    """The text of a mask without polygons of fewer than 3 points, as Detectron2 data/datasets/coco.py has it.

    Returns:
        Raw, UNSET for no mask, or None where no polygon is left.
    """
    mask = _MASK.decode(raw)
    if not mask:
        return UNSET
    if isinstance(mask, _RunLengths):
        return raw
    if all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
        return raw
    valid = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return Raw(_ENCODER.encode(valid)) if valid else None


def _write_lines(f, values):
    """Append values to a file, a line each; returns the lengths of the lines."""
    text = _ENCODER.encode_lines(values)
    f.write(text)
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
    return np.diff(ends, prepend=0)


def _finish(f, arrays, digest, categories, found):
    spans = {}
    for name, values in arrays.items():
        f.write(bytes(-f.tell() % 8))
        spans[name] = (values.dtype.str, f.tell(), len(values))
        f.write(values.tobytes())
    start = f.tell()
    header = Header(digest, categories, found.unmatched, found.without_polygon, spans)
    f.write(_ENCODER.encode(header) + _TRAILER.pack(start, _MAGIC))


def read_header(text):
    """The header of an index.

    Args:
        text (mmap.mmap): the whole file.

    Raises:
        ValueError: it is not one, or damaged.
    """
    if len(text) < _TRAILER.size:
        raise Unfit("it is cut off")
    start, magic = _TRAILER.unpack(text[-_TRAILER.size :])
    if magic != _MAGIC:
        raise Unfit("it does not end as an index does")
    return decode(text[start : -_TRAILER.size], type=Header)
