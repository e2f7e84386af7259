"""COCO's average precision in a fraction of pycocotools' time, with the same results.

Matching and averaging run in `faster-coco-eval <https://github.com/MiXaiLL76/faster_coco_eval>`_, which goes
back to Detectron2's own C++ code and needs no compiler; masks are measured by pycocotools, which takes less
time for them.
"""

import copy
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
from faster_coco_eval import COCOeval_faster, faster_eval_api_cpp
from faster_coco_eval import mask as faster_mask_util
from pycocotools import mask as mask_util

from ..garbage import without_garbage_collection

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

    @without_garbage_collection()
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

    @without_garbage_collection()
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
        found = self._by_place(results, categories, tasks)
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

    def _by_place(self, results, categories, tasks):
        """Predictions by the data set's category id, then by image id."""
        found = defaultdict(lambda: defaultdict(list))
        for result in results:
            found[categories[result["category_id"]]][result["image_id"]].append(result)
        for image_id, group in itertools.chain(*(images.items() for images in found.values())):
            if image_id not in self._coco_api.imgs:
                raise ValueError(f"predictions for image {image_id}, not in {self._metadata.json_file}")
            for task in tasks:  # an image's predictions are of one kind
                if FIELDS[task] not in group[0]:
                    raise ValueError(f"tasks: {task} asked for, but predictions have no {FIELDS[task]}")
        return found

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
        result = next(iter(next(iter(found.values())).values()))[0]
        annotation = next(iter(self._coco_api.anns.values()), result)
        predicted, labelled = len(result["keypoints"]) // 3, len(annotation.get("keypoints", ())) // 3
        if not predicted == labelled == sigmas:
            raise ValueError(
                f"{predicted} keypoints are predicted, {self._metadata.json_file} has {labelled}, and"
                f" TEST.KEYPOINT_OKS_SIGMAS {sigmas} values (default: COCO's): set it, one for each keypoint"
            )


class _Evaluation(COCOeval_faster):
    """faster-coco-eval's evaluation, one category at a time and only of images that have something of it.

    ``eval`` and ``stats`` are pycocotools'. Unlike there, nothing is written into annotations or predictions.
    """

    def __init__(self, coco, found, task, **options):
        """
        Args:
            coco (pycocotools.coco.COCO): the annotations.
            found (defaultdict): category id -> image id -> predictions as in COCO's result files.
            task (str): a key of ``FIELDS``.
            options: COCOeval_faster's.
        """
        super().__init__(iouType=task, **options)
        self.cocoGt = coco
        self._found = found
        self.params.imgIds, self.params.catIds = sorted(coco.imgs), sorted(coco.cats)

    def evaluate(self):
        """Match, and compute precision and recall: pycocotools' evaluate() and accumulate()."""
        p = self.params
        p.maxDets = sorted(p.maxDets)
        images = set(p.imgIds)
        truth = defaultdict(lambda: defaultdict(list))
        for annotation in self.cocoGt.loadAnns(self.cocoGt.getAnnIds(list(images), p.catIds)):
            truth[annotation["category_id"]][annotation["image_id"]].append(annotation)
        shape = [len(x) for x in (p.iouThrs, p.recThrs, p.catIds, p.areaRng, p.maxDets)]
        # -1: nothing to find.
        self.eval = {name: np.full(shape, -1.0) for name in ("precision", "scores")}
        self.eval["recall"] = np.full(shape[:1] + shape[2:], -1.0)
        for index, category in enumerate(p.catIds):
            places = sorted(images.intersection(truth[category].keys() | self._found[category].keys()))
            if truth[category] and places:
                values = self._evaluate_category(truth[category], self._found[category], places)
                for name, array in self.eval.items():
                    array[..., index, :, :] = values[name][..., 0, :, :]

    def _evaluate_category(self, truth, found, images):
        ids = itertools.count(1)  # 0 would mean "not matched"
        objects, detections = faster_eval_api_cpp.Dataset(), faster_eval_api_cpp.Dataset()
        overlaps = []
        for place, image in enumerate(images):  # whose ids may be strings
            annotations = truth.get(image, ())
            for annotation in annotations:
                # As in pycocotools, an object with the id 0 is never found.
                number = 0 if annotation["id"] == 0 else next(ids)
                objects.append_ref(place, 0, self._object(number, annotation))
            results = sorted(found.get(image, ()), key=itemgetter("score"), reverse=True)
            results = results[: self.params.maxDets[-1]]
            for result, area in zip(results, self._areas(results), strict=True):
                detections.append_ref(place, 0, {"id": next(ids), "score": result["score"], "area": area})
            overlaps.append([self._overlaps(results, annotations) if results and annotations else []])
        params = copy.copy(self.params)
        params.imgIds, params.catIds = list(range(len(images))), [0]
        return faster_eval_api_cpp.COCOevalEvaluateAccumulate(
            params, overlaps, objects, detections, params.imgIds, [0], True
        )

    def _object(self, number, annotation):
        crowd = bool(annotation.get("iscrowd", 0))
        unlabelled = self.params.iouType == "keypoints" and annotation["num_keypoints"] == 0
        return {
            "id": number,
            "area": annotation["area"],
            "iscrowd": crowd,
            "ignore": crowd or unlabelled,
        }

    def _areas(self, results):
        if self.params.iouType == "segm":
            return [mask_util.area(result["segmentation"]) for result in results]
        # Of keypoints too, as in Detectron2.
        return [result["bbox"][2] * result["bbox"][3] for result in results]

    def _overlaps(self, results, annotations):
        """(results, annotations): IoU or, for keypoints, OKS (cocodataset.org/#keypoints-eval)."""
        if self.params.iouType == "keypoints":
            return self._similarity(results, annotations)
        crowd = [int(annotation.get("iscrowd", 0)) for annotation in annotations]
        if self.params.iouType == "segm":
            masks = [self.cocoGt.annToRLE(annotation) for annotation in annotations]
            return mask_util.iou([result["segmentation"] for result in results], masks, crowd)
        boxes = [annotation["bbox"] for annotation in annotations]
        return faster_mask_util.iou([result["bbox"] for result in results], boxes, crowd)

    def _similarity(self, results, annotations):
        points = np.array([r["keypoints"] for r in results]).reshape(len(results), 1, -1, 3)[..., :2]
        labels = np.array([a["keypoints"] for a in annotations], dtype=float).reshape(len(annotations), -1, 3)
        visible = labels[..., 2] > 0
        offset = points - labels[..., :2]  # (results, annotations, keypoints, 2)
        unlabelled = ~visible.any(axis=1)
        if unlabelled.any():
            # How far the points are outside of three times the box.
            boxes = np.array([a["bbox"] for a in annotations])[unlabelled, None]
            corner, size = boxes[..., :2], boxes[..., 2:]
            low, high = corner - size, corner + 2 * size
            offset[:, unlabelled] = np.maximum(low - points, 0) + np.maximum(points - high, 0)
            visible[unlabelled] = True
        areas = np.array([a["area"] for a in annotations])[:, None] + np.spacing(1)
        error = (offset**2).sum(axis=-1) / (2 * self.params.kpt_oks_sigmas) ** 2 / areas / 2
        return (np.exp(-error) * visible).sum(axis=-1) / visible.sum(axis=-1)
