"""From image files and annotations to training samples in less time than Detectron2's mapper takes."""

import copy
import io

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import HFlipTransform, Transform, VFlipTransform
from PIL import Image
from pycocotools import mask as mask_util
from torch.utils.data import get_worker_info

from .mapper import DATASET_MAPPER_REGISTRY, CountingMapper

__all__ = ["FastMapper", "FastPolygonMasks"]

_EXIF_ORIENTATION = 0x0112


@DATASET_MAPPER_REGISTRY.register()
class FastMapper(CountingMapper):
    """Detectron2's :class:`DatasetMapper`, with OpenCV for the pixels and arrays for the annotations.

    Usable as ``build_detection_train_loader(cfg, mapper=FastMapper(cfg, True))``. It draws the same random
    numbers in the same order, so for one seed both mappers give the same geometry: the same boxes, masks and
    keypoints. The pixels of a file are the same too, until they are resized.

    Images are enlarged by OpenCV, as in Detectron (utils/blob.py), and shrunk by PyTorch, in place of PIL;
    the pixels differ by less than one grey level on average.

    What is unusual goes Detectron2's way, at its speed. Its reader takes files that are not upright RGB or
    greyscale JPEGs; its transforms take masks that are not polygons, rotated boxes, and all annotations
    where a crop may cut polygons; it prepares the whole sample where INPUT.FORMAT is neither BGR nor RGB, and
    with semantic segmentation or precomputed proposals.
    """

    def __call__(self, dataset_dict):
        """
        Args:
            dataset_dict (dict): one image in Detectron2's data set format; not changed.

        Returns:
            dict: what :class:`DatasetMapper` returns, plus ``greyscale`` (bool); polygons are
            :class:`FastPolygonMasks`.

        Raises:
            ValueError: the file cannot be read as an image; names it.
        """
        if (
            self.image_format not in ("BGR", "RGB")
            or self.proposal_topk is not None
            or "sem_seg_file_name" in dataset_dict
        ):
            return super().__call__(dataset_dict)
        if get_worker_info() is not None:
            # The loader's workers share the cores, so none has threads, as in PyTorch. 0 and not 1, which
            # would wait for the end of threads that a forked worker does not have.
            cv2.setNumThreads(0)
        # The annotations stay those of the record: they are many, and only replaced.
        sample = {k: v if k == "annotations" else copy.deepcopy(v) for k, v in dataset_dict.items()}
        image, sample["greyscale"] = _read(sample["file_name"], self.image_format)
        utils.check_image_size(sample, image)
        inputs = _PlanarInput(image)
        transforms = self.augmentations(inputs)
        sample["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, inputs.image.shape[:2])
        return sample

    def _transform_annotations(self, dataset_dict, transforms, image_shape):
        annotations = [dict(a) for a in dataset_dict["annotations"] if a.get("iscrowd", 0) == 0]
        if self._can_be_batched(annotations, transforms.transforms):
            del dataset_dict["annotations"]
            self._transform_batched(annotations, transforms, image_shape)
            instances = utils.annotations_to_instances(annotations, image_shape, self.instance_mask_format)
            _speed_up_masks(instances)
            if self.instance_mask_format != "polygon" or any(map(_may_be_empty, annotations)):
                instances = utils.filter_empty_instances(instances)
            dataset_dict["instances"] = instances
        else:
            dataset_dict["annotations"] = copy.deepcopy(dataset_dict["annotations"])
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            _speed_up_masks(dataset_dict["instances"])

    def _can_be_batched(self, annotations, transforms):
        """Whether the transforms treat every point alone, and the objects are alike."""
        flipped = self.keypoint_hflip_indices

        def alike(annotation):
            return (
                annotation["bbox_mode"] == annotations[0]["bbox_mode"]
                and annotation["bbox_mode"] in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
                and (not self.use_instance_mask or isinstance(annotation.get("segmentation"), list))
                and (not self.use_keypoint or len(annotation.get("keypoints", ())) == 3 * len(flipped))
            )

        pointwise = all(
            type(t).apply_polygons is Transform.apply_polygons and type(t).apply_box is Transform.apply_box
            for t in transforms
        )
        if self.recompute_boxes or (self.use_keypoint and flipped is None):
            return False
        return pointwise and all(map(alike, annotations))

    def _transform_batched(self, annotations, transforms, image_shape):
        """What ``detection_utils.transform_instance_annotations`` does, for all objects at once, in place."""
        height, width = image_shape

        def apply_box(boxes):
            if annotations[0]["bbox_mode"] == BoxMode.XYWH_ABS:
                # Detectron2 adds floating point numbers in single precision here.
                corners = boxes.astype(np.float32 if boxes.dtype == np.float64 else boxes.dtype)
                corners[:, 2:] += corners[:, :2]
                boxes = corners.astype(boxes.dtype)
            return np.minimum(transforms.apply_box(boxes).clip(min=0), [width, height, width, height])

        boxes = _batched(apply_box, [np.asarray(a["bbox"])[None] for a in annotations])
        for annotation, box in zip(annotations, boxes, strict=True):
            annotation.update(bbox=box[0], bbox_mode=BoxMode.XYXY_ABS)
        if self.use_instance_mask:
            polygons = [np.asarray(p).reshape(-1, 2) for a in annotations for p in a["segmentation"]]
            polygons = iter(_batched(transforms.apply_coords, polygons))
            for annotation in annotations:
                annotation["segmentation"] = [next(polygons).reshape(-1) for _ in annotation["segmentation"]]
        else:
            for annotation in annotations:
                annotation.pop("segmentation", None)
        if self.use_keypoint and annotations:
            flipped = np.asarray(self.keypoint_hflip_indices)
            flipped = flipped + len(flipped) * np.arange(len(annotations))[:, None]
            keypoints = utils.transform_keypoint_annotations(
                [a["keypoints"] for a in annotations], transforms, image_shape, flipped.reshape(-1)
            )
            for annotation, points in zip(annotations, keypoints.reshape(*flipped.shape, 3), strict=True):
                annotation["keypoints"] = points
        else:
            for annotation in annotations:
                annotation.pop("keypoints", None)


class FastPolygonMasks(PolygonMasks):
    """Detectron2's :class:`PolygonMasks`, which draws the mask head's targets of all objects at once.

    The targets are the same, bit for bit. Selections share their polygons, which nothing changes.
    """

    @classmethod
    def share(cls, polygons):
        """Masks of polygons that another object has checked, without copying them."""
        masks = cls([])
        masks.polygons = polygons
        return masks

    def __getitem__(self, item):
        item = item.cpu() if isinstance(item, torch.Tensor) else item
        return self.share([self.polygons[i] for i in torch.arange(len(self))[item].reshape(-1).tolist()])

    def crop_and_resize(self, boxes, mask_size):
        """
        Args:
            boxes (Tensor): Nx4, one for each object.
            mask_size (int): side of the result.

        Returns:
            Tensor: (N, mask_size, mask_size) bool, on the device of the boxes.
        """
        assert len(boxes) == len(self), f"{len(boxes)} != {len(self)}"
        corners, counts = boxes.cpu().numpy(), np.array([len(p) for p in self.polygons], dtype=int)
        masks = np.zeros((len(self), mask_size, mask_size), dtype=bool)
        polygons = [p for polygons in self.polygons for p in polygons]
        if polygons:
            lengths = np.array([len(p) for p in polygons])
            owner = np.repeat(np.repeat(np.arange(len(self)), counts), lengths // 2)
            scale = mask_size / np.maximum(corners[:, 2:] - corners[:, :2], 0.1)
            points = (np.concatenate(polygons).reshape(-1, 2) - corners[owner, :2]) * scale[owner]
            flat, ends = points.reshape(-1), np.cumsum(lengths)
            moved = [flat[start:end] for start, end in zip(ends - lengths, ends, strict=True)]
            drawn = mask_util.decode(mask_util.frPyObjects(moved, mask_size, mask_size)).astype(bool)
            first = np.cumsum(counts) - counts
            for nth in range(counts.max()):
                has = counts > nth
                masks[has] |= drawn.transpose(2, 0, 1)[first[has] + nth]
        return torch.from_numpy(masks).to(boxes.device)


def _may_be_empty(annotation):
    """Whether Detectron2's filter has to look at a transformed object; most images have none to remove."""
    x0, y0, x1, y1 = annotation["bbox"]
    return not (x1 - x0 > 0.1 and y1 - y0 > 0.1 and annotation.get("segmentation", True))


def _speed_up_masks(instances):
    if instances.has("gt_masks") and isinstance(instances.gt_masks, PolygonMasks):
        instances.gt_masks = FastPolygonMasks.share(instances.gt_masks.polygons)


class _PlanarInput(T.AugInput):
    """An image with fast resizing and flips; what to do, and all random draws, are the augmentations'.

    Args:
        image (ndarray): HxWx3 uint8, but channel after channel in memory, as a sample has it in the end.
            Nobody else's, as it is flipped in place.
    """

    def transform(self, tfm):
        image = self.image
        kind = type(tfm) if image.dtype == np.uint8 else None
        if kind is T.ResizeTransform and tfm.interp == Image.BILINEAR:
            self.image = _resize(image.transpose(2, 0, 1), tfm.new_h, tfm.new_w).transpose(1, 2, 0)
        elif kind in (HFlipTransform, VFlipTransform) and image.strides[1] == 1:
            for channel in range(image.shape[2]):
                plane = image[:, :, channel]
                cv2.flip(plane, int(kind is HFlipTransform), dst=plane)
        else:
            self.image = tfm.apply_image(image)


def _resize(planes, height, width):
    """Bilinear, of CxHxW uint8; smooths before it leaves pixels out, as PIL does."""
    if height < planes.shape[1] or width < planes.shape[2]:
        batch = torch.from_numpy(np.ascontiguousarray(planes))[None]
        return F.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0].numpy()
    resized = np.empty((len(planes), height, width), np.uint8)
    for plane, output in zip(planes, resized, strict=True):  # OpenCV does not smooth, but is faster
        cv2.resize(plane, (width, height), dst=output, interpolation=cv2.INTER_LINEAR)
    return resized


def _read(path, image_format):
    """Read a file to what Detectron2 reads from it.

    Returns:
        ndarray, bool: HxWx3 uint8 (see :class:`_PlanarInput`), and whether the file is greyscale.
    """
    with PathManager.open(path, "rb") as file:
        data = file.read()
    try:
        with Image.open(io.BytesIO(data)) as header:
            greyscale = header.mode in ("1", "L", "LA")
            usual = header.format == "JPEG" and header.mode in ("L", "RGB") and _is_upright(header)
            # OpenCV 4 takes a file that was cut short for a whole one: it has no end-of-image marker.
            usual = usual and data.endswith(b"\xff\xd9")
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if usual else None
        if image is None:
            image = utils.read_image(path, "BGR")
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} cannot be read as an image ({e}); replace or remove it") from e
    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes if image_format == "BGR" else planes[::-1]))
    return planes.transpose(1, 2, 0), greyscale


def _is_upright(image):
    """Whether no orientation is stored, as EXIF or XMP, that Detectron2 would apply."""
    try:
        return image.getexif().get(_EXIF_ORIENTATION) not in range(2, 9)
    except Exception:  # whatever its parser meets: Detectron2's reader judges
        return False


def _batched(function, arrays):
    """``[function(a) for a in arrays]`` for a function of single rows, with one call for each dtype.

    For each dtype, as Detectron2 leaves whole numbers whole when it transforms them.
    """
    results = [None] * len(arrays)
    for dtype in {a.dtype for a in arrays}:
        chosen = [i for i, a in enumerate(arrays) if a.dtype == dtype]
        rows, end = function(np.concatenate([arrays[i] for i in chosen])), 0
        for i in chosen:
            start, end = end, end + len(arrays[i])
            results[i] = rows[start:end]
    return results
