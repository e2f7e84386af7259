"""Reading COCO JSON piece by piece, and the file that data/index.py keeps of it.

An index file is lines, arrays, a header and where the header begins. Lines are JSON texts: for every image, in
ascending order of ids, its file name and then its annotations, so that one image's are together. Masks are
taken over as text: parsing 60 million coordinates into objects is what makes a COCO file slow to load.
"""

import hashlib
import mmap
import os
import re
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import numpy as np
from msgspec import UNSET, DecodeError, Meta, Raw, Struct, UnsetType
from msgspec.json import Decoder, Encoder, decode, format
from tqdm import tqdm

from ..files import replace_atomically

__all__ = ["Header", "Unfit", "build", "pieces", "read_header", "read_text"]

MAGIC = b"rd2idx01"
_TRAILER = struct.Struct("<Q8s")  # where the header begins; MAGIC
_PIECE = 1 << 24  # bytes of JSON parsed at a time
_BATCH = 1 << 14  # lines written at a time
# Where one object of an array may end and the next begin.
_BETWEEN = re.compile(rb"\}\s*,")

_Id = Annotated[int, Meta(ge=-(2**63), lt=2**63)]
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
            ``keypoints`` (visible ones); ``line`` and ``first``, with one more entry at the end, are its first
            byte and its first annotation. By annotation: ``category``, ``crowd``, ``unusable`` (nothing of
            the box is in the image).
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
            except DecodeError:
                if not found or _is_closed(piece):
                    raise
                searched = found.end()
            else:
                break
        yield elements, following - start
        start = following


def _is_closed(text):
    try:
        decode(text, type=Raw)
    except DecodeError:
        return False
    return True


def build(json_file, path):
    """Write the index of a COCO file; it appears whole or not at all.

    Args:
        json_file (str), path (str): the file to read, and the one to write.

    Raises:
        msgspec.DecodeError, Unfit: the file is not what an index can hold.
        OSError: from the file system.
    """
    text = read_text(json_file)
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryFile(dir=os.path.dirname(path)) as lines:
        digest = pool.submit(lambda: hashlib.sha256(text).hexdigest())
        document = decode(text, type=_Document)
        images = _images(document)
        categories = sorted((c.id, c.name) for c in document.categories)
        sizes = [_write_lines(lines, [image.file_name for image in images])]
        found = _Annotations(images, categories, "minival" in json_file)
        with tqdm(
            total=len(memoryview(document.annotations)),
            desc=f"index of {os.path.basename(json_file)}",
            unit="B",
            unit_scale=True,
            disable=None,  # no bar where standard error is a file
        ) as bar:
            for piece, length in pieces(document.annotations, _Annotation):
                sizes.append(_write_lines(lines, found.add(piece)))
                bar.update(length)
        arrays = found.arrays()
        # The file name of every image, then the annotations in the file's order.
        row = np.concatenate([np.arange(len(images)), arrays.pop("row")])
        lines.flush()
        with replace_atomically(path) as f:
            order = np.argsort(row, kind="stable")
            begins = _write_sorted(f, lines, np.concatenate(sizes), order)
            arrays["first"] = np.searchsorted(row[order], np.arange(len(images) + 1))
            arrays["line"] = begins[arrays["first"]]
            arrays["first"] -= np.arange(len(images) + 1)  # without the lines of file names
            for name in ("category", "crowd", "unusable"):
                arrays[name] = arrays[name][order[order >= len(images)] - len(images)]
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
    """Turns annotations into lines, piece by piece, and collects what is kept as arrays."""

    def __init__(self, images, categories, ids_may_repeat):
        self._image_ids = np.array([i.id for i in images])
        self._sizes = np.array([(i.width, i.height) for i in images], float)
        self._other = {
            "id": self._image_ids,
            "height": np.array([i.height for i in images]),
            "width": np.array([i.width for i in images]),
        }
        self._keypoints = np.zeros(len(images), int)
        self._categories = {category: position for position, (category, _) in enumerate(categories)}
        self._ids_may_repeat = ids_may_repeat  # as Detectron2 data/datasets/coco.py allows
        self._ids, self._parts = [], []
        self.unmatched = self.without_polygon = 0

    def add(self, annotations):
        """Take in a list of _Annotation; returns the lines of those that are kept."""
        rows = self._rows(annotations)
        self._ids.append(np.array([a.id for a in annotations], int)[rows >= 0])
        self.unmatched += int((rows < 0).sum())
        lines, kept, boxes = [], [], []
        for annotation, row in zip(annotations, rows.tolist(), strict=True):
            if row < 0:
                continue
            if annotation.ignore:
                raise Unfit(f'annotation {annotation.id} has "ignore"')
            mask = _mask(annotation.segmentation)
            if mask is None:
                self.without_polygon += 1
                continue
            category = self._categories.get(annotation.category_id)
            if category is None:
                raise Unfit(f"annotation {annotation.id} is of a category that is not listed")
            if points := annotation.keypoints:
                self._keypoints[row] += sum(visible > 0 for visible in points[2::3])
            lines.append(
                _Line(annotation.iscrowd, annotation.bbox, annotation.keypoints, category, mask)
            )
            kept.append((row, category, annotation.iscrowd not in (UNSET, 0)))
            boxes.append(annotation.bbox)
        if lines:
            row, category, crowd = np.array(kept).T
            self._parts.append(
                (row, category.astype(np.int32), crowd.astype(bool), self._outside(np.array(boxes), row))
            )
        return lines

    def _rows(self, annotations):
        """Positions of the annotations' images, -1 where there is no such image."""
        wanted = np.array([a.image_id for a in annotations], int)
        rows = np.searchsorted(self._image_ids, wanted).clip(max=len(self._image_ids) - 1)
        return np.where(self._image_ids[rows] == wanted, rows, -1)

    def _outside(self, boxes, row):
        """Whether nothing of a box is in its image: with BoxMode.convert's rounding to single precision."""
        low, size = boxes[:, :2].astype(np.float32), boxes[:, 2:].astype(np.float32)
        return ~(np.minimum(low + size, self._sizes[row]) > np.maximum(low, 0)).all(1)

    def arrays(self):
        """By name; ``row`` is an annotation's image, and annotations are in the file's order."""
        if not self._ids_may_repeat and self._ids:
            ids = np.concatenate(self._ids)
            if len(np.unique(ids)) < len(ids):
                raise Unfit("an annotation id comes twice")
        none = (np.zeros(0, int), np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, bool))
        by_annotation = (np.concatenate(part) for part in zip(none, *self._parts, strict=True))
        names = ("row", "category", "crowd", "unusable")
        return {
            **self._other,
            "keypoints": self._keypoints,
            **dict(zip(names, by_annotation, strict=True)),
        }


