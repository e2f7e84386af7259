"""How a Cascade R-CNN continues the training of a Mask R-CNN.

The paper starts cascade training from a trained Mask R-CNN (section 5.1, Figure 5) and does not say how
its weights become the cascade's. Here everything that both models have continues, optimizer state
included; each stage's box head begins as a copy of the one box head; the stages' predictors are new.
"""

import re
from dataclasses import dataclass

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads

__all__ = ["CascadeStart", "start_cascade"]

_STAGE = re.compile(r"roi_heads\.box_(head|predictor)\.\d+\.(.+)")
_PREDICTOR = "roi_heads.box_predictor."


@dataclass(frozen=True)
class CascadeStart:
    """The state in which a cascade begins, and where each tensor of it came from.

    No two tensors share memory, neither with each other nor with the states they were made from.

    Attributes:
        model_state (dict[str, Tensor]): all of the cascade model's, for ``load_state_dict``.
        momentum (dict[str, dict]): ``{"momentum_buffer": Tensor}`` by the name of the cascade's parameter;
            the fresh ones have none.
        copied (dict[str, str]): name in the trunk by name in the cascade.
        fresh (list[str]): names in the cascade whose values are the given model's own.
        dropped (list[str]): names in the trunk that nothing continues.
    """

    model_state: dict
    momentum: dict
    copied: dict
    fresh: list
    dropped: list


def start_cascade(trunk_state, trunk_momentum, model):
    """Map the state of a Mask R-CNN in training to a cascade that continues it.

    Each stage's box head takes over weights and momentum of the one box head, because that is its
    parameters' history. The box predictors' shapes change with class-agnostic regression, so these
    keep the given model's values and have no momentum. Buffers, such as running statistics, are
    treated as the weights are.

    Args:
        trunk_state (Mapping[str, Tensor]): ``state_dict()`` of a model with ``StandardROIHeads``.
        trunk_momentum (Mapping[str, dict]): SGD's state by parameter name, ``{"momentum_buffer": Tensor}``
            for every parameter that trained.
        model (nn.Module): the initialized cascade, ``roi_heads`` being (a subclass of) ``CascadeROIHeads``;
            it stays as it is.

    Returns:
        CascadeStart: every name of the trunk is in ``copied`` or ``dropped``, every name of the cascade in
        ``copied`` or ``fresh``.

    Raises:
        ValueError: a name that has no counterpart, a shape that differs, or a parameter that trains in
            only one of the two models; names the tensors.
    """
    if not isinstance(getattr(model, "roi_heads", None), CascadeROIHeads):
        raise ValueError(
            "the model to start is not a detector with a cascade (or one in a wrapper, such as DDP's): "
            "set MODEL.ROI_HEADS.NAME LastStageMaskCascadeROIHeads"
        )
    state = model.state_dict()
    copied = {name: source for name in state if (source := _source(name))}
    dropped = [name for name in trunk_state if name.startswith(_PREDICTOR)]
    _require_same(trunk_state.keys() - dropped, set(copied.values()), "the Mask R-CNN's weights")

    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    carried = {name: source for name, source in copied.items() if name in trains}
    _require_same(trunk_momentum.keys() - dropped, set(carried.values()), "the Mask R-CNN's momentum")

    momentum = {}
    for name, value in state.items():
        source = copied.get(name)
        if source is not None:
            _require_shape(trunk_state[source], value, source)
        state[name] = (value if source is None else trunk_state[source]).detach().clone()
        if name in carried:
            entry = trunk_momentum[source]
            if entry.keys() != {"momentum_buffer"}:
                raise ValueError(f"the optimizer state of {source} is {sorted(entry)}, not SGD's")
            _require_shape(entry["momentum_buffer"], value, f"the momentum of {source}")
            momentum[name] = {"momentum_buffer": entry["momentum_buffer"].detach().clone()}
    return CascadeStart(state, momentum, copied, [n for n in state if n not in copied], dropped)


def _source(name):
    """The trunk's name for a name in the cascade; None for a predictor's."""
    match = _STAGE.fullmatch(name)
    if match is None:
        return name
    part, rest = match.groups()
    return f"roi_heads.box_head.{rest}" if part == "head" else None


def _require_same(given, wanted, what):
    if given != wanted:
        raise ValueError(
            f"{what} and the cascade model do not belong together: missing {_list(wanted - given)}; "
            f"left over {_list(given - wanted)}"
        )


def _list(names):
    shown = ", ".join(sorted(names)[:5]) or "nothing"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _require_shape(tensor, like, what):
    if not isinstance(tensor, torch.Tensor) or tensor.shape != like.shape:
        shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else tensor
        raise ValueError(f"{what} has shape {shape}, but the cascade model needs {tuple(like.shape)}")
