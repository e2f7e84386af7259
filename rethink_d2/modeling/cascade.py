"""Cascade R-CNN with the mask head on the last stage."""

from detectron2.config import configurable
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.structures import pairwise_iou

__all__ = ["LastStageMaskCascadeROIHeads"]


def _check(cfg):
    """Raise ValueError, naming the key, where Detectron2 has assertions, most without a message."""
    cascade, ious = "MODEL.ROI_BOX_CASCADE_HEAD", cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS
    weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    first = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if len(ious) != len(weights):
        raise ValueError(
            f"{cascade}.BBOX_REG_WEIGHTS has {len(weights)} entries, but {cascade}.IOUS has {len(ious)}: "
            "give one per stage"
        )
    if list(ious[:1]) != list(first):
        raise ValueError(
            f"{cascade}.IOUS is {ious}: it must begin with the one value of MODEL.ROI_HEADS.IOU_THRESHOLDS, "
            f"which is {first}"
        )
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False: a cascade needs True")


@ROI_HEADS_REGISTRY.register()
class LastStageMaskCascadeROIHeads(CascadeROIHeads):
    """Detectron2's ``CascadeROIHeads``, whose mask and keypoint heads train on the last stage's boxes.

    The paper adds "a mask head to the last stage" (section 5.1, Figure 5). Here that head, and a
    keypoint head, trains on the boxes that enter the last stage: those that the stages before it have
    refined, of which the last stage's IoU threshold makes foreground. Detectron2 trains them on the
    first stage's proposals. Inference is Detectron2's: masks of the final boxes.

    The first stage has at most ``POSITIVE_FRACTION x BATCH_SIZE_PER_IMAGE`` foreground boxes per image.
    The last has no such limit, as no stage samples again, so the mask head can need more memory.

    Modules and parameter names are Detectron2's, so weights fit both classes.
    """

    @configurable
    def __init__(self, *, mask_on_last_stage=True, **kwargs):
        """Wrap the arguments of ``CascadeROIHeads``.

        Args:
            mask_on_last_stage (bool): False for Detectron2's way.
            **kwargs: as ``CascadeROIHeads``.
        """
        super().__init__(**kwargs)
        self.mask_on_last_stage = mask_on_last_stage
        self._entering_last = None

    @classmethod
    def from_config(cls, cfg, input_shape):
        """Read Detectron2's keys and ``MODEL.ROI_BOX_CASCADE_HEAD.MASK_ON_LAST_STAGE``.

        Raises:
            ValueError: for keys of the cascade that do not belong together; the message names them.
        """
        _check(cfg)
        arguments = super().from_config(cfg, input_shape)
        arguments["mask_on_last_stage"] = cfg.MODEL.ROI_BOX_CASCADE_HEAD.MASK_ON_LAST_STAGE
        return arguments

    def _forward_box(self, features, proposals, targets=None):
        result = super()._forward_box(features, proposals, targets)
        if self._entering_last is not None:
            # forward() hands this very list on to the mask and keypoint heads. StandardROIHeads changes
            # the proposals here as well, under TRAIN_ON_PRED_BOXES.
            proposals[:], self._entering_last = self._entering_last, None
        return result

    def _match_and_label_boxes(self, proposals, stage, targets):
        proposals = super()._match_and_label_boxes(proposals, stage, targets)
        if self.mask_on_last_stage and stage == self.num_cascade_stages - 1:
            pairs = zip(proposals, targets, strict=True)
            self._entering_last = [self._foreground(boxes, stage, truth) for boxes, truth in pairs]
        return proposals

    def _foreground(self, proposals, stage, truth):
        """Select an image's labelled foreground, with the masks and keypoints of its objects."""
        is_foreground = proposals.gt_classes != self.num_classes
        selected = proposals[is_foreground]
        # The label holds the object's class and box, not which one it is. The same call as Detectron2's
        # finds the same one, even among several with one box.
        matched, _ = self.proposal_matchers[stage](pairwise_iou(truth.gt_boxes, proposals.proposal_boxes))
        for name, value in truth.get_fields().items():
            if name.startswith("gt_") and not selected.has(name):
                selected.set(name, value[matched[is_foreground]])
        return selected
