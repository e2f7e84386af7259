"""When training leaves the numbers: what happened, and why most probably."""

import os

import torch
from detectron2.utils import comm

from ..files import write_json
from . import checkpoint

__all__ = ["Diverged", "gradient_norm", "report"]

REPORT = "divergence.json"


class Diverged(FloatingPointError):
    """The loss or the gradient is not finite."""


def gradient_norm(model):
    """The 2-norm over all gradients, a scalar tensor on the model's device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


def _causes(cfg, iteration, samples):
    """Likely reasons, most telling first."""
    solver, found = cfg.SOLVER, []
    for sample in samples:
        instances = sample.get("instances")
        if instances is None or not len(instances):
            continue
        boxes = instances.gt_boxes.tensor
        if not torch.isfinite(boxes).all() or (boxes[:, 2:] <= boxes[:, :2]).any():
            found.append(
                f"{sample['file_name']} has boxes without an area: python -m rethink_d2.data.check finds them"
            )
    usual = 0.02 * solver.IMS_PER_BATCH / 16
    if solver.BASE_LR > 1.5 * usual:
        found.append(
            f"SOLVER.BASE_LR {solver.BASE_LR:g} is high for SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}: "
            f"linear scaling gives {usual:g} (a smaller batch needs a smaller rate)"
        )
    if iteration < max(2 * solver.WARMUP_ITERS, 1000):
        found.append(f"early in training: a longer warm-up (SOLVER.WARMUP_ITERS, now {solver.WARMUP_ITERS})")
    if solver.AMP.ENABLED:
        found.append("mixed precision (SOLVER.AMP.ENABLED): try without it")
    return found or ["unknown: a lower SOLVER.BASE_LR, or SOLVER.CLIP_GRADIENTS.ENABLED True, helps often"]


def report(cfg, iteration, *, losses, norm, rate, samples, skipped):
    """Write what is known about an update that is not finite. Every process must call this.

    Args:
        cfg (CfgNode): the resolved config.
        iteration (int): the one that failed.
        losses (dict[str, float]): of this process.
        norm (float): of the gradient.
        rate (float): the learning rate.
        samples (list[dict]): of this process, all of the iteration.
        skipped (int): updates left out so far, this one not counted.

    Returns:
        str: the report in a sentence, for the error message.
    """
    gathered = comm.gather((losses, [s["file_name"] for s in samples], _causes(cfg, iteration, samples)))
    if not comm.is_main_process():
        return "the loss or the gradient is not finite"
    good = next(iter(checkpoint.checkpoints(cfg.OUTPUT_DIR).values()), None)
    content = {
        "iteration": iteration,
        # JSON has no infinity.
        "losses": [{k: str(v) for k, v in part.items()} for part, _, _ in gathered],
        "gradient_norm": str(norm),
        "rate": rate,
        "files": [name for _, files, _ in gathered for name in files],
        "likely_causes": list(dict.fromkeys(cause for _, _, causes in gathered for cause in causes)),
        "last_checkpoint": good,
        "skipped_before": skipped,
    }
    path = os.path.join(cfg.OUTPUT_DIR, REPORT)
    write_json(path, content)
    return (
        f"iteration {iteration}: the loss or the gradient is not finite (losses {content['losses']}, "
        f"gradient norm {norm:.4g}, rate {rate:g}). Likely: {content['likely_causes'][0]}. Last "
        f"checkpoint: {good}. All details, with the files of the batch, are in {path}"
    )
