"""Small models of random weights that detect much: what test-time augmentation makes of their views."""

import math

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model, detector_postprocess
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import nn

from rethink_d2 import model_zoo, recipe
from rethink_d2.modeling import initialize
from rethink_d2.modeling.tta import RCNNWithTTA

KEYPOINTS = "glyphs_keypoints_tiny_val"
CASCADE = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_HEADS.NAME"]
KINDS = {
    "mask": [],
    "faster": ["MODEL.MASK_ON", "False"],
    "cascade": [*CASCADE, "CascadeROIHeads"],
    "cascade-last-stage-mask": [*CASCADE, "LastStageMaskCascadeROIHeads"],
    "c4": ["MODEL.BACKBONE.NAME", "build_scratch_resnet_backbone", "MODEL.RESNETS.DEPTH", "50"]
    + ["MODEL.RESNETS.WIDTH_PER_GROUP", "32", "MODEL.RESNETS.OUT_FEATURES", "['res4']"]
    + ["MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32, 64]]"]
    + ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"],
    "keypoint": ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"]
    + ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32,)", "DATASETS.TEST", f"('{KEYPOINTS}',)"],
}
FIELDS = {
    "mask": ["pred_masks"],
    "faster": [],
    "cascade": ["pred_masks"],
    "cascade-last-stage-mask": ["pred_masks"],
    "c4": ["pred_masks"],
    "keypoint": ["pred_masks", "pred_keypoints", "pred_keypoint_heatmaps"],
}
SIZE = (70, 101)  # height, width: neither is a multiple of the network's stride


def config(kind="mask", *overrides):
    """One view, the image as it is, and no voting, unless overridden."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"]
    options += ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.2"]
    options += ["MODEL.RPN.POST_NMS_TOPK_TEST", "60", "TEST.DETECTIONS_PER_IMAGE", "20"]
    options += ["INPUT.MIN_SIZE_TEST", "0", "TEST.AUG.MIN_SIZES", "()", "TEST.AUG.MAX_SIZE", "150"]
    options += ["TEST.AUG.FLIP", "False", "TEST.AUG.BOX_VOTE_THRESH", "0.0"]
    path = model_zoo.get_config_file("mini/Base-Mask-RCNN-FPN-mini.yaml")
    return recipe.load(path, options + KINDS[kind] + list(overrides))


@pytest.fixture(scope="module")
def models():
    """Builds each kind of model once."""
    built = {}

    def get(kind):
        if kind not in built:
            torch.manual_seed(0)
            model = build_model(config(kind))
            initialize(model, "msra")
            for layer in model.modules():
                if isinstance(layer, FastRCNNOutputLayers):
                    nn.init.normal_(layer.cls_score.weight, std=0.05)
                    nn.init.normal_(layer.bbox_pred.weight, std=0.05)
            built[kind] = model.eval()
        return built[kind]

    return get


def picture(seed=0, size=SIZE):
    """(3, H, W), coarse blobs as real images have, not noise of single pixels."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return torch.from_numpy(cv2.resize(coarse, size[::-1]).transpose(2, 0, 1).copy())


def detect(model, *images):
    return [x["instances"] for x in model([{"image": i} for i in images])]


def assert_same(a, b, fields, atol=1e-5):
    assert len(a) == len(b)
    assert a.image_size == b.image_size
    assert a.pred_classes.tolist() == b.pred_classes.tolist()
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=100 * atol)
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=atol)
    for field in fields:
        torch.testing.assert_close(a.get(field), b.get(field), rtol=0, atol=100 * atol)


@pytest.mark.parametrize("kind", KINDS)
def test_one_unchanged_view_gives_what_the_plain_model_gives(models, kind):
    images = picture(1), picture(2, (64, 90))
    augmented = detect(RCNNWithTTA(config(kind), models(kind)).eval(), *images)
    for image, with_tta in zip(images, augmented, strict=True):
        (plain,) = detect(models(kind), image)
        assert len(plain) == 20  # so that the limit of detections matters too
        if kind != "c4":  # whose features, means over the regions, hardly differ
            assert len(plain.pred_classes.unique()) > 1
        assert plain.get_fields().keys() == with_tta.get_fields().keys()
        assert_same(plain, with_tta, FIELDS[kind])


