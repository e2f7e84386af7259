"""Boxes that vote on the place of a kept one."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rethink_d2.modeling import _box_voting
from rethink_d2.modeling._box_voting import box_voting

coordinate = st.integers(0, 12)
one_box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
detection = st.tuples(one_box, st.integers(0, 2), st.floats(0.05, 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(detection, max_size=12), st.data(), st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_box_voting_against_a_loop(detections, data, threshold):
    keep = data.draw(st.lists(st.sampled_from(range(len(detections))), unique=True)) if detections else []
    expected = []
    for k in keep:
        (x0, y0, x1, y1), label, _ = detections[k]
        total, mean = 0, np.zeros(4)
        for (u0, v0, u1, v1), other, score in detections:
            both = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
            either = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - both
            # In float32, as the overlap there decides.
            if other == label and both > 0 and np.float32(both) / np.float32(either) >= np.float32(threshold):
                total, mean = total + score, mean + score * np.array([u0, v0, u1, v1])
        expected.append(mean / total if total else np.array(detections[k][0], float))
    boxes = torch.tensor([d[0] for d in detections], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([d[2] for d in detections], dtype=torch.float32)
    classes = torch.tensor([d[1] for d in detections], dtype=torch.int64)
    voted = box_voting(boxes, scores, classes, torch.tensor(keep, dtype=torch.int64), threshold)
    reference = torch.tensor(np.array(expected), dtype=torch.float32).reshape(-1, 4)
    torch.testing.assert_close(voted, reference, rtol=0, atol=1e-4)


def test_box_voting_in_pieces(monkeypatch):
    torch.manual_seed(0)
    boxes = torch.rand(60, 4) * torch.tensor([5, 5, 5, 5]) + torch.tensor([0, 0, 20, 20])
    arguments = boxes, torch.rand(60), torch.randint(2, (60,)), torch.arange(0, 60, 2), 0.7
    whole = box_voting(*arguments)
    monkeypatch.setattr(_box_voting, "_MAX_PAIRS", 60 * 7)
    torch.testing.assert_close(box_voting(*arguments), whole)
    assert (whole - boxes[::2]).abs().max() > 0.1


def test_mixed_precision_does_not_round_votes():
    torch.manual_seed(0)
    boxes = 1500 + 100 * torch.rand(30, 1) + torch.tensor([0, 0, 20, 20]) + torch.rand(30, 4)
    arguments = boxes, torch.rand(30), torch.zeros(30), torch.arange(30), 0.7
    expected = box_voting(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(box_voting(*arguments), expected)
