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
    # Length of training: "" (SOLVER.MAX_ITER and STEPS count), "6x" (6 x 90k iterations of 16
    # images), "220k" or "300" (that many iterations). See solver/schedule.py for the rate drops.
    cfg.SOLVER.SCHEDULE = ""
    # Images per forward pass of one process. Each process runs IMS_PER_BATCH / IMS_PER_GROUP /
    # processes such groups per iteration and averages their gradients.
    # 0 means IMS_PER_BATCH / processes: no accumulation, as stock Detectron2.
    cfg.SOLVER.IMS_PER_GROUP = 0