def test_normal_view_is_what_the_test_loader_makes_of_the_file(models, tmp_path):
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, picture().permute(1, 2, 0).numpy())
    cfg = config("mask", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "120")
    record = {"file_name": path, "height": SIZE[0], "width": SIZE[1]}
    sample = DatasetMapper(cfg, False)(record)
    assert sample["image"].shape == (3, 83, 120)
    (plain,) = models("mask")([sample])
    model = RCNNWithTTA(cfg, models("mask")).eval()
    for inputs in (sample, {**record, "image": picture()}):
        (with_tta,) = model([inputs])
        # Boxes are compared by NMS before or after they are scaled, so sums differ in the last bits.
        assert_same(plain["instances"], with_tta["instances"], [], atol=1e-4)
        differing = plain["instances"].pred_masks != with_tta["instances"].pred_masks
        assert differing.float().mean() < 1e-3


@pytest.mark.parametrize("kind", ["mask", "cascade", "keypoint"])
def test_flipped_image_gives_flipped_detections(models, kind):
    cfg = config(kind, "TEST.AUG.FLIP", "True", "TEST.AUG.BOX_VOTE_THRESH", "0.8")
    model = RCNNWithTTA(cfg, models(kind)).eval()
    image, width = picture(3), SIZE[1]
    ours, mirrored = detect(model, image, image.flip(2))
    assert len(ours) == 20
    boxes = mirrored.pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    mirrored.pred_boxes = Boxes(boxes + torch.tensor([width, 0, width, 0]))
    masks = mirrored.pred_masks.flip(2)
    assert (masks != ours.pred_masks).float().mean() < 1e-3  # pixels on the threshold
    fields = []
    if kind == "keypoint":
        fields = ["pred_keypoints", "pred_keypoint_heatmaps"]
        swap = [0, 1, 3, 2]
        names = MetadataCatalog.get(KEYPOINTS).keypoint_names
        assert [names[i] for i in swap] == ["top", "bottom", "right", "left"]
        keypoints = mirrored.pred_keypoints[:, swap]
        keypoints[:, :, 0] = width - keypoints[:, :, 0]
        mirrored.pred_keypoints = keypoints
        mirrored.pred_keypoint_heatmaps = mirrored.pred_keypoint_heatmaps.flip(3)[:, swap]
    assert_same(ours, mirrored, fields)


