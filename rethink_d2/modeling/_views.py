"""The views of an image for test-time augmentation: sizes and mirror images."""

from typing import NamedTuple

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge, ResizeTransform


class View(NamedTuple):
    """An image at another size, and perhaps mirrored.

    Attributes:
        image (Tensor): (C, H, W).
        scale (tuple[float, float]): the view's width and height, divided by the original's.
        flipped (bool): whether left and right have changed places.
    """

    image: torch.Tensor
    scale: tuple[float, float]
    flipped: bool

    def boxes_from_original(self, boxes):
        """The boxes (N, 4) of the original image, in this view."""
        return self._mirror(boxes * boxes.new_tensor(self.scale * 2))

    def boxes_to_original(self, boxes):
        """The boxes (N, 4) of this view, in the original image."""
        return self._mirror(boxes) / boxes.new_tensor(self.scale * 2)

    def maps_to_original(self, maps, flipped_channels=slice(None)):
        """Masks or heatmaps (N, K, M, M) of this view's boxes, for the same boxes in the original image.

        Args:
            maps (Tensor): relative to their boxes, so that the size of the view does not matter.
            flipped_channels (list[int]): which channel becomes the first, the second, ... if mirrored.
        """
        return maps.flip(3)[:, flipped_channels] if self.flipped else maps

    def _mirror(self, boxes):
        if not self.flipped:
            return boxes
        width = self.image.shape[2]
        x0, y0, x1, y1 = boxes.unbind(1)
        return torch.stack((width - x1, y0, width - x0, y1), dim=1)


def make_views(image, sizes, flip):
    """Resize an image as Detectron2's test loader does, and mirror it.

    Args:
        image (Tensor): (C, H, W).
        sizes (list[tuple[int, int]]): shorter and greatest longer side; a shorter side of 0 keeps the size.
        flip (bool): follow each view by its mirror image.

    Returns:
        list[View]: on the CPU.
    """
    views = []
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    height, width = pixels.shape[:2]
    for shorter, longest in sizes:
        resized = pixels
        if shorter > 0:
            # Called as an augmentation it would draw from numpy's generator, even for one size.
            shape = ResizeShortestEdge.get_output_shape(height, width, shorter, longest)
            resized = ResizeTransform(height, width, *shape).apply_image(pixels)
        scale = (resized.shape[1] / width, resized.shape[0] / height)
        resized = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        views.append(View(resized, scale, False))
        if flip:
            views.append(View(resized.flip(2), scale, True))
    return views


def original_image(sample, image_format):
    """The image of a test sample at its original size.

    Args:
        sample (dict): Detectron2's test sample: ``image`` (C, H, W) and, where that is not the original,
            ``height``, ``width`` and ``file_name`` of it.
        image_format (str): as INPUT.FORMAT, to read the file.

    Returns:
        Tensor: (C, H, W); the sample's own image unless it has been resized.

    Raises:
        ValueError: resized without a file, or the file has another size.
    """
    image = sample["image"]
    given = tuple(image.shape[1:])
    original = (sample.get("height", given[0]), sample.get("width", given[1]))
    if given == original:
        return image
    if "file_name" not in sample:
        raise ValueError(
            f"a sample's image is {given[0]} x {given[1]}, but its height and width are {original[0]} x "
            f"{original[1]}: test-time augmentation needs the original image or its file_name; build the "
            "loader with INPUT.MIN_SIZE_TEST 0"
        )
    pixels = read_image(sample["file_name"], format=image_format)
    if pixels.shape[:2] != original:
        raise ValueError(
            f"{sample['file_name']}: the file is {pixels.shape[0]} x {pixels.shape[1]} pixels, but its "
            f"sample's height and width are {original[0]} x {original[1]}"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
