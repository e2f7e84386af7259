"""The cascade is Detectron2's, but for the boxes that its mask and keypoint heads train on."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks, pairwise_iou
from detectron2.utils.events import EventStorage

from rethink_d2 import model_zoo, recipe
from rethink_d2.modeling import describe
from rethink_d2.modeling.inspection import norms

SIZE = 96
# Stages 1 and 2 see boxes that stages 0 and 1 have moved to the right by this part of their width: the
# biases of the predictors below, over the regression weights 10 and 20.
SHIFT = 0.5 / 10, 1.0 / 20
OBJECTS = [[8, 8, 40, 40], [30, 20, 86, 60], [10, 50, 50, 90]]


def cascade_config(name="LastStageMaskCascadeROIHeads", **overrides):
    keys = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NAME": name,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "TEST.DETECTIONS_PER_IMAGE": 10,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,),
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
        **overrides,
    }
    path = model_zoo.config_dir() / "mini/Base-Mask-RCNN-FPN-mini.yaml"
    return recipe.load(str(path), [str(part) for item in keys.items() for part in item])


def cascade(name="LastStageMaskCascadeROIHeads", **overrides):
    """A cascade whose first two stages move every box by SHIFT."""
    torch.manual_seed(0)
    model = build_model(cascade_config(name, **overrides))
    with torch.no_grad():
        for predictor, bias in zip(model.roi_heads.box_predictor, (0.5, 1.0), strict=False):
            predictor.bbox_pred.bias[0] = bias
    return model


@pytest.fixture(scope="module")
def models():
    """By the key's value, and Detectron2's own class; the same weights in all."""
    key = "MODEL.ROI_BOX_CASCADE_HEAD.MASK_ON_LAST_STAGE"
    own = {value: cascade(**{key: value}) for value in (True, False)}
    models = {**own, "detectron2": cascade("CascadeROIHeads")}
    for model in models.values():
        model.load_state_dict(own[True].state_dict())
    return models


def sample(boxes, keypoints=False):
    """An image and its objects; the polygon of each is its box, so that a mask tells whose it is."""
    x = Instances((SIZE, SIZE), gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    x.gt_classes = torch.arange(len(boxes))
    x.gt_masks = PolygonMasks([[[a, b, c, b, c, d, a, d]] for a, b, c, d in boxes])
    if keypoints:
        # The first is in the middle of the object, so that no foreground box is without one.
        points = [[[(a + c) / 2, (b + d) / 2, 2], [c, d, 2]] for a, b, c, d in boxes]
        x.gt_keypoints = Keypoints(torch.tensor(points, dtype=torch.float32).reshape(-1, 2, 3))
    image = torch.randint(0, 256, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(len(boxes)))
    return {"image": image.float(), "height": SIZE, "width": SIZE, "instances": x}


def losses(model, batch, seed=3):
    model.train()
    torch.manual_seed(seed)  # the sampling of anchors and boxes
    with EventStorage():
        return model(batch)


def calls(module):
    """The list to which the inputs of every coming call of a module are added."""
    seen = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    return seen


def train_and_watch(model, batch, head):
    """What enters each stage, and what one head is trained on: boxes, and instances with ground truth."""
    stages = calls(model.roi_heads.box_pooler)
    pooled = calls(getattr(model.roi_heads, f"{head}_pooler"))
    trained = calls(getattr(model.roi_heads, f"{head}_head"))
    found = losses(model, batch)
    ((_, boxes),), ((_, instances),) = pooled, trained
    assert len(stages) == 3
    return [[b.tensor for b in entered] for _, entered in stages], [b.tensor for b in boxes], instances, found


def foreground(boxes, truth, threshold):
    """The boxes that overlap an object enough, and whose object it is."""
    if not len(truth):
        return boxes[:0], torch.zeros(0, dtype=torch.long)
    overlap, owner = pairwise_iou(truth.gt_boxes, Boxes(boxes)).max(dim=0)
    return boxes[overlap >= threshold], owner[overlap >= threshold]


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)], ids=str)
def test_mask_head_trains_on_the_boxes_that_enter_the_last_stage(counts):
    batch = [sample(OBJECTS[:n]) for n in counts]
    entered, trained, instances, found = train_and_watch(cascade(), batch, "mask")
    for i, item in enumerate(batch):
        truth = item["instances"]
        expected, owner = foreground(entered[2][i], truth, 0.7)
        assert len(expected) >= counts[i]  # at least the objects' own boxes, moved twice
        assert torch.equal(trained[i], expected)
        assert torch.equal(instances[i].proposal_boxes.tensor, expected)
        if counts[i]:
            assert torch.equal(instances[i].gt_classes, truth.gt_classes[owner])
            polygons = [truth.gt_masks.polygons[k][0].tolist() for k in owner]
            assert [p[0].tolist() for p in instances[i].gt_masks.polygons] == polygons
    assert (found["loss_mask"] > 0) == any(counts)
    if counts[0]:  # otherwise an earlier stage's threshold would do as well
        kept, earlier = (foreground(entered[2][0], batch[0]["instances"], iou)[0] for iou in (0.7, 0.5))
        assert len(kept) < len(earlier)


def test_objects_reach_the_mask_head_moved_by_both_stages():
    _, trained, _, _ = train_and_watch(cascade(), [sample(OBJECTS[:1])], "mask")
    a, b, c, d = OBJECTS[0]
    moved = torch.tensor([a + sum(SHIFT) * (c - a), b, c + sum(SHIFT) * (c - a), d])
    # The predictors' random weights move it a little as well.
    assert (trained[0] - moved).abs().amax(dim=1).min() < 0.5


def test_keypoint_head_trains_on_the_same_boxes():
    model = cascade(**{"MODEL.KEYPOINT_ON": True})
    batch = [sample(OBJECTS, keypoints=True), sample([], keypoints=True)]
    entered, trained, instances, found = train_and_watch(model, batch, "keypoint")
    truth = batch[0]["instances"]
    expected, owner = foreground(entered[2][0], truth, 0.7)
    assert torch.equal(trained[0], expected)
    assert torch.equal(instances[0].gt_keypoints.tensor, truth.gt_keypoints.tensor[owner])
    assert len(trained[1]) == 0
    assert found["loss_keypoint"] > 0


def test_stages_ask_for_more_overlap_each(models):
    heads = models[True].roi_heads
    assert [m.thresholds[1:-1] for m in heads.proposal_matchers] == [[0.5], [0.6], [0.7]]
    transforms = [p.box2box_transform.weights for p in heads.box_predictor]
    assert transforms == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    # Class-agnostic: four numbers, not four for each class.
    assert [p.bbox_pred.out_features for p in heads.box_predictor] == [4, 4, 4]
    assert [p.cls_score.out_features for p in heads.box_predictor] == [21, 21, 21]


def test_training_differs_from_detectron2_in_the_mask_loss_only_and_with_the_key_alone(models):
    batch = [sample(OBJECTS[:2]), sample(OBJECTS[2:])]
    found = {name: losses(model, batch) for name, model in models.items()}
    assert found[False] == found["detectron2"]
    assert found[True].keys() == found["detectron2"].keys()
    different = {name for name, loss in found[True].items() if loss != found["detectron2"][name]}
    assert different == {"loss_mask"}


def test_inference_is_detectron2s(models):
    batch = [sample(OBJECTS[:2]), sample([])]
    found = {}
    for name, model in models.items():
        model.eval()
        with torch.no_grad():
            found[name] = [x["instances"].get_fields() for x in model(batch)]
    assert len(found["detectron2"][0]["pred_boxes"]) > 0
    for name in (True, False):
        for mine, theirs in zip(found[name], found["detectron2"], strict=True):
            assert mine.keys() == theirs.keys() >= {"pred_boxes", "scores", "pred_classes", "pred_masks"}
            assert torch.equal(mine["pred_boxes"].tensor, theirs["pred_boxes"].tensor)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine.keys() - {"pred_boxes"})


def test_mask_loss_reaches_the_mask_head_and_not_the_box_heads():
    """The boxes of the last stage carry no gradient back into the stages before it."""
    model = cascade()
    losses(model, [sample(OBJECTS)])["loss_mask"].backward()
    assert model.roi_heads.mask_head.predictor.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.roi_heads.box_head.parameters())
    assert all(p.grad is None for p in model.roi_heads.box_predictor.parameters())


def test_one_stage_is_the_first_and_the_last():
    one = {
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5,),
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": ((10.0, 10.0, 5.0, 5.0),),
    }
    mine, theirs = cascade(**one), cascade("CascadeROIHeads", **one)
    batch = [sample(OBJECTS)]
    assert losses(mine, batch) == losses(theirs, batch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
        ({"MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.4]}, r"IOUS is \(0.5, 0.6, 0.7\).* MODEL.ROI_HEADS.IOU_THR"),
        ({"MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.6)}, "BBOX_REG_WEIGHTS has 3 entries.*IOUS has 2"),
    ],
    ids=["agnostic", "first", "stages"],
)
def test_keys_that_do_not_belong_together_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        cascade(**overrides)


def test_every_stage_is_initialized_and_counted(models):
    """The policies and the summary of norms know modules in lists too."""
    rows = {kind: (rule, count) for kind, rule, count in describe(models[True], "msra")}
    assert rows["class predictor"] == ("normal(0.01)", 3)
    assert rows["box predictor"] == ("normal(0.001)", 3)
    assert (rows["head conv"], rows["fc"]) == (("MSRA", 3), ("Xavier", 3))
    assert norms(models[True])["roi_heads.box_head"] == {"GN": 3}