def test_masks_and_heatmaps_are_means_over_the_views(models):
    """The reference views are Detectron2's, and so is the inference on each."""
    cfg = config("keypoint", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "150")
    cfg.merge_from_list(["TEST.AUG.MIN_SIZES", "(80, 110)", "TEST.AUG.FLIP", "True"])
    model, image, swap = models("keypoint"), picture(4), [0, 1, 3, 2]
    (found,) = detect(RCNNWithTTA(cfg, model).eval(), image)
    assert len(found) == 20
    masks, heatmaps = [], []
    views = DatasetMapperTTA(min_sizes=[64, 80, 110], max_size=150, flip=True)
    for i, view in enumerate(views({"image": image, "height": SIZE[0], "width": SIZE[1]})):
        boxes = view["transforms"].apply_box(found.pred_boxes.tensor.numpy()).astype(np.float32)
        boxes = Boxes(torch.from_numpy(boxes))
        given = Instances(view["image"].shape[1:], pred_boxes=boxes, pred_classes=found.pred_classes)
        with torch.no_grad():
            (x,) = model.inference([view], [given], do_postprocess=False)
        masks.append(x.pred_masks.flip(3) if i % 2 else x.pred_masks)
        maps = x.pred_keypoint_heatmaps
        heatmaps.append(maps.flip(3)[:, swap] if i % 2 else maps)
    torch.testing.assert_close(found.pred_keypoint_heatmaps, torch.stack(heatmaps).mean(0), rtol=0, atol=1e-3)
    assert (heatmaps[0] - heatmaps[1]).abs().max() > 0.1
    reference = Instances(SIZE, pred_boxes=found.pred_boxes, pred_masks=torch.stack(masks).mean(0))
    pasted = detector_postprocess(reference, *SIZE).pred_masks
    assert (pasted != found.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("kind", ["mask", "faster", "cascade"])
def test_with_nms_per_view_it_detects_what_detectron2_does(models, kind):
    views = ["TEST.AUG.MAX_SIZE", "150", "INPUT.MAX_SIZE_TEST", "150", "TEST.AUG.FLIP", "True"]
    ours = config(kind, *views, "INPUT.MIN_SIZE_TEST", "64", "TEST.AUG.MIN_SIZES", "(80, 110)")
    ours.TEST.AUG.NMS_PER_VIEW = True
    theirs = config(kind, *views, "TEST.AUG.MIN_SIZES", "(64, 80, 110)")
    sample = {"image": picture(5), "height": SIZE[0], "width": SIZE[1]}
    # Two views share a pass, an image and its mirror image, so that none is padded to another's size.
    stock = GeneralizedRCNNWithTTA(theirs, models(kind), batch_size=2).eval()
    with torch.no_grad():
        (expected,) = stock([sample])
    (found,) = RCNNWithTTA(ours, models(kind)).eval()([sample])
    assert_same(found["instances"], expected["instances"], [], atol=1e-4)
    if kind != "faster":
        masks = [x["instances"].pred_masks for x in (found, expected)]
        assert (masks[0] != masks[1]).float().mean() < 1e-3


class ScriptedPredictor(FastRCNNOutputLayers):
    """Gives the boxes that it gets, with the scores that a test sets; one image at a time."""

    def forward(self, x):
        probabilities = self.script.pop(0)
        return probabilities.log(), torch.zeros(len(probabilities), 4 * self.num_classes)


def scripted(cfg, model, views):
    """TTA of `model` whose views find [(box in the view, class, score), ...]."""
    heads, proposals = model.roi_heads, []
    predictor = ScriptedPredictor(cfg, heads.box_head.output_shape)
    predictor.script = []
    for view in views:
        boxes = torch.tensor([[float(v) for v in box] for box, _, _ in view])
        scores = torch.full((len(view), predictor.num_classes + 1), 1e-6)
        for row, (_, label, score) in zip(scores, view, strict=True):
            row[label], row[-1] = score, 1 - score
        predictor.script.append(scores)
        proposals.append(boxes)

    def propose(images, features, targets):
        found = [Instances(images.image_sizes[0], proposal_boxes=Boxes(proposals.pop(0)))]
        return found, {}

    heads.box_predictor, model.proposal_generator.forward = predictor, propose
    return RCNNWithTTA(cfg, model).eval()


@pytest.fixture
def plain_model():
    """One that a test may change."""
    return build_model(config("faster")).eval()


@pytest.mark.parametrize("per_view", [False, True])
def test_views_are_united_before_nms_or_after(plain_model, per_view):
    """By NMS view by view, the first box removes the second before the third removes the first."""
    cfg = config("faster", "TEST.AUG.FLIP", "True", "TEST.AUG.NMS_PER_VIEW", str(per_view))
    first, second, third = (10, 10, 50, 50), (18, 10, 58, 50), (2, 10, 42, 50)  # IoU 2 / 3 of neighbours
    mirrored_third = (101 - 42, 10, 101 - 2, 50)
    views = [[(first, 1, 0.8), (second, 1, 0.7), (second, 2, 0.3)], [(mirrored_third, 1, 0.9)]]
    (found,) = detect(scripted(cfg, plain_model, views), picture())
    expected = [(third, 1, 0.9), (second, 1, 0.7), (second, 2, 0.3)]
    boxes, classes, scores = zip(*(expected[::2] if per_view else expected), strict=True)
    assert tuple(map(tuple, found.pred_boxes.tensor.round().tolist())) == boxes
    assert tuple(found.pred_classes.tolist()) == classes
    torch.testing.assert_close(found.scores, torch.tensor(scores), rtol=0, atol=1e-4)


def test_boxes_of_all_views_vote_but_none_below_the_threshold(plain_model):
    cfg = config("faster", "INPUT.MIN_SIZE_TEST", "140", "INPUT.MAX_SIZE_TEST", "999")  # twice the size
    cfg.merge_from_list(["TEST.AUG.FLIP", "True", "TEST.AUG.BOX_VOTE_THRESH", "0.8"])
    views = [
        # In the same view as the kept box, where NMS of this view alone would have removed it.
        [((20, 20, 100, 100), 1, 0.8), ((20, 20, 100, 104), 1, 0.4), ((20, 20, 100, 108), 1, 0.1)],
        [((202 - 108, 20, 202 - 20, 100), 1, 0.4), ((202 - 108, 20, 202 - 20, 100), 2, 0.4)],
    ]
    (found,) = detect(scripted(cfg, plain_model, views), picture())
    expected = torch.tensor([[10.0, 10, 51, 50.5], [10, 10, 54, 50]])
    torch.testing.assert_close(found.pred_boxes.tensor, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores, torch.tensor([0.8, 0.4]), rtol=0, atol=1e-4)


def state(model):
    """The type of every module, and every attribute but tensors."""
    kept = (bool, int, float, str, type(None))
    return {
        **{name: type(module) for name, module in model.named_modules()},
        **{
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, kept)
        },
    }


