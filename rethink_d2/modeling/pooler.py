"""RoIAlign on the CPU in a fraction of the time, as one sum over the rows of a table."""

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)

__all__ = ["FastROIPooler", "fast_poolers", "replace_poolers"]


class FastROIPooler(ROIPooler):
    """Detectron2's :class:`ROIPooler`, of all levels at once and on all threads.

    On a CPU, torchvision's RoIAlign runs on one thread, and its backward pass strides through memory channel
    by channel. Here all levels are one table with a row of channels for each pixel. A bin of a region is a
    weighted sum of rows (four neighbours of each sample): ``embedding_bag``, whose backward pass is fast too.
    The result is the same within float tolerance, and the same from run to run.

    On other devices, and without regions, it does what :class:`ROIPooler` does. Its constructor is that
    one's; ``pooler_type`` has to be ROIAlign or ROIAlignV2, ``sampling_ratio`` positive.
    """

    @classmethod
    def like(cls, pooler):
        """A pooler that computes what a given one does.

        Args:
            pooler (ROIPooler): any.

        Returns:
            FastROIPooler; None where there is none: for RoIPool, rotated boxes, or as many samples as a bin
            has pixels (``sampling_ratio`` 0).
        """
        first = pooler.level_poolers[0]
        if type(first) is not ROIAlign or first.sampling_ratio <= 0:
            return None
        return cls(
            pooler.output_size,
            [level.spatial_scale for level in pooler.level_poolers],
            first.sampling_ratio,
            "ROIAlignV2" if first.aligned else "ROIAlign",
            pooler.canonical_box_size,
            pooler.canonical_level,
        )

    def forward(self, x, box_lists):
        """
        Args:
            x (list[Tensor]): features (N, C, H, W), one for each level.
            box_lists (list[Boxes]): the regions of each image.

        Returns:
            Tensor: (M, C, *output_size) for the M regions of all images; channels last in memory.
        """
        if x[0].device.type != "cpu" or not sum(map(len, box_lists)):
            return super().forward(x, box_lists)
        rows, weights = self._samples([level.shape[2:] for level in x], box_lists)
        # Rows in the order image, level, y, x. Sums are taken in float32 under autocast too, as there.
        table = torch.cat([level.flatten(2).transpose(1, 2) for level in x], dim=1).flatten(0, 1).float()
        with torch.autocast("cpu", enabled=False):
            pooled = F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")
        pooled = pooled.to(x[0].dtype).unflatten(0, (-1, *self.output_size))
        return pooled.permute(0, 3, 1, 2)

    @torch.no_grad()
    def _samples(self, sizes, box_lists):
        """Rows of the table (bins, samples) int32, and their weights."""
        boxes = convert_boxes_to_pooler_format(box_lists).float()
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        scales = boxes.new_tensor([level.spatial_scale for level in self.level_poolers])
        heights, widths = torch.tensor(sizes, dtype=torch.int32)[levels].unbind(1)
        ends = torch.tensor([h * w for h, w in sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        starts = torch.cat((ends.new_zeros(1), ends[:-1]))
        first = boxes[:, 0].int() * ends[-1] + starts[levels]
        x0, y0, x1, y1 = (boxes[:, 1:] * scales[levels, None] - 0.5 * self.level_poolers[0].aligned).unbind(1)
        y, y_weight = self._axis(y0, y1, heights, self.output_size[0])
        x, x_weight = self._axis(x0, x1, widths, self.output_size[1])
        y = first[:, None, None] + y * widths[:, None, None]
        rows = y[:, :, None, :, None] + x[:, None, :, None, :]
        weights = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
        return rows.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)

    def _axis(self, start, end, length, bins):
        """Where the samples of regions are along one axis, as torchvision ops/cpu/roi_align_common.h has it.

        Returns:
            Tensor, Tensor: indices of pixels (regions, bins, 2 x samples) int32, and their weights.
        """
        samples, aligned = self.level_poolers[0].sampling_ratio, self.level_poolers[0].aligned
        side = ((end - start if aligned else (end - start).clamp(min=1)) / bins)[:, None, None]
        # Regions, bins, samples; with torchvision's rounding, bits of which gradients of sums amplify.
        at = start[:, None, None] + torch.arange(bins)[:, None] * side
        at = at + (torch.arange(samples) + 0.5) * side / samples
        length = length[:, None, None]
        inside = (at >= -1) & (at <= length)  # others count as zero
        at = torch.minimum(at.clamp(min=0), length - 1)
        low = at.int()
        part = at - low
        index = torch.stack((low, torch.minimum(low + 1, length - 1)), dim=3)
        weight = torch.stack((1 - part, part), dim=3) * (inside / samples)[..., None]
        return index.flatten(2), weight.flatten(2)


def fast_poolers(module):
    """What can stand for the poolers that a module has as attributes.

    Args:
        module (nn.Module): ROI heads, for example.

    Returns:
        dict[str, FastROIPooler]: by attribute.
    """
    poolers = {name: child for name, child in module.named_children() if type(child) is ROIPooler}
    found = {name: FastROIPooler.like(pooler) for name, pooler in poolers.items()}
    return {name: fast for name, fast in found.items() if fast is not None}


def replace_poolers(model):
    """Put a :class:`FastROIPooler` in the place of every :class:`ROIPooler` that it can stand for.

    Args:
        model (nn.Module): changed in place; poolers have no parameters, so its state stays as it is.

    Returns:
        int: how many were replaced.
    """
    found = [(module, fast_poolers(module)) for module in model.modules()]
    for module, poolers in found:
        for name, fast in poolers.items():
            setattr(module, name, fast)
    return sum(len(poolers) for _, poolers in found)
