"""FastPolygonMasks: the mask head's targets, and selection, as with Detectron2's PolygonMasks."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.data.datasets import load_coco_json
from detectron2.structures import PolygonMasks
from hypothesis import given, settings
from hypothesis import strategies as st

from rethink_d2.data.fast_mapper import FastPolygonMasks

floats = st.floats(-40, 80, width=32)
outline = st.lists(st.floats(-40, 80), min_size=6, max_size=16).map(lambda p: np.array(p[: len(p) // 2 * 2]))
outlines = st.lists(st.lists(outline, max_size=3), min_size=1, max_size=5)


@given(outlines, st.data(), st.sampled_from([1, 14, 28]))
@settings(max_examples=100, deadline=None)
def test_mask_targets_are_equal_bit_for_bit(polygons, data, size):
    boxes = torch.tensor([[data.draw(floats) for _ in range(4)] for _ in polygons])
    ours = FastPolygonMasks(polygons).crop_and_resize(boxes, size)
    theirs = PolygonMasks(polygons).crop_and_resize(boxes, size)
    assert ours.dtype == theirs.dtype and ours.is_contiguous() and torch.equal(ours, theirs)


def test_mask_targets_of_genuine_objects(real_data):
    folder = real_data / "coco"
    records = load_coco_json(str(folder / "annotations/instances_val2017.json"), str(folder / "val2017"))
    for record in [r for r in records if any(not a["iscrowd"] for a in r["annotations"])][:6]:
        masks = FastPolygonMasks([a["segmentation"] for a in record["annotations"] if not a["iscrowd"]])
        shift = torch.rand(len(masks), 4, generator=torch.Generator().manual_seed(0)) * 20
        boxes = masks.get_bounding_boxes().tensor + shift
        ours = masks.crop_and_resize(boxes, 28)
        assert torch.equal(ours, PolygonMasks(masks.polygons).crop_and_resize(boxes, 28))
        assert ours.any()


def test_mask_targets_of_no_objects():
    assert FastPolygonMasks([]).crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)


@pytest.mark.parametrize(
    "item",
    [1, slice(1, None), [2, 0], torch.tensor([True, False, True]), torch.tensor([2, 2, 0]), torch.tensor([])],
)
def test_polygons_are_selected_as_in_detectron2(item):
    polygons = [[np.arange(6.0) + i] for i in range(3)]
    item = item.long() if isinstance(item, torch.Tensor) and not len(item) else item
    ours, theirs = FastPolygonMasks(polygons)[item], PolygonMasks(polygons)[item]
    assert type(ours) is FastPolygonMasks
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(mine, other, strict=True))


def test_polygons_stay_fast_when_joined_and_sent():
    masks = FastPolygonMasks([[np.arange(6.0)]])
    assert type(FastPolygonMasks.cat([masks, masks])) is FastPolygonMasks
    assert type(pickle.loads(pickle.dumps(masks)).to("cpu")) is FastPolygonMasks