@pytest.mark.parametrize("failing", ["box_head", "mask_head", None])
def test_model_is_left_as_it_was(models, failing):
    model = models("keypoint")
    before, calls = state(model), []

    def fail_at_the_second_view(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a view failed")

    tta = RCNNWithTTA(config("keypoint", "TEST.AUG.FLIP", "True"), model)
    if failing:
        hook = getattr(model.roi_heads, failing).register_forward_pre_hook(fail_at_the_second_view)
        with pytest.raises(RuntimeError, match="a view failed"):
            detect(tta, picture())
        hook.remove()
    else:
        detect(tta, picture())
    assert state(model) == before
    assert before["roi_heads.keypoint_on"] is True


def test_wrapping_keeps_the_mode_of_the_model(plain_model):
    assert not RCNNWithTTA(config("faster"), plain_model).training
    plain_model.train()
    tta = RCNNWithTTA(config("faster"), plain_model)
    assert tta.training and plain_model.training
    with pytest.raises(ValueError, match="eval"):
        detect(tta, picture())


def test_batches_are_bounded_and_do_not_change_the_result(models):
    model, results = models("keypoint"), []
    modules = [model.backbone, model.roi_heads.mask_head, model.roi_heads.keypoint_head]
    counts = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        for module, seen in zip(modules, counts, strict=True)
    ]
    sizes = ["TEST.AUG.MIN_SIZES", "(80, 80, 60)", "TEST.AUG.FLIP", "True", "TEST.AUG.IMS_PER_BATCH"]
    for bound in ("1", "3"):
        tta = RCNNWithTTA(config("keypoint", *sizes, bound), model).eval()
        results += detect(tta, picture())
    for hook in hooks:
        hook.remove()
    batches, regions, decoded = counts
    # Once, for boxes, masks and keypoints. Sizes are never mixed.
    assert batches == 8 * [1] + [2, 3, 1, 2]
    # Masks of the final 20 boxes only; keypoints are decoded once, not by the head for each view.
    assert regions == 8 * [20] + [40, 60, 20, 40]
    assert decoded == []
    assert not results[0].scores.requires_grad
    assert_same(*results, ["pred_keypoint_heatmaps"], atol=1e-4)


def test_nothing_detected(models):
    cfg = config("keypoint", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0", "TEST.AUG.BOX_VOTE_THRESH", "0.9")
    (found,) = detect(RCNNWithTTA(cfg, models("keypoint")).eval(), picture())
    assert found.pred_masks.shape == (0, *SIZE)
    assert found.pred_keypoints.shape == (0, 4, 3)


def test_resized_samples_need_the_original_file(models, tmp_path):
    tta = RCNNWithTTA(config(), models("mask")).eval()
    resized = {"image": picture(), "height": 140, "width": 202}
    with pytest.raises(ValueError, match="INPUT.MIN_SIZE_TEST 0"):
        tta([resized])
    path = str(tmp_path / "other.png")
    cv2.imwrite(path, np.zeros((9, 11, 3), np.uint8))
    with pytest.raises(ValueError, match="other.png: the file is 9 x 11 pixels"):
        tta([{**resized, "file_name": path}])


@pytest.mark.parametrize(
    "kind, overrides",
    [
        ("faster", ["TEST.AUG.IMS_PER_BATCH", "0"]),
        ("faster", ["TEST.AUG.BOX_VOTE_THRESH", "1.5"]),
        ("faster", ["TEST.AUG.BOX_VOTE_THRESH", str(math.nan)]),
        ("keypoint", ["TEST.AUG.FLIP", "True", "DATASETS.TEST", "('glyphs_tiny_val',)"]),
    ],
)
def test_wrong_values_are_named(models, kind, overrides):
    with pytest.raises(ValueError, match=overrides[0]):
        RCNNWithTTA(config(kind, *overrides), models(kind))


def test_only_models_of_two_stages(models, plain_model):
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE GeneralizedRCNN"):
        RCNNWithTTA(config(), nn.Linear(1, 1))
    plain_model.proposal_generator = None
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS"):
        RCNNWithTTA(config(), plain_model)
