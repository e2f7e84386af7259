"""Random initialization of a whole detector by one named policy.

"Rethinking ImageNet Pre-training" trains its detectors from "He initialization" (sections 3.1 and 5.1)
in the original Detectron, where every layer names its initializer in the code of its head. Detectron2
differs in some layers (the mask predictor), so the whole model is initialized here, in one place.

Layers are told apart by the class of the module that owns them, never by parameter names, so policies
also fit models of other projects. A policy of one's own needs no change of this file::

    @INITIALIZATION_REGISTRY.register()
    def my_policy(layer):
        return XAVIER if layer.kind == "mask predictor" else msra(layer)
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from detectron2.layers import (
    CNNBlockBase,
    CycleBatchNormList,
    DeformConv,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
)
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import BaseKeypointRCNNHead, BaseMaskRCNNHead, FastRCNNOutputLayers
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .classifier import Classifier

__all__ = [
    "INITIALIZATION_REGISTRY",
    "MSRA",
    "XAVIER",
    "ZERO",
    "Layer",
    "Rule",
    "describe",
    "gaussian",
    "initialize",
]

INITIALIZATION_REGISTRY = Registry("INITIALIZATION")
INITIALIZATION_REGISTRY.__doc__ = """
Policies for MODEL.INIT.POLICY, registered under the function's name. A policy is called with a
:class:`Layer` that has a weight and returns the :class:`Rule` for that weight. Biases and norms are not
up to the policy: biases start at 0, norms as the identity.
"""


class Rule(NamedTuple):
    """How a weight is filled.

    Attributes:
        name: for summaries.
        fill: changes a float32 tensor of the weight's shape in place, drawing from torch's global
            generator only.
    """

    name: str
    fill: Callable[[torch.Tensor], object]


class Layer(NamedTuple):
    """One module with a weight of its own, as a policy sees it.

    Attributes:
        name: dotted name in the model; for messages only.
        kind: "stem or block conv", "fpn conv", "rpn conv", "class predictor", "box predictor",
            "mask conv", "mask deconv", "mask predictor", "keypoint conv", "keypoint predictor",
            "dense head conv", "head conv", "offset conv", "fc", "classifier" (of images), "norm" or
            "other" (the last two never reach a policy).
        module: the convolution, linear or norm module.
        owner: the innermost module around it that decided its kind, e.g. a StandardRPNHead; or None.
    """

    name: str
    kind: str
    module: nn.Module
    owner: nn.Module | None


def gaussian(std: float) -> Rule:
    """Return the rule for a zero-mean normal distribution; ``GaussianFill`` in Caffe2."""
    return Rule(f"normal({std:g})", lambda weight: nn.init.normal_(weight, std=std))


# Caffe2's MSRAFill: normal, std sqrt(2 / fan_out), with fan_out = weight.numel() / weight.shape[1]. In a
# grouped convolution that counts out_channels x k x k although each input only reaches its own
# group; the paper's system has it so, and so have torch and fvcore.
MSRA = Rule("MSRA", lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"))
# Caffe2's XavierFill: uniform of variance 1 / fan_in (not Glorot's mean of both fans).
XAVIER = Rule("Xavier", lambda weight: nn.init.kaiming_uniform_(weight, a=1))
ZERO = Rule("zero", nn.init.zeros_)
ONE = Rule("one", nn.init.ones_)
AS_BUILT = Rule("as built", lambda weight: weight)

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, LayerNorm, CycleBatchNormList)
_CONVS = (_ConvNd, DeformConv, ModulatedDeformConv)

# Innermost wins; within one module the first match, so FPN comes before Backbone. CNNBlockBase covers
# blocks outside a backbone, as the res5 stage of Detectron2's C4 heads.
_OWNERS = (
    (FPN, "fpn conv"),
    (Backbone, "stem or block conv"),
    (CNNBlockBase, "stem or block conv"),
    (StandardRPNHead, "rpn conv"),
    (RetinaNetHead, "dense head conv"),
    (FastRCNNOutputLayers, "class predictor"),
    (BaseMaskRCNNHead, "mask conv"),
    (BaseKeypointRCNNHead, "keypoint conv"),
    (Classifier, "head conv"),
)


@INITIALIZATION_REGISTRY.register()
def msra(layer: Layer) -> Rule:
    """He initialization: the paper's sections 3.1 and 5.1, the rest as Detectron's published configs.

    Sources of the exceptions, in Detectron: FPN.py (Xavier), fast_rcnn_heads.py (Xavier fc, Gaussian
    predictors), rpn_heads.py and FPN.py (Gaussian 0.01). mask_rcnn_heads.py and
    keypoint_rcnn_heads.py use ``CONV_INIT`` for all layers, class-specific predictors included, which is
    ``MSRAFill`` in the configs of 12_2017_baselines and 04_2018_gn_baselines.
    """
    if layer.kind in ("fpn conv", "fc"):
        return XAVIER
    if layer.kind in ("rpn conv", "class predictor", "dense head conv", "classifier"):
        # "classifier": the linear layer over the classes; "Accurate, Large Minibatch SGD", section 5.1.
        return gaussian(0.01)
    if layer.kind == "box predictor":
        return gaussian(0.001)
    if layer.kind == "offset conv":
        # Deformable convolutions have to start as regular ones.
        return ZERO
    return MSRA


@INITIALIZATION_REGISTRY.register()
def detectron(layer: Layer) -> Rule:
    """As :func:`msra`, but Xavier in a body with GN.

    Detectron's ResNet.py gives its ConvGN calls no initializer, so they get Caffe2's default, while
    convolutions before the affine layers that replace BN get MSRAFill.
    """
    if layer.kind == "stem or block conv" and isinstance(getattr(layer.module, "norm", None), nn.GroupNorm):
        return XAVIER
    return msra(layer)


@INITIALIZATION_REGISTRY.register()
def msra_all(layer: Layer) -> Rule:
    """As :func:`msra`, fully connected layers included: the paper's VGG-16 (section 5.1)."""
    return MSRA if layer.kind == "fc" else msra(layer)


