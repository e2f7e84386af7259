"""torchvision's weights in the names of this project's and Detectron2's models.

    python -m rethink_d2.modeling.convert resnet50.pth R-50.pth

The result is a value for MODEL.WEIGHTS. It tells the pixels that the weights need, and the check of the
recipe compares the config with them.
"""

import argparse
import re
import sys
from dataclasses import dataclass

import torch

from ..files import replace_atomically
from .safe_weights import read_weights
from .vgg import VGG16_FROM_TORCHVISION

__all__ = ["Conversion", "convert_torchvision"]

# torchvision's mean and std (of all its ImageNet models, for pixels of 0-1), for pixels of 0-255.
PIXELS = {"format": "RGB", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}

_RESNET_PREFIX = "backbone.bottom_up."
_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
_SHORTCUT = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
_CLASSIFIERS = ("fc", "classifier.6")


@dataclass(frozen=True)
class Conversion:
    """What became of a model's weights.

    Attributes:
        model (dict[str, Tensor]): the weights by their new names.
        names (dict[str, str]): the new name of every name that was taken over.
        dropped (list[str]): the names that have no counterpart: the ImageNet classifier's, and batch
            norm's counts of batches.
    """

    model: dict
    names: dict
    dropped: list


def _resnet_module(name):
    """Detectron2's name of a module of torchvision's ResNet; None for an unknown one."""
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv[1-3]|bn[1-3]|downsample\.[01])", name)
    if not block:
        return _STEM.get(name)
    stage, index, layer = block.groups()
    layer = _SHORTCUT.get(layer) or re.sub(r"bn(\d)", r"conv\1.norm", layer)
    return f"res{int(stage) + 1}.{index}.{layer}"


def convert_torchvision(state_dict, prefix=None):
    """Rename the weights of a ResNet, ResNeXt, Wide ResNet or VGG-16 (without batch norm) of torchvision.

    These ResNets have their stride on the 3x3 convolution: ``MODEL.RESNETS.STRIDE_IN_1X1 False``.

    Args:
        state_dict (Mapping[str, Tensor]): the torchvision model's; the tensors are shared, not copied.
        prefix (str): what goes before a ResNet's names; by default "backbone.bottom_up.", for a detector
            with FPN. One without needs "backbone.", a bare backbone "". VGG-16's names are those of a
            detector with ``build_vgg16_backbone`` and its fc6 and fc7, and take no prefix.

    Returns:
        Conversion: the renamed weights and what was dropped.

    Raises:
        ValueError: names that belong to none of these models, or a prefix for VGG-16.
    """
    vgg = any(key.startswith("features.") for key in state_dict)
    if vgg and prefix is not None:
        raise ValueError(f"--prefix {prefix!r} is for ResNets: VGG-16's names are whole ones")
    if prefix is None:
        prefix = "" if vgg else _RESNET_PREFIX
    rename = VGG16_FROM_TORCHVISION.get if vgg else _resnet_module
    names, dropped, unknown = {}, [], []
    for key in state_dict:
        module, _, tensor = key.rpartition(".")
        if module in _CLASSIFIERS or tensor == "num_batches_tracked":
            dropped.append(key)
        elif renamed := rename(module):
            names[key] = f"{prefix}{renamed}.{tensor}"
        else:
            unknown.append(key)
    if unknown or not names:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(
            f"not the weights of torchvision's ResNet, ResNeXt, Wide ResNet or VGG-16 without batch norm: "
            f"{f'unknown {shown}' if unknown else 'nothing of theirs is in it'}"
        )
    return Conversion({names[key]: state_dict[key] for key in names}, names, dropped)


def main(argv=None):
    """The command line.

    Returns:
        int: 0, or 2 where the input is refused (wrong arguments exit with 2).
    """
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.modeling.convert",
        description="Make MODEL.WEIGHTS of torchvision's weights.",
    )
    parser.add_argument("input", metavar="IN.pth", help="what torchvision downloads, or a saved state_dict()")
    parser.add_argument("output", metavar="OUT.pth", help="the value for MODEL.WEIGHTS")
    parser.add_argument("--prefix", help='before a ResNet\'s names; without FPN "backbone."')
    args = parser.parse_args(argv)
    if not args.output.endswith(".pth"):
        parser.error(f"{args.output} must end in .pth: Detectron2 reads by the name")
    try:
        weights = read_weights(args.input)
        done = convert_torchvision(weights.get("model", weights), args.prefix)
    except (ValueError, OSError) as e:
        print(f"error: cannot convert {args.input}: {e}", file=sys.stderr)
        return 2
    with replace_atomically(args.output) as f:
        torch.save({"model": done.model, "__author__": "torchvision", "pixels": PIXELS}, f)
    for old, new in done.names.items():
        print(f"{old} -> {new}")
    for old in done.dropped:
        print(f"{old} dropped")
    print(f"{args.output}: {len(done.names)} tensors, {len(done.dropped)} dropped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
