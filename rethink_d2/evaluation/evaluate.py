"""Evaluate a model on one data set, by the metric that belongs to it."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..data.loader import build_test_loader
from ..modeling.tta import RCNNWithTTA
from .classification import ClassificationEvaluator
from .coco import FastCOCOEvaluator
from .voc import VOCEvaluator


def build_evaluator(cfg, name):
    """The evaluator for the data set `name`: COCO's metrics, VOC's, or top-1 and top-5 accuracy.

    Raises:
        ValueError: the data set's ``evaluator_type`` is none of them, or it lacks what that needs.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", None)
    if kind == "coco":
        if not MetadataCatalog.get(name).get("json_file"):
            raise ValueError(
                f"DATASETS.TEST: {name} has evaluator_type 'coco' but no file of annotations; write "
                f"MetadataCatalog.get({name!r}).json_file = ... where you register it"
            )
        # Without a folder no result files are written: run folders keep metrics only.
        return FastCOCOEvaluator(name, output_dir=None, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if kind == "pascal_voc":
        return VOCEvaluator(name)
    if kind == "classification":
        return ClassificationEvaluator()
    raise ValueError(
        f"DATASETS.TEST: {name} has evaluator_type {kind!r}; write MetadataCatalog.get({name!r})"
        ".evaluator_type = 'coco', 'pascal_voc' or 'classification' where you register it"
    )


def evaluate(cfg, model, name, around=None):
    """Run `model` over the data set `name`. Every process must call this.

    With ``TEST.AUG.ENABLED`` the model sees each image in many views (:class:`RCNNWithTTA`), and only so; its
    metrics are then named as Detectron2's projects do, such as ``bbox_TTA/AP``.

    Args:
        cfg (CfgNode): a resolved config.
        model (nn.Module): the model.
        name (str): a registered data set.
        around (callable or None): wraps the loader, e.g. to end the evaluation early by an exception.

    Returns:
        dict[str, float]: flat metrics such as ``bbox/AP`` (0-100); empty but on the main process.

    Raises:
        ValueError: no metric for the data set, or test-time augmentation does not fit the model.
    """
    suffix = ""
    if cfg.TEST.AUG.ENABLED:
        suffix = "_TTA"
        model = RCNNWithTTA(cfg, model)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST = 0  # the views are made from the original image
    # The loader first: it makes data sets that are generated on demand, which evaluators then read.
    loader = build_test_loader(cfg, name)
    if around is not None:
        loader = around(loader)
    results = inference_on_dataset(model, loader, build_evaluator(cfg, name))
    if not comm.is_main_process():
        return {}
    results = {f"{task}{suffix}": metrics for task, metrics in results.items()}
    print_csv_format(results)
    return {k: float(v) for k, v in flatten_results_dict(results).items()}
