"""Checkpoints that are whole or not there, with a checksum, and which of them to keep.

``model_0000099.pth`` is the state after iteration 99, that is after 100 steps, as Detectron2 names it.
Beside it ``model_0000099.pth.sha256`` (as sha256sum writes it) proves that it is whole, and
``last_checkpoint`` names the newest one. ``model_final.pth`` and ``model_best.pth`` are further names of
one of them. Files hold tensors and plain Python values only, so that they load with ``weights_only``.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from ..files import write_atomically

__all__ = ["CheckpointError", "CheckpointStore", "checkpoints", "digest", "is_whole", "read"]

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"model_(\d{7,})\.pth")
_TEMPORARY = ".writing-"
POINTER = "last_checkpoint"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


def checkpoints(folder):
    """List the numbered checkpoints of a run folder.

    Returns:
        dict[int, str]: path by last finished iteration, newest first; whole or not.
    """
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        match = _NUMBERED.fullmatch(name)
        if match:
            found[int(match[1])] = os.path.join(folder, name)
    return dict(sorted(found.items(), reverse=True))


def digest(path):
    """The sha256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_whole(path):
    """Whether a checkpoint has a checksum and matches it."""
    try:
        with open(f"{path}.sha256") as f:
            return f.read().split()[0] == digest(path)
    except (OSError, IndexError):
        return False


def read(path):
    """Read a checkpoint into CPU memory, mapped where possible.

    Raises:
        CheckpointError: it cannot be read; names the file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read ({type(e).__name__}: {e})") from e


def _to_cpu(value):
    """A copy that later training steps do not reach."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _to_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_cpu(v) for v in value)
    return value


def _replace(source, target):
    """Give a file a second name, replacing what had it; a copy where the disk has no hard links."""
    temporary = os.path.join(os.path.dirname(target), _TEMPORARY + os.path.basename(target))
    if os.path.exists(temporary):
        os.unlink(temporary)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    # Replacing a name of the same file does nothing.
    if os.path.exists(temporary):
        os.unlink(temporary)


class CheckpointStore:
    """Writes the checkpoints of one run folder. Used by the main process alone.

    Args:
        folder (str): the run folder; what an interrupted write left there is removed.
        keep (int): how many of the newest to keep; 0 for all.
        keep_always (iterable[int]): iterations whose checkpoints stay in any case.
        required (bool): raise when one cannot be written; else report it and go on.
        background (bool): write on a thread, from a copy of the state.
    """

    def __init__(self, folder, *, keep=0, keep_always=(), required=True, background=False):
        self.folder = folder
        self._keep, self._keep_always, self._required = keep, frozenset(keep_always), required
        self._thread = ThreadPoolExecutor(1) if background else None
        self._pending = None
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            alone = name.endswith(".pth.sha256") and not os.path.exists(path.removesuffix(".sha256"))
            if name.startswith(_TEMPORARY) or alone:
                os.unlink(path)

    @property
    def failed(self):
        """Whether a write in the background has failed: a state written now may yet save the run."""
        return self._pending is not None and self._pending.done() and bool(self._pending.exception())

    def save(self, iteration, state, names=()):
        """Write the state after an iteration; any earlier write is completed first.

        In the background a failure shows later; the next state is then written at once.

        Args:
            iteration (int): the last finished one.
            state (dict): tensors on any device and plain values.
            names (iterable[str]): further names for it, such as "model_final".

        Raises:
            CheckpointError: it could not be written; in the background, neither could the one before.
        """
        if self._thread and not self._settle():
            self._pending = self._thread.submit(self._write, iteration, _to_cpu(state), names)
        else:
            self._write(iteration, state, names)

    def holds(self, iteration):
        """Whether the checkpoint of an iteration is there and whole; any earlier write is completed first."""
        self._settle()
        return is_whole(self._path(iteration))

    def also(self, iteration, name):
        """Give the newest checkpoint, that of this iteration, a further name, such as "model_best".

        Raises:
            CheckpointError: it could not be.
        """
        self.wait()
        path = self._path(iteration)
        with self._reporting(path):
            self._complete(path, [name])

    def wait(self):
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: the last write in the background failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _settle(self):
        """As :meth:`wait`, where another write is to follow; returns and reports a failure."""
        try:
            self.wait()
        except CheckpointError as e:
            logger.error("%s. Trying again", e)
            return e

    def _path(self, iteration):
        return os.path.join(self.folder, f"model_{iteration:07d}.pth")

    def _write(self, iteration, state, names):
        path = self._path(iteration)
        with self._reporting(path):
            self._write_file(path, state)
            self._complete(path, names)

    @contextlib.contextmanager
    def _reporting(self, path):
        """Say what to do where a file cannot be written, and go on without it if that is allowed."""
        try:
            yield
        except OSError as e:
            message = (
                f"{path} could not be written ({e.strerror or e}); earlier checkpoints are as they were. "
                "Free space, or keep fewer with SOLVER.CHECKPOINT_KEEP; SOLVER.CHECKPOINT_REQUIRED False "
                "trains on without it"
            )
            if self._required:
                raise CheckpointError(message) from e
            logger.error(message)

    def _write_file(self, path, state):
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=_TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)
            self._write_checksum(path, digest(temporary))
            os.replace(temporary, path)
        except BaseException as e:
            os.unlink(temporary)
            if isinstance(e, RuntimeError):  # torch's writer hides the cause that the system gave
                raise OSError(f"{e}".splitlines()[0]) from e
            raise

    def _write_checksum(self, path, checksum):
        # Before the file: a first one without checksum would leave a run that cannot be resumed.
        write_atomically(f"{path}.sha256", f"{checksum}  {os.path.basename(path)}\n")

    def _complete(self, path, names):
        for name in names:
            target = os.path.join(self.folder, f"{name}.pth")
            with open(f"{path}.sha256") as f:
                self._write_checksum(target, f.read().split()[0])
            _replace(path, target)
        write_atomically(os.path.join(self.folder, POINTER), os.path.basename(path))
        self._prune()

    def _prune(self):
        if not self._keep:
            return
        for iteration, path in list(checkpoints(self.folder).items())[self._keep :]:
            if iteration not in self._keep_always:
                for name in (path, f"{path}.sha256"):
                    if os.path.exists(name):
                        os.unlink(name)
