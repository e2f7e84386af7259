"""Evaluate a model on one data set, by the metric that belongs to it."""

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..data.loader import build_test_loader


def build_evaluator(cfg, name):
    """The evaluator for the data set `name`: COCO's metrics, or VOC's for VOC sets.

    Raises:
        ValueError: the data set's ``evaluator_type`` is neither.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type", None)
    if kind == "coco":
        # Without a folder no result files are written: run folders keep metrics only.
        return COCOEvaluator(name, output_dir=None, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise ValueError(
        f"DATASETS.TEST: {name} has evaluator_type {kind!r}; write MetadataCatalog.get({name!r})"
        ".evaluator_type = 'coco' (or 'pascal_voc') where you register it"
    )


def evaluate(cfg, model, name):
    """Run `model` over the data set `name`. Every process must call this.

    Returns:
        dict[str, float]: flat metrics such as ``bbox/AP`` (0-100); empty but on the main process.
    """
    # The loader first: it makes data sets that are generated on demand, which evaluators then read.
    loader = build_test_loader(cfg, name)
    results = inference_on_dataset(model, loader, build_evaluator(cfg, name))
    if not comm.is_main_process():
        return {}
    print_csv_format(results)
    return {k: float(v) for k, v in flatten_results_dict(results).items()}
