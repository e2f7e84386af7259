"""Optimizer state by parameter name, so that it fits a model whose parameters come in another order."""

import torch

__all__ = ["load_optimizer_state", "optimizer_state"]


def _names(optimizer, model):
    """The parameters' names in the order in which the optimizer counts them."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer, model):
    """What an optimizer remembers of every parameter.

    Args:
        optimizer (torch.optim.Optimizer): of `model`'s parameters.
        model (nn.Module): not wrapped for several processes.

    Returns:
        dict[str, dict]: e.g. ``{"momentum_buffer": Tensor}`` by name; nothing for parameters without a
        step yet. Rates are not in it: they follow from config and iteration.
    """
    state = optimizer.state_dict()["state"]
    return {name: state[i] for i, name in enumerate(_names(optimizer, model)) if i in state}


def load_optimizer_state(optimizer, model, saved):
    """Put back what :func:`optimizer_state` took.

    Raises:
        ValueError: it names a parameter that the optimizer does not train.
    """
    names = _names(optimizer, model)
    unknown = sorted(saved.keys() - set(names))
    if unknown:
        raise ValueError(
            f"the optimizer's state is of parameters that do not train: {', '.join(unknown[:5])}"
        )
    by_index = {
        i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved[name].items()}
        for i, name in enumerate(names)
        if name in saved
    }
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})
