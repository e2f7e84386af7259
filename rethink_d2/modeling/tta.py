"""Test-time augmentation as the original Detectron does it, by which the paper's Figure 5 and Table 3 score.

It differs from Detectron2's ``GeneralizedRCNNWithTTA``: there each view goes through NMS on its own and only
what remains is united (here by a key), boxes do not vote, and keypoints are not supported; and there the
backbone runs twice on each view, the second time for the masks, and RoIAlign on one thread of a CPU.
"""

import math
from contextlib import contextmanager
from itertools import groupby

import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ._box_voting import box_voting
from ._views import make_views, original_image
from .pooler import fast_poolers

__all__ = ["RCNNWithTTA"]


class RCNNWithTTA(nn.Module):
    """A ``GeneralizedRCNN`` that looks at each image at several sizes, each also mirrored.

    A replacement for the model in evaluation: ``RCNNWithTTA(cfg, model).eval()`` takes and returns what
    ``model`` does. As Detectron core/test.py does it:

    - Views: the normal one (``INPUT.MIN_SIZE_TEST``, ``INPUT.MAX_SIZE_TEST``) and one for each of
      ``TEST.AUG.MIN_SIZES``, which therefore should not list the normal size again, with the longer side at
      most ``TEST.AUG.MAX_SIZE``; each once more mirrored if ``TEST.AUG.FLIP``. Size 0 is the original size.
    - Boxes: those of all views and classes as they are before any NMS (of a cascade's last stage, with the
      scores averaged over its stages) are united on the original image. Then follow the score threshold, NMS,
      box voting (``TEST.AUG.BOX_VOTE_THRESH``) and the limit of detections. With ``TEST.AUG.NMS_PER_VIEW``
      it is Detectron2's rule: what is united is what each view alone detects.
    - Masks: the mean of the views' probabilities for the final boxes, taken before pasting.
    - Keypoints: the mean of the views' heatmaps for the final boxes, in mirrored views with the channels of
      left and right swapped; then decoded as always.

    The box predictors have to be ``FastRCNNOutputLayers`` or derived from it, as those of
    ``StandardROIHeads``, ``CascadeROIHeads`` and ``Res5ROIHeads`` are.

    Every view is made from the original image. A sample that the loader has already resized is therefore read
    again from its ``file_name``. A loader built from a copy of the config with ``INPUT.MIN_SIZE_TEST`` 0 does
    not resize and saves this double work; this class needs the real config, for the normal view's size.

    The features of all views of an image are kept from the boxes to the masks: in float32, for an FPN of 256
    channels, about 90 MB for a view of 800 x 1333 pixels.
    """

    @configurable
    def __init__(
        self,
        model,
        *,
        sizes,
        flip,
        score_thresh,
        nms_thresh,
        vote_thresh,
        max_detections,
        nms_per_view=False,
        batch_size=1,
        keypoint_flip_indices=None,
    ):
        """Wrap a model, which is shared, not copied.

        Args:
            model (GeneralizedRCNN): also within ``DistributedDataParallel``.
            sizes (list[tuple[int, int]]): shorter and greatest longer side of each view, in pixels.
            flip (bool): add the mirror image of each view.
            score_thresh (float): detections score more than this.
            nms_thresh (float): NMS removes boxes of greater IoU.
            vote_thresh (float): least IoU of boxes that vote on the place of a kept one; 0 for no voting.
            max_detections (int): the best of an image, over all classes; negative for all.
            nms_per_view (bool): unite what each view detects on its own, by the model's threshold, NMS and
                limit, as Detectron2 does.
            batch_size (int): most views in one forward pass. Only views of one size share a pass, because
                padding changes what the network computes; so more than 2 is rarely of use.
            keypoint_flip_indices (list[int]): for each keypoint the one that takes its place in a mirrored
                image. Needed for models with keypoints if `flip`.

        Raises:
            ValueError: for another kind of model or a value out of range; names the config key.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, GeneralizedRCNN):
            raise ValueError(
                f"TEST.AUG.ENABLED: the model is a {type(model).__name__}, but test-time augmentation is for "
                "MODEL.META_ARCHITECTURE GeneralizedRCNN; set TEST.AUG.ENABLED False"
            )
        if model.proposal_generator is None:
            raise ValueError(
                "MODEL.LOAD_PROPOSALS: precomputed proposals do not fit the views of test-time augmentation; "
                "set TEST.AUG.ENABLED False"
            )
        self._predictors = [m for m in model.roi_heads.modules() if isinstance(m, FastRCNNOutputLayers)]
        if not self._predictors:
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME: {type(model.roi_heads).__name__} has no FastRCNNOutputLayers, which "
                "test-time augmentation needs; set TEST.AUG.ENABLED False"
            )
        self._poolers = fast_poolers(model.roi_heads)
        self.mask_on = getattr(model.roi_heads, "mask_on", False)
        self.keypoint_on = getattr(model.roi_heads, "keypoint_on", False)
        if self.keypoint_on and flip and keypoint_flip_indices is None:
            raise ValueError(
                "TEST.AUG.FLIP: the first data set of DATASETS.TEST does not say which keypoints are left or "
                "right; set its MetadataCatalog keypoint_names and keypoint_flip_map, or TEST.AUG.FLIP False"
            )
        if batch_size < 1:
            raise ValueError(f"TEST.AUG.IMS_PER_BATCH is {batch_size}: give at least 1")
        if not 0 <= vote_thresh <= 1:
            raise ValueError(f"TEST.AUG.BOX_VOTE_THRESH is {vote_thresh}: give an IoU of at most 1, or 0")
        self.model = model
        # Evaluation puts this module back to its mode of before, and the model with it.
        self.training = model.training
        self.sizes = sizes
        self.flip = flip
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.vote_thresh = vote_thresh
        self.max_detections = max_detections
        self.nms_per_view = nms_per_view
        self.batch_size = batch_size
        self.keypoint_flip_indices = keypoint_flip_indices

    @classmethod
    def from_config(cls, cfg, model):
        """Read Detectron2's keys and this project's of ``TEST.AUG``.

        The first data set of ``DATASETS.TEST``, else of ``DATASETS.TRAIN``, knows left and right keypoints.
        """
        aug, heads = cfg.TEST.AUG, cfg.MODEL.ROI_HEADS
        normal = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        return {
            "model": model,
            "sizes": [normal, *((size, aug.MAX_SIZE) for size in aug.MIN_SIZES)],
            "flip": aug.FLIP,
            "score_thresh": heads.SCORE_THRESH_TEST,
            "nms_thresh": heads.NMS_THRESH_TEST,
            "vote_thresh": aug.BOX_VOTE_THRESH,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "nms_per_view": aug.NMS_PER_VIEW,
            "batch_size": aug.IMS_PER_BATCH,
            "keypoint_flip_indices": _keypoint_flip_indices(cfg.DATASETS.TEST or cfg.DATASETS.TRAIN),
        }

    @torch.no_grad()
    def forward(self, batched_inputs):
        """Detect objects in each image by all its views.

        Args:
            batched_inputs (list[dict]): Detectron2's test samples: ``image`` (C, H, W) and, where that is not
                the original image, ``height``, ``width`` and ``file_name`` of the original.

        Returns:
            list[dict]: {"instances": Instances} for each image, as ``GeneralizedRCNN`` returns it.

        Raises:
            ValueError: in training mode; for a resized sample without a file of the original size.
        """
        if self.model.training:
            raise ValueError("RCNNWithTTA is for inference only: call its eval() first")
        images = (original_image(sample, self.model.input_format) for sample in batched_inputs)
        return [{"instances": self._detect(image)} for image in images]

    def _detect(self, image):
        height, width = image.shape[1:]
        views = make_views(image, self.sizes, self.flip)
        boxes, scores, classes, features = self._raw_boxes(views)
        keep = batched_nms(boxes, scores, classes, self.nms_thresh)
        if self.max_detections >= 0:  # before voting, which changes no score
            keep = keep[: self.max_detections]
        instances = Instances((height, width), scores=scores[keep], pred_classes=classes[keep])
        vote = self.vote_thresh > 0
        instances.pred_boxes = Boxes(
            box_voting(boxes, scores, classes, keep, self.vote_thresh) if vote else boxes[keep]
        )
        if self.mask_on or self.keypoint_on:
            self._add_masks_and_keypoints(instances, features)
        return detector_postprocess(instances, height, width)

    def _groups(self, views):
        """The views in groups for one forward pass each."""
        for _, same_size in groupby(views, key=lambda view: view.image.shape):
            same_size = list(same_size)
            for start in range(0, len(same_size), self.batch_size):
                yield same_size[start : start + self.batch_size]

    def _raw_boxes(self, views):
        """What the views detect, on the original image.

        Returns:
            Tensor, Tensor, Tensor, list[tuple]: boxes (N, 4), scores (N,), classes (N,), and, for masks and
            keypoints, each group of views with the sizes of its images and its features.
        """
        boxes, scores, classes, kept = [], [], [], []
        # ROI heads end with the score threshold, NMS and the limit of detections. Without a limit, and with
        # an IoU that no two boxes exceed, any kind of heads returns just what is above the threshold.
        united = dict(test_score_thresh=self.score_thresh, test_nms_thresh=math.inf, test_topk_per_image=-1)
        with (
            _temporarily([self.model.roi_heads], mask_on=False, keypoint_on=False, **self._poolers),
            _temporarily(self._predictors, **({} if self.nms_per_view else united)),
        ):
            for group in self._groups(views):
                images = self.model.preprocess_image([{"image": view.image} for view in group])
                features = self.model.backbone(images.tensor)
                proposals, _ = self.model.proposal_generator(images, features, None)
                found, _ = self.model.roi_heads(images, features, proposals, None)
                for view, x in zip(group, found, strict=True):
                    boxes.append(view.boxes_to_original(x.pred_boxes.tensor.float()))
                    scores.append(x.scores.float())
                    classes.append(x.pred_classes)
                if self.mask_on or self.keypoint_on:
                    kept.append((group, images.image_sizes, features))
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes), kept

    def _add_masks_and_keypoints(self, instances, groups):
        """Add what Detectron2's heads add: ``pred_masks`` (N, 1, M, M) and the fields of keypoints.

        Args:
            instances (Instances): the final boxes and classes.
            groups (list[tuple]): from :meth:`_raw_boxes`.
        """
        heads = self.model.roi_heads
        masks = heatmaps = 0
        views = sum(len(group) for group, _, _ in groups)
        # forward_with_given_boxes would also decode every view's heatmaps, each at the size of its box.
        with _temporarily([heads], keypoint_on=False, **self._poolers):
            for group, sizes, features in groups:
                boxes = [Boxes(v.boxes_from_original(instances.pred_boxes.tensor)) for v in group]
                if self.mask_on:
                    found = [
                        Instances(size, pred_boxes=b, pred_classes=instances.pred_classes)
                        for size, b in zip(sizes, boxes, strict=True)
                    ]
                    found = heads.forward_with_given_boxes(features, found)
                    for view, x in zip(group, found, strict=True):
                        masks = masks + view.maps_to_original(x.pred_masks.float())
                if self.keypoint_on:
                    levels = [features[name] for name in heads.keypoint_in_features]
                    maps = heads.keypoint_head.layers(heads.keypoint_pooler(levels, boxes)).float()
                    maps = maps.reshape(len(group), len(instances), *maps.shape[1:])
                    for view, x in zip(group, maps, strict=True):
                        heatmaps = heatmaps + view.maps_to_original(x, self.keypoint_flip_indices)
        if self.mask_on:
            instances.pred_masks = masks / views
        if self.keypoint_on:
            keypoint_rcnn_inference(heatmaps / views, [instances])


def _keypoint_flip_indices(names):
    """For each keypoint the one on the other side; None where the first data set does not tell."""
    for name in names[:1]:
        metadata = MetadataCatalog.get(name)
        if metadata.get("keypoint_names") and metadata.get("keypoint_flip_map") is not None:
            return create_keypoint_hflip_indices(name)
    return None


@contextmanager
def _temporarily(modules, **values):
    """Set those of the attributes that each module has, and put them back whatever happens."""
    before = [(m, name, getattr(m, name)) for m in modules for name in values if hasattr(m, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, values[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
