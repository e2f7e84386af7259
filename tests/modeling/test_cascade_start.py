"""A cascade starts from all of the Mask R-CNN but its box predictor, and nothing goes missing unnamed."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from torch import nn

from rethink_d2 import model_zoo, recipe
from rethink_d2.modeling import initialize
from rethink_d2.modeling.cascade_start import start_cascade

CASCADE = {
    "MODEL.ROI_HEADS.NAME": "LastStageMaskCascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
SYNCBN = {
    f"MODEL.{part}.NORM": "naiveSyncBN_N" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
}
KEYPOINTS = {"MODEL.KEYPOINT_ON": True, "MODEL.MASK_ON": False, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (8,)}


def config(**overrides):
    keys = {"MODEL.DEVICE": "cpu", "MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 16, **overrides}
    path = model_zoo.config_dir() / "mini/Base-Mask-RCNN-FPN-mini.yaml"
    return recipe.load(str(path), [str(part) for item in keys.items() for part in item])


def build(**overrides):
    """A model whose tensors all differ from each other and from any initialization."""
    model = build_model(config(**overrides))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(
                torch.randint_like(value, 1000) if value.dtype == torch.long else torch.rand_like(value)
            )
    return model


def momentum_of(model):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: {"momentum_buffer": torch.rand_like(p)} for name, p in trained}


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    model = build()
    return model.state_dict(), momentum_of(model)


@pytest.fixture(scope="module")
def cascade():
    return build(**CASCADE)


def expected_source(name):
    """Said another way than in the code: by the parts of the name."""
    heads, part, *rest = name.split(".")
    if heads == "roi_heads" and part == "box_predictor":
        return None
    if heads == "roi_heads" and part == "box_head":
        assert rest[0] in "012"
        return ".".join([heads, part, *rest[1:]])
    return name


@pytest.mark.parametrize(
    "variant",
    [{}, SYNCBN, KEYPOINTS, {"MODEL.BACKBONE.FREEZE_AT": 2}],
    ids=["gn", "syncbn", "keypoints", "frozen"],
)
def test_every_tensor_is_what_the_mapping_promises(variant):
    torch.manual_seed(1)
    trunk, model = build(**variant), build(**variant, **CASCADE)
    source, momentum, own = trunk.state_dict(), momentum_of(trunk), dict(model.state_dict())
    start = start_cascade(source, momentum, model)

    assert list(start.model_state) == list(own)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in start.model_state.items():
        origin = expected_source(name)
        assert start.copied.get(name) == origin
        assert (name in start.fresh) == (origin is None)
        assert torch.equal(value, own[name] if origin is None else source[origin]), name
        if origin is not None and name in trains:
            assert torch.equal(
                start.momentum[name]["momentum_buffer"], momentum[origin]["momentum_buffer"]
            ), name
        else:
            assert name not in start.momentum
    assert start.momentum.keys() <= own.keys()
    # Both sides are complete: nothing is left out without being named.
    assert set(start.copied.values()).isdisjoint(start.dropped)
    assert set(start.copied.values()) | set(start.dropped) == source.keys()
    assert sorted(start.dropped) == [
        f"roi_heads.box_predictor.{layer}.{kind}"
        for layer in ("bbox_pred", "cls_score")
        for kind in ("bias", "weight")
    ]
    model.load_state_dict(start.model_state)  # strict
    assert ("backbone.bottom_up.stem.conv1.norm.running_mean" in start.copied) == (variant is SYNCBN)
    assert any("keypoint_head" in name for name in start.copied) == (variant is KEYPOINTS)


def test_predictors_keep_the_initialization(trunk):
    torch.manual_seed(2)
    model = build_model(config(**CASCADE))
    initialize(model, "msra")
    start = start_cascade(*trunk, model)
    for k in range(3):
        for layer, std in (("cls_score", 0.01), ("bbox_pred", 0.001)):
            weight = start.model_state[f"roi_heads.box_predictor.{k}.{layer}.weight"]
            assert weight.std().item() == pytest.approx(std, rel=0.5)
            assert not start.model_state[f"roi_heads.box_predictor.{k}.{layer}.bias"].any()


def test_nothing_shares_memory(trunk, cascade):
    """An optimizer changes momentum in place: a buffer shared by the stages would get three updates."""
    start = start_cascade(*trunk, cascade)

    def addresses(state, momentum):
        tensors = [*state.values(), *(entry["momentum_buffer"] for entry in momentum.values())]
        return [t.data_ptr() for t in tensors]

    made = addresses(start.model_state, start.momentum)
    assert len(made) == len(set(made))
    assert set(made).isdisjoint(addresses(*trunk) + addresses(cascade.state_dict(), {}))


def test_inputs_stay_as_they_are(trunk, cascade):
    before = [{k: v.clone() for k, v in state.items()} for state in (trunk[0], cascade.state_dict())]
    start_cascade(*trunk, cascade)
    for was, now in zip(before, (trunk[0], cascade.state_dict()), strict=True):
        assert was.keys() == now.keys()
        assert all(torch.equal(was[name], now[name]) for name in was)


def test_next_step_continues_with_the_momentum(trunk):
    cfg = config(**CASCADE)
    model = build(**CASCADE)
    start = start_cascade(*trunk, model)
    model.load_state_dict(start.model_state)
    optimizer = build_optimizer(cfg, model)
    parameters = dict(model.named_parameters())
    for name, entry in start.momentum.items():
        optimizer.state[parameters[name]] = dict(entry)
    for k, p in enumerate(parameters.values()):
        p.grad = torch.full_like(p, 0.001 * k)
    optimizer.step()

    rate, keep, decay = cfg.SOLVER.BASE_LR, 0.9, 0.0001
    weights, momentum = trunk
    for k in range(3):
        name, source = f"roi_heads.box_head.{k}.fc1.weight", "roi_heads.box_head.fc1.weight"
        grad = parameters[name].grad + decay * weights[source]
        moved = weights[source] - rate * (keep * momentum[source]["momentum_buffer"] + grad)
        assert torch.allclose(parameters[name], moved, atol=1e-7)
        # Without a history, the first step is along the gradient alone.
        name = f"roi_heads.box_predictor.{k}.cls_score.weight"
        fresh = start.model_state[name]
        moved = fresh - rate * (parameters[name].grad + decay * fresh)
        assert torch.allclose(parameters[name], moved, atol=1e-7)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


CONV = "roi_heads.mask_head.deconv.weight"
BOX_CONV = "roi_heads.box_head.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, m: (without(w, CONV), m), f"weights .* missing {CONV}; left over nothing"),
        (lambda w, m: ({**w, "teacher.weight": w[CONV]}, m), "weights .* left over teacher.weight"),
        (lambda w, m: ({**w, BOX_CONV: w[BOX_CONV][:1]}, m), rf"{BOX_CONV} has shape \(1, 32, 3, 3\)"),
        (lambda w, m: (w, without(m, CONV)), f"momentum .* missing {CONV}; left over nothing"),
        (lambda w, m: (w, {**m, "teacher.weight": m[CONV]}), "momentum .* left over teacher.weight"),
        (lambda w, m: (w, {**m, CONV: {"momentum_buffer": torch.zeros(2)}}), rf"momentum of {CONV} .*\(2,\)"),
        (lambda w, m: (w, {**m, CONV: {"momentum_buffer": None}}), f"momentum of {CONV} has shape None"),
        (lambda w, m: (w, {**m, CONV: {**m[CONV], "step": 3}}), f"{CONV} is .*'step'.* not SGD"),
        (lambda w, m: (w, {}), "momentum .* and [0-9]+ more; left over nothing"),
        (lambda w, m: ({f"module.{k}": v for k, v in w.items()}, m), "weights .* left over module.backbone"),
    ],
)
def test_unmatched_tensors_are_named(trunk, cascade, change, message):
    with pytest.raises(ValueError, match=message):
        start_cascade(*change(*trunk), cascade)


def test_cascade_is_no_trunk(cascade):
    with pytest.raises(ValueError, match=r"left over roi_heads.box_head.0.conv1.norm.bias"):
        start_cascade(cascade.state_dict(), momentum_of(cascade), cascade)


def test_what_trains_must_have_trained(trunk):
    model = build(**CASCADE, **{"MODEL.BACKBONE.FREEZE_AT": 1})
    with pytest.raises(ValueError, match=r"missing nothing; left over backbone.bottom_up.stem.conv1"):
        start_cascade(*trunk, model)


@pytest.mark.parametrize("make", [build, lambda: nn.DataParallel(build(**CASCADE))], ids=["plain", "wrapped"])
def test_only_a_cascade_can_be_started(trunk, make):
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.NAME"):
        start_cascade(*trunk, make())
