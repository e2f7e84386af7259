"""The models that benchmarks run, each as this project builds it and as Detectron2 does."""

import copy

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import PolygonMasks

from .. import model_zoo, recipe
from ..data.fast_mapper import FastMapper

__all__ = [
    "MODELS",
    "config",
    "records",
    "records_of_shape",
    "samples",
    "stock_config",
    "stock_samples",
    "torchvision_model",
    "torchvision_samples",
]

MODELS = {
    "mini": "mini/scratch_mask_rcnn_R_18_FPN_gn.yaml",
    "R50": "scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml",
}


def config(model, dataset, shape, folder, **options):
    """The resolved recipe of a model for the CPU, one group of two images of one shape per step.

    Args:
        model (str): one of :data:`MODELS`.
        dataset (str): in COCO format, to train on.
        shape (tuple[int, int]): height and width of the images.
        folder (str or PathLike): for what a run writes.
        options: further keys, with ``__`` for dots.

    Returns:
        CfgNode

    Raises:
        ValueError: the data set's annotations are not there.
    """
    records(dataset)  # sets the names of the classes
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": len(MetadataCatalog.get(dataset).thing_classes),
        "INPUT.MIN_SIZE_TRAIN": (min(shape),),
        "INPUT.MAX_SIZE_TRAIN": max(shape),
        "DATASETS.TRAIN": (dataset,),
        "DATASETS.TEST": (),
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.IMS_PER_GROUP": 2,
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "TEST.EVAL_PERIOD": 0,
        "OUTPUT_DIR": str(folder),
        **{key.replace("__", "."): value for key, value in options.items()},
    }
    given = [str(part) for pair in values.items() for part in pair]
    return recipe.resolve(recipe.load(model_zoo.get_config_file(MODELS[model]), given), 1)


def stock_config(cfg):
    """The same recipe with Detectron2's own backbone builder, where it can build the network."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.RESNETS.DEPTH >= 50:  # it refuses narrow ResNet-18s
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    return cfg


def records(dataset):
    """A data set's records.

    Raises:
        ValueError: its annotations are not there.
    """
    try:
        return DatasetCatalog.get(dataset)
    except FileNotFoundError as e:
        raise ValueError(f"--dataset {dataset}: there is no {e.filename}; set DETECTRON2_DATASETS") from e


def records_of_shape(dataset, shape, count):
    """The first records with objects whose images are resized to a shape.

    Raises:
        ValueError: there are fewer.
    """
    found = [
        record
        for record in records(dataset)
        if sum(not a["iscrowd"] for a in record["annotations"]) > 1
        and ResizeShortestEdge.get_output_shape(record["height"], record["width"], min(shape), max(shape))
        == tuple(shape)
    ][:count]
    if len(found) < count:
        raise ValueError(f"--dataset {dataset}: fewer than {count} images with objects become {shape}")
    return found


def samples(cfg, shape, count):
    """Training samples of a shape, by :class:`FastMapper`.

    Returns:
        list[dict]
    """
    mapper = FastMapper(cfg, True)
    (dataset,) = cfg.DATASETS.TRAIN
    return [{**mapper(record), "bad_images": []} for record in records_of_shape(dataset, shape, count)]


def stock_samples(batch):
    """The same samples with the masks as Detectron2's mapper leaves them."""
    batch = [{**sample, "instances": copy.copy(sample["instances"])} for sample in batch]
    for sample in batch:
        instances = sample["instances"]
        sample["instances"] = type(instances)(instances.image_size, **instances.get_fields())
        sample["instances"].gt_masks = PolygonMasks(instances.gt_masks.polygons)
    return batch


def torchvision_model(cfg):
    """torchvision's Mask R-CNN with group norm, and the heads, anchors and numbers of regions of a config.

    Args:
        cfg (CfgNode): of a ResNet-50 with FPN.

    Returns:
        MaskRCNN
    """
    from torchvision.models import resnet50
    from torchvision.models.detection import MaskRCNN, backbone_utils, faster_rcnn, mask_rcnn, rpn
    from torchvision.ops import MultiScaleRoIAlign

    def norm(channels):
        return torch.nn.GroupNorm(32, channels)

    anchors, head = cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.ROI_HEADS
    box, mask, classes = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD, head.NUM_CLASSES + 1
    sizes = tuple(map(tuple, anchors.SIZES))
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    backbone = backbone_utils.BackboneWithFPN(
        resnet50(norm_layer=norm),
        {f"layer{i}": str(i - 1) for i in range(1, 5)},
        [256, 512, 1024, 2048],
        channels,
        norm_layer=norm,
    )
    mask_channels = [mask.CONV_DIM] * mask.NUM_CONV
    shape = {"min_size": cfg.INPUT.MIN_SIZE_TRAIN, "max_size": cfg.INPUT.MAX_SIZE_TRAIN}
    levels = ["0", "1", "2", "3"]
    return MaskRCNN(
        backbone,
        **shape,
        image_mean=[v / 255 for v in cfg.MODEL.PIXEL_MEAN],
        image_std=[1 / 255] * 3,
        rpn_anchor_generator=rpn.AnchorGenerator(
            sizes, tuple(map(tuple, anchors.ASPECT_RATIOS)) * len(sizes)
        ),
        rpn_pre_nms_top_n_train=cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_train=cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN,
        rpn_batch_size_per_image=cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE,
        box_roi_pool=MultiScaleRoIAlign(levels, box.POOLER_RESOLUTION, box.POOLER_SAMPLING_RATIO),
        box_head=faster_rcnn.FastRCNNConvFCHead(
            (channels, box.POOLER_RESOLUTION, box.POOLER_RESOLUTION),
            [box.CONV_DIM] * box.NUM_CONV,
            [box.FC_DIM] * box.NUM_FC,
            norm,
        ),
        box_predictor=faster_rcnn.FastRCNNPredictor(box.FC_DIM, classes),
        box_batch_size_per_image=head.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=head.POSITIVE_FRACTION,
        mask_roi_pool=MultiScaleRoIAlign(levels, mask.POOLER_RESOLUTION, mask.POOLER_SAMPLING_RATIO),
        mask_head=mask_rcnn.MaskRCNNHeads(channels, mask_channels, 1, norm),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(mask.CONV_DIM, mask.CONV_DIM, classes),
    ).train()


def torchvision_samples(batch):
    """Detectron2's training samples as torchvision's models take them.

    Returns:
        tuple[list[Tensor], list[dict]]: images and targets.
    """
    images = [sample["image"].float() / 255 for sample in batch]
    targets = []
    for sample in batch:
        instances = sample["instances"]
        whole = torch.tensor([[0.0, 0.0, *instances.image_size[::-1]]])
        size = instances.image_size
        masks = instances.gt_masks.crop_and_resize(whole.expand(len(instances), 4), max(size))
        masks = torch.nn.functional.interpolate(masks[None].float(), size)[0].byte()
        labels = instances.gt_classes + 1
        targets.append({"boxes": instances.gt_boxes.tensor, "labels": labels, "masks": masks})
    return images, targets
