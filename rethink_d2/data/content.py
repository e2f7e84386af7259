"""The hash of a file's content, computed once: what is made from a file is named by it.

A stamp below :func:`rethink_d2.data.glyphs.cache_root` says of which path, size, times and inode a hash is.
As long as it fits, the file is not read. Both times belong to it, because tools that copy and unpack set
the time of the last change back, but cannot set that of the inode.
"""

import contextlib
import functools
import glob
import hashlib
import os
from pathlib import Path

from ..files import read_json, write_json
from .glyphs import cache_root

__all__ = ["content_digest", "known_digests"]

_VERSION = "digests_v1"


def content_digest(path):
    """SHA-256 of a file, as hexadecimal digits.

    Raises:
        OSError: the file cannot be read. A cache that cannot be written is done without.
    """
    path, stat = os.path.abspath(path), os.stat(path)
    return _digest((path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino), cache_root())


@functools.lru_cache
def _digest(stamp, root):
    path, stamp = Path(stamp[0]), list(stamp)
    key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    file = root / _VERSION / f"{path.stem}-{key}.json"
    known = _read(file)
    if known.get("stamp") == stamp:
        return known["sha256"]
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    with contextlib.suppress(OSError):
        write_json(file, {"stamp": stamp, "sha256": digest})
    return digest


def _read(file):
    try:
        return read_json(file, {})
    except (OSError, ValueError):  # as good as none
        return {}


def known_digests(stem):
    """The digests that stamps name, of files called ``<stem>.*`` (set[str])."""
    files = (cache_root() / _VERSION).glob(f"{glob.escape(stem)}-{'[0-9a-f]' * 16}.json")
    return {known["sha256"] for known in map(_read, files) if known}