def initialize(model: nn.Module, policy: str) -> None:
    """Initialize all parameters of a model, frozen ones included, in place.

    Weights follow the policy. Biases become 0 (a RetinaNetHead keeps its prior on the class scores),
    norms the identity, with their running statistics reset. Values are drawn on the CPU from torch's
    global generator in the order of ``named_modules()``: the same seed gives the same weights,
    whatever the model's device.

    Args:
        model: any model, before weights are loaded into it.
        policy: a name in :data:`INITIALIZATION_REGISTRY`, or "" to leave the model as it is.

    Raises:
        ValueError: if the policy is unknown, or a parameter belongs to a module of a type that no
            policy covers; nothing has been changed then.
    """
    choose = _get_policy(policy)
    if choose is None:
        return
    plan = list(_plan(model, choose))  # complete, so checked, before the first write
    frozen_norms = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    with torch.no_grad():
        for layer, own, rule in plan:
            _fill(layer, own, rule)
        for norm in frozen_norms:
            # These hold no parameters. The running variance is as in the constructor.
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0 - norm.eps)


def describe(model: nn.Module, policy: str) -> list[tuple[str, str, int]]:
    """Summarize what :func:`initialize` would do, without drawing or changing anything.

    Args:
        model: any model.
        policy: as in :func:`initialize`.

    Returns:
        list: (kind of layer, name of the rule, number of layers), in the order in which they first
        appear in the model; rule "as built" for policy "".

    Raises:
        ValueError: as :func:`initialize`.
    """
    counts = Counter((layer.kind, rule.name) for layer, _, rule in _plan(model, _get_policy(policy)))
    return [(kind, rule, count) for (kind, rule), count in counts.items()]


def _get_policy(name):
    if not name:
        return None
    if name not in INITIALIZATION_REGISTRY:
        known = ", ".join(f"'{known}'" for known, _ in INITIALIZATION_REGISTRY)
        raise ValueError(f"MODEL.INIT.POLICY: '{name}' is not one of {known}, or '' for none")
    return INITIALIZATION_REGISTRY.get(name)


def _plan(model, choose) -> Iterator[tuple[Layer, dict, Rule]]:
    """Yield every layer, its parameters by their short names, and the rule for its weight."""
    unknown = []
    for layer, own in _layers(model):
        if choose is None:
            yield layer, own, AS_BUILT
        elif layer.kind == "other" or not own.keys() <= {"weight", "bias"}:
            unknown.extend(f"{layer.name}.{key} ({type(layer.module).__name__})" for key in own)
        else:
            yield layer, own, ONE if layer.kind == "norm" else choose(layer)
    if unknown:
        raise ValueError("MODEL.INIT.POLICY: no policy covers the parameters " + ", ".join(unknown))


def _layers(model) -> Iterator[tuple[Layer, dict]]:
    """Yield every module that holds a parameter not yet seen, in the order of named_modules()."""
    modules, parameters = set(), set()

    def walk(name, module, owner, owner_kind):
        if module in modules:
            return
        modules.add(module)
        for cls, kind in _OWNERS:
            if isinstance(module, cls):
                owner, owner_kind = module, kind
                break
        # A shared parameter belongs to the first module that has it.
        own = {key: p for key, p in module.named_parameters(recurse=False) if p not in parameters}
        parameters.update(own.values())
        if own:
            yield Layer(name, _kind(module, owner, owner_kind), module, owner), own
        for key, child in module.named_children():
            yield from walk(f"{name}.{key}" if name else key, child, owner, owner_kind)

    yield from walk("", model, None, "head conv")


def _kind(module, owner, owner_kind):
    """Return the kind (see :class:`Layer`) of a module with parameters."""
    if isinstance(module, _NORMS):
        return "norm"
    is_conv = isinstance(module, _CONVS)
    if not is_conv and not isinstance(module, nn.Linear):
        return "other"
    if isinstance(owner, FastRCNNOutputLayers):
        return "box predictor" if _inside(owner, "bbox_pred", module) else owner_kind
    if isinstance(module, nn.Linear):
        is_last = isinstance(owner, ResNet) or _inside(owner, "classifier", module)
        return "classifier" if is_last else "fc"
    if isinstance(owner, DeformBottleneckBlock) and _inside(owner, "conv2_offset", module):
        return "offset conv"
    if isinstance(owner, BaseMaskRCNNHead):
        if _inside(owner, "predictor", module):
            return "mask predictor"
        if isinstance(module, _ConvTransposeNd):
            return "mask deconv"
    if isinstance(owner, BaseKeypointRCNNHead) and _inside(owner, "score_lowres", module):
        return "keypoint predictor"
    return owner_kind


def _inside(owner, attribute, module):
    """Whether a module is, or is within, an attribute of its owner; the attribute need not exist."""
    part = getattr(owner, attribute, None)
    return isinstance(part, nn.Module) and any(module is m for m in part.modules())


def _fill(layer, own, rule):
    if "weight" in own:
        values = torch.empty(own["weight"].shape, dtype=torch.float32)
        rule.fill(values)
        own["weight"].copy_(values)
    # The prior that keeps the focal loss stable at the start is known to RetinaNetHead alone.
    has_prior = isinstance(layer.owner, RetinaNetHead) and _inside(layer.owner, "cls_score", layer.module)
    if "bias" in own and not has_prior:
        own["bias"].zero_()
    if isinstance(layer.module, _NormBase):
        layer.module.reset_running_stats()
