"""Controlled experiments on training detectors with and without pre-training, on Detectron2."""

import warnings

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as e:
    raise ImportError(
        "rethink_d2 extends Detectron2, which is not installed here. Run scripts/setup.sh of this "
        "project, or install it from its repository: "
        "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
    ) from e

with warnings.catch_warnings():
    # What fvcore, imported by Detectron2, tells its users but only its authors could change.
    warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated", FutureWarning)
    from . import data, modeling  # noqa: F401  only registration
from .config import add_rethink_config

__all__ = ["add_rethink_config"]
