"""Weights are data, not programs: reading them runs nothing that the file asks for.

A pickle names functions to call, and Detectron2 calls whatever a ``.pkl`` of weights names. Here only what
arrays and plain containers need is admitted, and not even that is NumPy's own code: ``numpy.dtype`` takes
flags from a pickle that turn bytes of the file into pointers.
"""

import pickle
import re
from collections import OrderedDict

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

__all__ = ["SafeCheckpointer", "read_weights"]


class _Dtype:
    """Stands for a pickled ``numpy.dtype``: its type code and byte order alone."""

    def __init__(self, code, *_):
        self.code, self.order = code, ""

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self):
        text = f"{self.order}{self.code}"
        if not re.fullmatch(r"[<>|=]?[?biufc]\d*", text):  # numbers; no objects, no records
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({text!r})")
        return np.dtype(text)


class _Array:
    """Stands for a ``numpy.ndarray`` until its state is read."""

    value = None

    def __setstate__(self, state):
        *_, shape, dtype, fortran, data = state
        self.value = _frombuffer(data, dtype, shape, "F" if fortran else "C")


def _frombuffer(data, dtype, shape, order, axis_order=None):
    dtype = dtype.numpy()
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    # A copy: writable, and in this machine's byte order, as torch.from_numpy needs it.
    array = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    if order == "K" and axis_order is not None:
        return array.reshape(shape).transpose(axis_order)
    return array.reshape(shape, order=order)


def _scalar(dtype, data):
    return _frombuffer(data, dtype, (1,), "C")[0]


def _encode(text, encoding):
    if encoding != "latin1":  # how Python 3 writes bytes for Python 2; others may load modules
        raise pickle.UnpicklingError(f"GLOBAL _codecs.encode({encoding!r})")
    return text.encode(encoding)


_ADMITTED = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": bytes,
    "__builtin__.bytes": bytes,
    "collections.OrderedDict": OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ADMITTED[f"{_core}.multiarray._reconstruct"] = lambda *_: _Array()
    _ADMITTED[f"{_core}.multiarray.scalar"] = _scalar
    _ADMITTED[f"{_core}.numeric._frombuffer"] = _frombuffer


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in _ADMITTED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _ADMITTED[f"{module}.{name}"]


def _finished(value):
    """`value` with every stand-in replaced by what it stands for."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Dtype):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _finished(item) for key, item in dict.items(value)}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_finished, value))
    return value


def read_weights(path, mmap=False):
    """Read a file of weights without running anything that it names.

    Args:
        path (str): a path or a URL that Detectron2's ``PathManager`` opens. ``.pkl`` is a pickle of arrays,
            as Detectron (Python 2) and Detectron2 (any protocol) write them; all else is torch's.
        mmap (bool): leave torch's tensors on the disk until they are used. The file must then stay.

    Returns:
        dict: as the file has it, tensors on the CPU, ``OrderedDict`` in a pickle as dict.

    Raises:
        ValueError: the file refers to anything but arrays and plain values, is damaged, or holds no dict.
            Names the file, and the refused name.
        OSError: the file cannot be opened.
    """
    local = PathManager.get_local_path(path)
    try:
        if local.endswith(".pkl"):
            with open(local, "rb") as f:
                weights = _finished(_ArraysOnly(f, encoding="latin1").load())
        else:
            weights = torch.load(local, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as e:  # a damaged pickle can raise nearly any
        refused = re.search(r"GLOBAL (\S+)", str(e))  # torch words its refusals so
        if refused:
            raise ValueError(
                f"{path} refers to {refused[1]}: weights must hold only arrays and plain values, because "
                "anything else may run a program. If you trust the file, save what counts again where it was "
                'made: torch.save({"model": model.state_dict()}, "weights.pth")'
            ) from e
        reason = (str(e).splitlines() or [""])[0]
        raise ValueError(
            f"{path} is damaged or no file of weights ({type(e).__name__}: {reason}): copy or make it again"
        ) from e
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds a {type(weights).__name__}: expected a dict of arrays by name")
    return weights


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, reading by :func:`read_weights` and refusing weights that do not fit.

    Formats, renaming and ``?matching_heuristics=True`` are Detectron2's. What is missing or left over is
    logged as a warning, as there; a file that fills less than half of the backbone is an error.
    pycls's ``.pyth`` is left to Detectron2, where torch refuses programs by default.

    Raises:
        ValueError: in :meth:`load`, for what :func:`read_weights` refuses and for weights that fill less
            than half of the backbone's tensors (its ``bottom_up``'s, if it has one). The model may hold
            some of these weights then.
    """

    def load(self, path, *args, **kwargs):
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # so that another file can be loaded after a refused one

    def _load_file(self, filename):
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)  # by _torch_load
        weights = read_weights(filename)
        if "model" in weights and "__author__" in weights:
            return weights
        # Of Detectron: a detector's weights are in "blobs", an ImageNet model's are not.
        blobs = {k: v for k, v in weights.get("blobs", weights).items() if not k.endswith("_momentum")}
        return {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f):
        return read_weights(f)

    def _load_model(self, checkpoint):
        path = self._parsed_url_during_load.geturl()
        other = {
            k: v for k, v in checkpoint["model"].items() if not isinstance(v, (np.ndarray, torch.Tensor))
        }
        if other:
            raise ValueError(
                f"{path}: {next(iter(other))!r} among the weights is no array; save them by their names as "
                '"model": torch.save({"model": model.state_dict()}, "weights.pth")'
            )
        given = _some(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        own, missing = self.model.state_dict(), set(incompatible.missing_keys)
        prefix = next(
            p for p in ("backbone.bottom_up.", "backbone.", "") if any(k.startswith(p) for k in own) or not p
        )
        body = {k: v for k, v in own.items() if k.startswith(prefix)}
        unfilled = {k: v for k, v in body.items() if k in missing}
        if 2 * len(unfilled) > len(body):
            raise ValueError(
                f"{path} fits {len(body) - len(unfilled)} of the "
                f"backbone's {len(body)} tensors: it holds {given}, the model {_some(unfilled)}. Convert "
                "torchvision's weights with python -m rethink_d2.modeling.convert; where only the beginnings "
                "of the names are missing, append ?matching_heuristics=True to the file's name"
            )
        return incompatible


def _some(weights):
    """The first few names and shapes, for a message."""
    few = [f"{k} {tuple(getattr(v, 'shape', ()))}" for k, v in list(weights.items())[:3]]
    return ", ".join(few + ["..."] * (len(weights) > 3)) or "nothing"
