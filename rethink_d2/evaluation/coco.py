"""COCO's average precision in a fraction of pycocotools' time, with the same results.

Matching and averaging run in `faster-coco-eval <https://github.com/MiXaiLL76/faster_coco_eval>`_, which goes
back to Detectron2's own C++ code and needs no compiler. Overlaps of boxes and masks come from pycocotools.
"""

import itertools
import json
import os
import pickle
from collections import defaultdict
from operator import itemgetter

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as mask_util

__all__ = ["FastCOCOEvaluator"]

# What a task compares, in predictions and in annotations.
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, faster: the same inputs, metrics, files and options but ``use_fast_impl``.

    Only the main process keeps the annotations. The other processes' predictions reach it as bytes and become
    objects one process at a time, and its own are not sent at all; Detectron2 copies every prediction when it
    gathers them, and once more for masks. Neither predictions nor annotations are changed, so
    :meth:`evaluate` can be called again, with other ``img_ids`` for example.
    """

    def __init__(self, dataset_name, tasks=None, distributed=True, output_dir=None, **options):
        """
        Args:
            dataset_name (str): a registered data set; the annotations are read once, here.
            tasks (tuple[str] or None): of "bbox", "segm", "keypoints"; None takes what the predictions have.
            distributed (bool): whether :meth:`evaluate` gathers the predictions of all processes.
            output_dir (str or None): a folder for the predictions, as Detectron2 writes them.
            options: ``max_dets_per_image``, ``kpt_oks_sigmas``, ``allow_cached_coco``, as Detectron2's.

        Raises:
            ValueError: an unknown task.
        """
        # Gathering is done here. The name "fast" is about Detectron2's C++ code, which few builds have.
        super().__init__(
            dataset_name, tasks, distributed=False, output_dir=output_dir, use_fast_impl=False, **options
        )
        if unknown := set(self._tasks or ()) - set(FIELDS):
            raise ValueError(f"tasks: {', '.join(sorted(unknown))} unknown; there are {', '.join(FIELDS)}")
        self._gathers = distributed
        if distributed and not comm.is_main_process():
            self._coco_api = None

    def evaluate(self, img_ids=None):
        """Compare the predictions of all processes with the annotations; every process must call this.

        Args:
            img_ids (list[int] or None): images to evaluate; None for all.

        Returns:
            dict[str, dict[str, float]]: for each task its metrics, 0-100, NaN where there is nothing to
            measure; empty but on the main process, or if nothing was processed.

        Raises:
            ValueError: predictions and annotations do not fit together.
        """
        if self._gathers:
            self._gather()
            if not comm.is_main_process():
                return {}
        return super().evaluate(img_ids)

    def _gather(self):
        """Move the other processes' predictions to the main process, in the order of ranks."""
        if comm.is_main_process():
            parts = comm.gather(b"")
            for rank, part in enumerate(parts):
                parts[rank] = None
                if part:
                    self._predictions += pickle.loads(part)
        else:
            part, self._predictions = pickle.dumps(self._predictions), []
            comm.gather(part)

    def _eval_predictions(self, predictions, img_ids=None):
        results = [result for prediction in predictions for result in prediction["instances"]]
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        categories = self._dataset_categories(results)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            self._logger.info("Saving results to %s", path)
            with PathManager.open(path, "w") as f:
                json.dump([{**r, "category_id": categories[r["category_id"]]} for r in results], f)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        self._check(results, tasks)
        found = defaultdict(list)
        for result in results:
            found[result["image_id"], categories[result["category_id"]]].append(result)
        for task in tasks:
            self._results[task] = self._derive_coco_results(
                self._compare(found, task, img_ids) if results else None,
                task,
                class_names=self._metadata.get("thing_classes"),
            )

    def _dataset_categories(self, results):
        """The data set's category id of each class of the model: dict[int, int]."""
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id")
        ids = {k: k for k in self._coco_api.cats} if ids is None else {v: k for k, v in ids.items()}
        if unknown := {result["category_id"] for result in results} - ids.keys():
            raise ValueError(
                f"predictions have class {min(unknown)}, {self._metadata.name} only {sorted(ids)}: set"
                " MODEL.ROI_HEADS.NUM_CLASSES to the number of its classes, or evaluate on the model's data"
            )
        return ids

    def _check(self, results, tasks):
        source = self._metadata.json_file
        if strange := {result["image_id"] for result in results} - self._coco_api.imgs.keys():
            raise ValueError(f"predictions for image {min(strange)}, which is not in {source}")
        for task in tasks:
            if not all(FIELDS[task] in result for result in results):
                raise ValueError(f"tasks: {task} asked for, but there are predictions without {FIELDS[task]}")

    def _compare(self, found, task, img_ids):
        evaluation = _Evaluation(
            self._coco_api,
            found,
            task,
            kpt_oks_sigmas=list(self._kpt_oks_sigmas) or None,
            print_function=self._logger.info,
        )
        if task == "keypoints":
            self._check_keypoints(found, len(evaluation.params.kpt_oks_sigmas))
        else:
            evaluation.params.maxDets = self._max_dets_per_image
        if img_ids is not None:
            evaluation.params.imgIds = img_ids
        evaluation.run()
        return evaluation

    def _check_keypoints(self, found, sigmas):
        result = next(iter(found.values()))[0]
        annotation = next(iter(self._coco_api.anns.values()), result)
        predicted, labelled = len(result["keypoints"]) // 3, len(annotation.get("keypoints", ())) // 3
        if not predicted == labelled == sigmas:
            raise ValueError(
                f"{predicted} keypoints are predicted, {self._metadata.json_file} has {labelled}, and"
                f" TEST.KEYPOINT_OKS_SIGMAS {sigmas} values (default: COCO's): set it, one for each keypoint"
            )


