"""Files that appear whole or not at all."""

import contextlib
import json
import os
import tempfile


@contextlib.contextmanager
def replace_atomically(path):
    """Write a file so that a reader, or a crash, sees the old one or the new one.

    Args:
        path (str): the file; its folder is made if needed.

    Yields:
        a binary file to write to, which takes the place of `path` when the block ends.

    Raises:
        OSError: from the file system. After this or any other failure `path` is as it was.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="." + os.path.basename(path))
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomically(path, text):
    """Write `text` to `path` as :func:`replace_atomically` does."""
    with replace_atomically(path) as f:
        f.write(text.encode())


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path, default=None):
    """The JSON value in `path`, or `default` where there is no such file."""
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return default
