"""Top-1 and top-5 accuracy."""

from collections import Counter

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

__all__ = ["ClassificationEvaluator"]


class ClassificationEvaluator(DatasetEvaluator):
    """Counts images whose ``label`` has the highest score, or one of the five highest.

    Works on the inputs and outputs of :class:`rethink_d2.modeling.classifier.Classifier`. Only counts are
    gathered from the processes, never scores.
    """

    def __init__(self):
        self.reset()

    def reset(self):
        self._counts = Counter()

    def process(self, inputs, outputs):
        """
        Args:
            inputs (list[dict]): each with ``label`` (int).
            outputs (list[dict]): each with ``scores`` (num_classes,).
        """
        for sample, output in zip(inputs, outputs, strict=True):
            scores = output["scores"]
            ranked = scores.topk(min(5, len(scores))).indices.tolist()
            self._counts.update(images=1, top1=ranked[0] == sample["label"], top5=sample["label"] in ranked)

    def evaluate(self):
        """Every process must call this.

        Returns:
            dict or None: ``{"classification": {"top1": ..., "top5": ...}}``, 0-100 (with fewer than five
            classes top5 is 100); None but on the main process.
        """
        gathered = comm.gather(self._counts)
        if not comm.is_main_process():
            return None
        total = sum(gathered, Counter())
        return {"classification": {key: 100 * total[key] / total["images"] for key in ("top1", "top5")}}
