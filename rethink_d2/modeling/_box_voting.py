"""Box voting: boxes that NMS would discard help to place the one that it keeps."""

import torch
from detectron2.structures import Boxes, pairwise_iou

# Pairs of boxes whose overlap is computed at a time: bounds the memory to some 100 MB.
_MAX_PAIRS = 2**21


def box_voting(boxes, scores, classes, keep, threshold):
    """Move kept boxes to the score-weighted mean of the boxes that agree with them.

    Those are all boxes of the same class with an IoU of at least `threshold` to the kept one; scores are not
    changed (Detectron utils/boxes.py, ``box_voting`` with scoring method ID).

    Args:
        boxes (Tensor): (N, 4), all boxes of an image before NMS, as x0, y0, x1, y1.
        scores (Tensor): (N,), positive.
        classes (Tensor): (N,) integers.
        keep (Tensor): (K,) indices of the boxes that NMS has kept.
        threshold (float): least IoU, greater than 0.

    Returns:
        Tensor: (K, 4). A box without an area overlaps nothing, not even itself, and stays in its place.
    """
    voted = boxes[keep]
    for chunk in torch.arange(len(keep), device=keep.device).split(max(1, _MAX_PAIRS // max(1, len(boxes)))):
        kept = keep[chunk]
        agree = pairwise_iou(Boxes(boxes[kept]), Boxes(boxes)) >= threshold
        weights = scores * (agree & (classes[kept, None] == classes))
        total = weights.sum(dim=1, keepdim=True)
        # No matrix product: mixed precision or TF32 would round it to whole pixels.
        mean = (weights[:, :, None] * boxes).sum(dim=1) / total
        voted[chunk] = torch.where(total > 0, mean, voted[chunk])
    return voted