class _Evaluation(COCOeval_faster):
    """faster-coco-eval's evaluation without its copies of annotations, and with other code for overlaps.

    ``eval`` and ``stats`` are pycocotools'. Unlike there, nothing is written into annotations or predictions.
    """

    def __init__(self, coco, found, task, **options):
        """
        Args:
            coco (pycocotools.coco.COCO): the annotations.
            found (dict): (image id, category id) -> predictions as in COCO's result files.
            task (str): a key of ``FIELDS``.
        """
        super().__init__(iouType=task, rle_iou_max_workers=1, **options)
        self.cocoGt = coco
        self._predicted = found
        self.params.imgIds, self.params.catIds = sorted(coco.imgs), sorted(coco.cats)

    def _prepare(self):
        self._truth, self._found = defaultdict(list), {}
        images, categories = set(self.params.imgIds), set(self.params.catIds)
        for annotation in self.cocoGt.dataset["annotations"]:
            place = annotation["image_id"], annotation["category_id"]
            if place[0] in images and place[1] in categories:
                self._truth[place].append(annotation)
                self.gt_dataset.append_ref(*place, self._object(annotation))
        ids = itertools.count(1)  # 0 would mean "not matched"
        for place, results in self._predicted.items():
            best = sorted(results, key=itemgetter("score"), reverse=True)[: self.params.maxDets[-1]]
            self._found[place] = best
            for result in best:
                detection = {"id": next(ids), "score": result["score"], "area": self._area(result)}
                self.dt_dataset.append_ref(*place, detection)
        self._nonempty_iou_pairs = self._truth.keys() & self._found.keys()

    def _object(self, annotation):
        crowd = bool(annotation.get("iscrowd", 0))
        unlabelled = self.params.iouType == "keypoints" and annotation["num_keypoints"] == 0
        return {
            "id": annotation["id"],
            "area": annotation["area"],
            "iscrowd": crowd,
            "ignore": crowd or unlabelled,
        }

    def _area(self, result):
        # As in Detectron2, keypoints are small or large as their box is.
        if self.params.iouType == "segm":
            return mask_util.area(result["segmentation"])
        return result["bbox"][2] * result["bbox"][3]

    def computeIoU(self, image_id, category_id):
        """Overlaps (detections by falling score, annotations) in an image, of one category."""
        truth, found = self._truth[image_id, category_id], self._found[image_id, category_id]
        crowd = [int(annotation.get("iscrowd", 0)) for annotation in truth]
        if self.params.iouType == "segm":
            masks = [self.cocoGt.annToRLE(annotation) for annotation in truth]
            return mask_util.iou([result["segmentation"] for result in found], masks, crowd)
        boxes = [annotation["bbox"] for annotation in truth]
        return mask_util.iou([result["bbox"] for result in found], boxes, crowd)

    def computeOks(self, image_id, category_id):
        """As :meth:`computeIoU`, the similarity of keypoints (cocodataset.org, keypoints-eval)."""
        truth, found = self._truth[image_id, category_id], self._found[image_id, category_id]
        points = np.array([result["keypoints"] for result in found]).reshape(len(found), -1, 3)[..., :2]
        similarity = np.empty((len(found), len(truth)))
        for index, annotation in enumerate(truth):
            labels = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
            visible = labels[:, 2] > 0
            if visible.any():
                offset = points - labels[:, :2]
            else:
                # Nothing is labelled: how far points are outside of three times the box.
                corner, size = np.split(np.array(annotation["bbox"]), 2)
                offset = np.maximum(corner - size - points, 0) + np.maximum(points - corner - 2 * size, 0)
                visible[:] = True
            variance = (2 * self.params.kpt_oks_sigmas) ** 2
            error = (offset**2).sum(-1) / variance / (annotation["area"] + np.spacing(1)) / 2
            similarity[:, index] = np.exp(-error[:, visible]).mean(1)
        return similarity
