"""Image classifiers over any registered backbone: pre-training where no public weights exist.

A trained classifier is MODEL.WEIGHTS of a detector with the same backbone as it is: the parameters that
both have bear the same names, so Detectron2's checkpointer needs no conversion and no heuristics.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import ImageList
from torch import nn

__all__ = ["Classifier"]


@META_ARCH_REGISTRY.register()
class Classifier(nn.Module):
    """Average pooling of one feature, hidden fully connected layers, and a linear layer over the classes.

    With one cell and no hidden layer it is ResNet's classifier. VGG-16 has ``pooler_resolution`` 7 and
    ``fc_dims`` [4096, 4096], fc6 and fc7; two things are chosen otherwise than in VGG:

    - The last pool (14x14 to 7x7 for images of 224) takes averages, not maxima, and so gives 7x7 for every
      image size. In a detector fc6 reads 7x7 RoI features that never went through that pool.
    - No dropout (VGG: 0.5 after fc6 and fc7): the detector is fine-tuned without, as Detectron's.

    Args:
        backbone (Backbone): of one with a neck, such as an FPN, its ``bottom_up`` alone is kept.
        in_feature (str): the backbone's feature to classify.
        num_classes (int): number of classes.
        pooler_resolution (int): side of the pooled feature, in cells.
        fc_dims (Sequence[int]): widths of the hidden layers, each followed by ReLU.
        pixel_mean, pixel_std (Sequence[float]): per channel, as in GeneralizedRCNN.

    Raises:
        ValueError: the backbone does not give ``in_feature``; names the config key.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_feature,
        num_classes,
        pooler_resolution=1,
        fc_dims=(),
        pixel_mean,
        pixel_std,
    ):
        super().__init__()
        # The names are a detector's: backbone.bottom_up.* under an FPN, which itself starts afresh there;
        # backbone.* else; and roi_heads.box_head.fc1, fc2, as the head of the same class has them there.
        self.backbone = (
            nn.ModuleDict({"bottom_up": backbone.bottom_up}) if hasattr(backbone, "bottom_up") else backbone
        )
        shapes = self.body.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"MODEL.CLASSIFIER.IN_FEATURE is {in_feature!r}: the backbone gives {', '.join(shapes)}"
            )
        self.in_feature = in_feature
        self.pool = nn.AdaptiveAvgPool2d(pooler_resolution)
        channels = shapes[in_feature].channels
        width = channels * pooler_resolution**2
        self.roi_heads = nn.ModuleDict()
        if fc_dims:
            pooled = ShapeSpec(channels=channels, height=pooler_resolution, width=pooler_resolution)
            self.roi_heads["box_head"] = FastRCNNConvFCHead(pooled, conv_dims=[], fc_dims=fc_dims)
            width = fc_dims[-1]
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        c = cfg.MODEL.CLASSIFIER
        return {
            "backbone": build_backbone(cfg),
            "in_feature": c.IN_FEATURE,
            "num_classes": c.NUM_CLASSES,
            "pooler_resolution": c.POOLER_RESOLUTION,
            "fc_dims": c.FC_DIMS,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def body(self) -> Backbone:
        """The backbone without its neck."""
        return getattr(self.backbone, "bottom_up", self.backbone)

    def forward(self, batched_inputs):
        """
        Args:
            batched_inputs (list[dict]): each with ``image``, a (C, H, W) tensor of 0-255, and in training
                ``label`` (int). Images of several sizes are padded with zeros, which the pooling takes
                in, so give those of one batch the same size.

        Returns:
            dict or list[dict]: in training ``loss_cls``, the mean cross entropy; else for each image
            ``scores``, the classes' probabilities (num_classes,).
        """
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        batch = ImageList.from_tensors(images, self.body.size_divisibility)
        x = self.pool(self.body(batch.tensor)[self.in_feature])
        if "box_head" in self.roi_heads:
            x = self.roi_heads["box_head"](x)
        logits = self.classifier(x.flatten(1))
        if not self.training:
            return [{"scores": scores} for scores in logits.softmax(1)]
        labels = torch.tensor([x["label"] for x in batched_inputs], device=logits.device)
        return {"loss_cls": F.cross_entropy(logits, labels)}
