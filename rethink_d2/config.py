"""Every config key that this project adds to Detectron2's, one comment each."""

from detectron2.config import CfgNode as CN


def add_rethink_config(cfg):
    """Add this project's keys, with their defaults, to a Detectron2 config.

    Args:
        cfg (CfgNode): a config from :func:`detectron2.config.get_cfg`; changed in place.

    The defaults change nothing about how Detectron2 itself behaves, so it is safe to call this in
    any project.
    """
    # Initialization of the whole model, before MODEL.WEIGHTS is loaded: "" leaves what the
    # modules' constructors did; "msra", "detectron", "msra_all" are described in
    # modeling/initialization.py.
    cfg.MODEL.INIT = CN({"POLICY": ""})
    # Length of training: "" (SOLVER.MAX_ITER and STEPS count), "6x" (6 x ONE_X iterations of 16
    # images), "220k" or "300" (that many iterations). See solver/schedule.py for the rate drops.
    cfg.SOLVER.SCHEDULE = ""
    # What "1x" means, in iterations of 16 images: the paper's 90k. The tails after the rate drops are 2/3 and
    # 2/9 of it, so with less, every schedule shrinks in proportion.
    cfg.SOLVER.ONE_X = 90_000
    # Images per forward pass of one process. Each process runs IMS_PER_BATCH / IMS_PER_GROUP /
    # processes such groups per iteration and averages their gradients.
    # 0 means IMS_PER_BATCH / processes: no accumulation, as stock Detectron2.
    cfg.SOLVER.IMS_PER_GROUP = 0
    # Mixed precision (SOLVER.AMP.ENABLED): "float16", "bfloat16", or "" for float16 on a GPU and bfloat16
    # on a CPU, which has no need to scale the loss.
    cfg.SOLVER.AMP.DTYPE = ""
    # Faster steps (engine/acceleration.py), the result the same within float tolerance: tensors with
    # channels last; SGD "foreach" or "fused"; RoIAlign on all cores of a CPU; backbone and FPN compiled, for
    # which images are padded to multiples of 128 pixels (so group norm's statistics change a little).
    cfg.SOLVER.ACCELERATE = CN({"CHANNELS_LAST": False, "SGD": "", "ROI_ALIGN": False, "COMPILE": False})
    # For a phase of another model that starts from a run's checkpoint (engine/start.py): how long that run
    # has trained, as a length like SOLVER.SCHEDULE ("6x"); "" for a run of its own.
    cfg.SOLVER.CASCADE_FROM = ""
    # Checkpoints: keep the newest N (0: all) beside those after BRANCH_POINTS iterations and the best by
    # this metric of DATASETS.TEST (e.g. "bbox/AP"; "" for none).
    cfg.SOLVER.CHECKPOINT_KEEP = 0
    cfg.SOLVER.CHECKPOINT_BEST = ""
    cfg.SOLVER.BRANCH_POINTS = ()
    # Write checkpoints on a thread while training goes on, from a copy of the state.
    cfg.SOLVER.CHECKPOINT_BACKGROUND = True
    # Whether a checkpoint that cannot be written (disk full) stops the run, or is only reported.
    cfg.SOLVER.CHECKPOINT_REQUIRED = True
    # How many updates whose loss or gradient is not finite may be left out before the run is stopped.
    cfg.SOLVER.SKIP_NONFINITE = 0

    # Where scalars go beside metrics.json (engine/writers.py): "tensorboard", "wandb" (Weights & Biases).
    cfg.LOG = CN({"WRITERS": ("tensorboard",)})

    # A missing or corrupt image: "stop", or "skip" to take another image in its place and count.
    cfg.DATALOADER.ON_BAD_IMAGE = "stop"
    # The sample reader, a name in data/mapper.py's DATASET_MAPPER_REGISTRY.
    cfg.INPUT.MAPPER = "CountingMapper"
    # Image classification (data/classification.py), pixels: training takes a random crop of RELATIVE_AREA
    # of the image and resizes it to CROP_SIZE; evaluation resizes the shorter side to
    # INPUT.MIN_SIZE_TEST and takes the central CROP_SIZE.
    cfg.INPUT.CLASSIFICATION = CN({"CROP_SIZE": 224, "RELATIVE_AREA": (0.08, 1.0)})

    # The meta-architecture "Classifier" (modeling/classifier.py): number of classes, the backbone's feature
    # to classify, the side it is average-pooled to, and hidden fully connected layers (VGG's fc6, fc7).
    cfg.MODEL.CLASSIFIER = CN(
        {"NUM_CLASSES": 1000, "IN_FEATURE": "res5", "POOLER_RESOLUTION": 1, "FC_DIMS": []}
    )
    # build_vgg16_backbone (modeling/vgg.py): NORM "" for none, WIDTH the channels of the first stage (64 in
    # VGG-16), OUT_FEATURES among conv1..conv5.
    cfg.MODEL.VGG = CN({"NORM": "", "WIDTH": 64, "OUT_FEATURES": ["conv5"]})
    # LastStageMaskCascadeROIHeads (modeling/cascade.py): True trains the mask head on the boxes that enter
    # the last stage (the paper's reading), False on the first stage's proposals (Detectron2's way).
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.MASK_ON_LAST_STAGE = True

    # Test-time augmentation (modeling/tta.py): views per forward pass; the IoU from which on boxes vote on
    # the place of a kept one (0 for no voting); and whether each view goes through NMS on its own before the
    # boxes are united, as in Detectron2, instead of after, as in Detectron.
    cfg.TEST.AUG.IMS_PER_BATCH = 1
    cfg.TEST.AUG.BOX_VOTE_THRESH = 0.9
    cfg.TEST.AUG.NMS_PER_VIEW = False
