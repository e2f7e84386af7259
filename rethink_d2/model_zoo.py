"""This project's configs and models by name, as :mod:`detectron2.model_zoo` does for its own.

Example::

    from rethink_d2 import model_zoo

    cfg = model_zoo.get_config("scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml")
    model = model_zoo.get("scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml", device="cpu")
"""

import difflib
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from . import recipe

__all__ = ["config_dir", "get", "get_config", "get_config_file"]


def config_dir() -> Path:
    """The folder of configs: inside the package if installed from a wheel, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def get_config_file(name: str) -> str:
    """Path of one of this project's configs.

    Args:
        name: path below :func:`config_dir`, e.g. ``scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml``.
            ``.yaml`` may be left out.

    Raises:
        RuntimeError: there is no such config, as Detectron2 raises; the message names the nearest.
    """
    root = config_dir()
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))
    wanted = name if name.endswith(".yaml") else name + ".yaml"
    if wanted not in names:
        # A bare file name is nearest to the full name that ends in it, whatever the letters say.
        near = [n for n in names if n.endswith("/" + wanted)] or difflib.get_close_matches(wanted, names)
        hint = f"nearest: {', '.join(near)}" if near else "nothing is named like it"
        raise RuntimeError(f"no config '{name}' in {root}; {hint}")
    return str(root / wanted)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """The config of that name, resolved: SOLVER.SCHEDULE has become MAX_ITER, STEPS and warm-up.

    Args:
        name: see :func:`get_config_file`.
        trained: set MODEL.WEIGHTS to what a finished run of this config left in its OUTPUT_DIR,
            taken from the current folder. No trained weights are published to download.

    Raises:
        RuntimeError: there is no such config.
        FileNotFoundError: ``trained``, and the run has left no final weights there.
    """
    cfg = recipe.resolve(recipe.load(get_config_file(name), []))
    if trained:
        weights = Path(cfg.OUTPUT_DIR) / "model_final.pth"
        if not weights.is_file():
            raise FileNotFoundError(
                f"{weights} does not exist: train {name} first, or set MODEL.WEIGHTS of "
                "get_config(name) yourself"
            )
        # After resolve, which rightly refuses to train the scratch arm from weights.
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(weights)
    return cfg


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build the model of a config, in training mode.

    Args:
        name: see :func:`get_config_file`.
        trained: load the finished run's weights, see :func:`get_config`. Otherwise nothing is
            loaded or downloaded, for the pre-trained arm either (unlike Detectron2's): the model
            holds the random weights of MODEL.INIT.POLICY, drawn from torch's generator.
        device: overrides MODEL.DEVICE. Without one, the CPU is used if there is no GPU.
    """
    from .modeling.initialization import initialize
    from .modeling.safe_weights import SafeCheckpointer

    cfg = get_config(name, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if device is not None:
        cfg.defrost()
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    initialize(model, cfg.MODEL.INIT.POLICY)
    if trained:
        SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
