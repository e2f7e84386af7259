"""RoIAlign as sums of rows against torchvision's, values and gradients."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rethink_d2.modeling.pooler import FastROIPooler, replace_poolers

SCALES = (1 / 4, 1 / 8, 1 / 16)
HEIGHT, WIDTH = 64, 96


def features(scales=SCALES, images=2, channels=3, dtype=torch.float32):
    sizes = [(int(HEIGHT * s), int(WIDTH * s)) for s in scales]
    return [torch.randn(images, channels, *size, dtype=dtype).requires_grad_() for size in sizes]


def pooled(pooler, levels, boxes):
    """Output and gradients, for one random gradient of the output."""
    for level in levels:
        level.grad = None
    result = pooler(levels, boxes)
    weights = torch.linspace(-1, 1, result.numel()).reshape(result.shape)
    (result.float() * weights).sum().backward()
    return [result, *(level.grad for level in levels)]


def assert_same(pooler, levels, boxes):
    fast = FastROIPooler.like(pooler)
    expected = [t.clone() for t in pooled(pooler, levels, boxes)]
    found = pooled(fast, levels, boxes)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    return found


# Partly or wholly outside the image, without area, on pixel borders, of all levels.
number = st.one_of(st.integers(-40, 140), st.floats(-40, 140, width=32))
box = st.tuples(number, number, number, number).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(box, max_size=6), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 4, 7]),
    st.sampled_from(["ROIAlign", "ROIAlignV2"]),
    st.sampled_from([SCALES, SCALES[1:2]]),
)
def test_it_is_torchvision_s(boxes, samples, size, kind, scales):
    torch.manual_seed(0)
    pooler = ROIPooler(size, scales, samples, kind, canonical_box_size=32)
    lists = [Boxes(torch.tensor(b, dtype=torch.float32).reshape(-1, 4)) for b in boxes]
    assert_same(pooler, features(scales, len(boxes)), lists)


def test_levels_are_those_of_detectron2():
    """A small, a medium and a large box, each on a level of its own: only there is a gradient."""
    pooler = ROIPooler(2, SCALES, 2, "ROIAlign", canonical_box_size=32)
    boxes = torch.tensor([[5.0, 5, 10, 10], [5, 5, 25, 25], [5, 5, 60, 60]])
    for i in range(3):
        _, *gradients = assert_same(pooler, features(images=1), [Boxes(boxes[i : i + 1])])
        assert [bool(g.any()) for g in gradients] == [j == i for j in range(3)]


def test_bins_need_not_be_square():
    pooler = ROIPooler((3, 5), SCALES[:1], 2, "ROIAlign")
    result, _ = assert_same(pooler, features(SCALES[:1], 1), [Boxes(torch.tensor([[4.0, 8, 60, 50]]))])
    assert result.shape == (1, 3, 3, 5)


def test_half_precision_is_summed_in_single():
    """As torchvision's is under autocast."""
    levels = features(dtype=torch.bfloat16)
    boxes = [Boxes(torch.tensor([[4.0, 8, 60, 50]]))] * 2
    pooler = ROIPooler(7, SCALES, 2, "ROIAlign", canonical_box_size=32)
    fast = FastROIPooler.like(pooler)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = pooler(levels, boxes), fast(levels, boxes)
    assert found.dtype == expected.dtype == torch.bfloat16
    exact = fast([level.float() for level in levels], boxes)
    assert (found.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_it_gives_the_same_bits_each_time():
    boxes = [Boxes(torch.rand(40, 4).mul(30).cumsum(1))] * 2
    pooler = FastROIPooler.like(ROIPooler(7, SCALES, 2, "ROIAlign"))
    levels = features()
    first, second = ([t.clone() for t in pooled(pooler, levels, boxes)] for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind, samples", [("ROIPool", 0), ("ROIAlign", 0), ("ROIAlignRotated", 2)])
def test_others_stay_as_they_are(kind, samples):
    model = nn.ModuleDict({"pooler": ROIPooler(7, SCALES, samples, kind)})
    replace_poolers(model)
    assert type(model["pooler"]) is ROIPooler


def test_poolers_anywhere_in_a_model_are_replaced():
    class Own(ROIPooler):
        """Computes something else."""

    model = nn.Sequential(
        nn.ModuleDict({"a": ROIPooler(7, SCALES, 2, "ROIAlign")}), Own(7, SCALES, 2, "ROIAlign")
    )
    replace_poolers(model)
    assert type(model[0]["a"]) is FastROIPooler
    assert type(model[1]) is Own