_MASK = Decoder(list[list[_Number]] | dict[str, Any] | None)
_ENCODER = Encoder()


def _mask(raw):
    """The text of a mask without polygons of fewer than 3 points, as Detectron2 data/datasets/coco.py has it.

    Returns:
        Raw, UNSET for no mask, or None where no polygon is left.
    """
    mask = _MASK.decode(raw)
    if not mask:
        return UNSET
    if isinstance(mask, dict):
        return raw
    valid = [polygon for polygon in mask if len(polygon) % 2 == 0 and len(polygon) >= 6]
    if len(valid) == len(mask):
        return raw
    return Raw(_ENCODER.encode(valid)) if valid else None


def _write_lines(f, values):
    """Append values to a file, a line each; returns the lengths of the lines."""
    text = _ENCODER.encode_lines(values)
    f.write(text)
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
    return np.diff(ends, prepend=0)


def _write_sorted(f, lines, sizes, order):
    """Copy lines in another order; returns where they begin, and where the last one ends."""
    starts = np.cumsum(sizes) - sizes
    text = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        spans = zip(starts[batch].tolist(), (starts + sizes)[batch].tolist(), strict=True)
        f.write(b"".join([text[start:stop] for start, stop in spans]))
    return np.concatenate([[0], np.cumsum(sizes[order])])


def _finish(f, arrays, digest, categories, found):
    spans = {}
    for name, values in arrays.items():
        f.write(bytes(-f.tell() % 8))
        spans[name] = (values.dtype.str, f.tell(), len(values))
        f.write(values.tobytes())
    start = f.tell()
    header = Header(digest, categories, found.unmatched, found.without_polygon, spans)
    f.write(_ENCODER.encode(header) + _TRAILER.pack(start, MAGIC))


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
    if magic != MAGIC:
        raise Unfit("it does not end as an index does")
    return decode(text[start : -_TRAILER.size], type=Header)
