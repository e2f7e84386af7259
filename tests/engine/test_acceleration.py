"""Faster ways to run a step train the same model, and survive an interruption."""

import pytest
import torch
from detectron2.utils import comm
from gloo import on_processes
from test_resume import StopsAfter, assert_equal

from rethink_d2 import model_zoo, recipe
from rethink_d2.engine import Trainer
from rethink_d2.engine.acceleration import set_sgd_implementation
from rethink_d2.engine.start import agree_on, find_start
from rethink_d2.modeling.pooler import FastROIPooler
from rethink_d2.preemption import Preempted

KEY = "SOLVER.ACCELERATE."


def config(folder, *options, processes=1):
    """Two iterations of the mini Mask R-CNN on small pictures."""
    data = [
        "DATASETS.TRAIN",
        "('glyphs_tiny_train',)",
        "DATASETS.TEST",
        "()",
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
    ]
    batch = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.IMS_PER_GROUP", "2", "SOLVER.CHECKPOINT_PERIOD", "0"]
    length = ["SOLVER.SCHEDULE", "", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "MODEL.DEVICE", "cpu"]
    length += ["SOLVER.WARMUP_FACTOR", "1.0"]  # so that an update is far above rounding
    path = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")
    return recipe.resolve(
        recipe.load(path, [*data, *batch, *length, "OUTPUT_DIR", str(folder), *map(str, options)]), processes
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory, glyph_cache):
    """The first iteration without any of them."""
    return first_iteration(config(tmp_path_factory.mktemp("plain")))


def first_iteration(cfg):
    """Stop after one iteration; its loss, and by how much it changed the weights."""
    trainer = Trainer(cfg, None, StopsAfter(0))
    before = weights(trainer)
    with pytest.raises(Preempted):
        trainer.train()
    loss, _ = trainer.storage.latest().get("total_loss", (None, 0))  # the main process has it
    return loss, weights(trainer) - before


def weights(trainer):
    return torch.cat([p.detach().reshape(-1).double() for p in trainer.model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        (f"{KEY}CHANNELS_LAST", True),
        (f"{KEY}ROI_ALIGN", True),
        (f"{KEY}SGD", "foreach"),
        (f"{KEY}SGD", "fused"),
    ],
    ids=str,
)
def test_it_trains_the_same_and_resumes_exactly(plain, tmp_path, options):
    cfg = config(tmp_path / "a", *options)
    loss, step = first_iteration(cfg)
    # One iteration, as then a last bit may choose other proposals; and all weights together, as a single bias
    # may be a sum of large terms that nearly cancel.
    assert loss == pytest.approx(plain[0], rel=1e-4)
    assert (step - plain[1]).norm() <= 1e-3 * plain[1].norm()

    resumed, unbroken = Trainer(cfg, find_start(cfg, resume=True)), Trainer(config(tmp_path / "b", *options))
    for trainer in (resumed, unbroken):
        trainer.train()
    assert_equal(dict(resumed.model.state_dict()), dict(unbroken.model.state_dict()))


TOGETHER = (f"{KEY}CHANNELS_LAST", True, f"{KEY}SGD", "fused", f"{KEY}ROI_ALIGN", True)
BFLOAT16 = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")


def on_a_process(folder):
    """With each set of options: an iteration, another after a resume, and two unbroken, in groups of one."""
    found = {}
    for options in ((), TOGETHER, TOGETHER + BFLOAT16):
        more = (*options, "SOLVER.IMS_PER_GROUP", 1)
        cfg = config(folder / f"{len(options)}-stopped", *more, processes=2)
        first = first_iteration(cfg)
        comm.synchronize()  # the checkpoint is there
        resumed = Trainer(cfg, agree_on(find_start(cfg, resume=True)))
        unbroken = Trainer(config(folder / f"{len(options)}-unbroken", *more, processes=2))
        assert resumed.groups == 2
        for trainer in (resumed, unbroken):
            trainer.train()
        found[options] = *first, weights(resumed), weights(unbroken)
    return found


@pytest.mark.slow
def test_together_with_processes_accumulation_and_resume(glyph_cache, tmp_path):
    one, other = on_processes(tmp_path / "processes", 2, on_a_process, tmp_path)
    for options, (loss, step, resumed, unbroken) in one.items():
        assert torch.equal(resumed, unbroken) and torch.equal(unbroken, other[options][3]), options
        exact = BFLOAT16[0] not in options
        assert loss == pytest.approx(one[()][0], rel=1e-4 if exact else 0.05)
        assert (step - one[()][1]).norm() <= (1e-3 if exact else 0.5) * one[()][1].norm()


def test_they_are_in_effect(tmp_path, glyph_cache):
    trainer = Trainer(config(tmp_path, *TOGETHER))
    heads = trainer.model.roi_heads
    assert {type(heads.box_pooler), type(heads.mask_pooler)} == {FastROIPooler}
    weight = trainer.model.backbone.bottom_up.res3[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


def test_wrong_values_name_the_key(tmp_path, glyph_cache):
    with pytest.raises(ValueError, match="SOLVER.ACCELERATE.SGD"):
        Trainer(config(tmp_path, f"{KEY}SGD", "quick"))


def test_poolers_that_cannot_be_replaced_name_the_key(tmp_path, glyph_cache):
    ratios = [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO" for head in ("BOX", "MASK")]
    with pytest.raises(ValueError, match="SOLVER.ACCELERATE.ROI_ALIGN.*POOLER_SAMPLING_RATIO"):
        Trainer(config(tmp_path, f"{KEY}ROI_ALIGN", True, ratios[0], 0, ratios[1], 0))


def updates(sgd):
    """Three weights after four updates; one has no gradient in the first, one never."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=0.01)
    set_sgd_implementation(optimizer, sgd)
    for step in range(4):
        for i, p in enumerate(weights):
            p.grad = None if i > 1 or (i == 1 and step == 0) else torch.randn(5)
        optimizer.step()
    return weights, [optimizer.state[p] for p in weights]


def test_fused_sgd_takes_parameters_that_get_a_gradient_later():
    (fused, state), (plain, expected) = updates("fused"), updates("")
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [list(s) for s in state] == [list(s) for s in expected] == [["momentum_buffer"]] * 2 + [[]]


@pytest.mark.parametrize("first", [True, False])
def test_fused_sgd_resumes_with_another_memory_format(tmp_path, glyph_cache, first):
    def run(then, sgd):
        folder, layout = tmp_path / f"{then}{sgd}", f"{KEY}CHANNELS_LAST"
        with pytest.raises(Preempted):
            Trainer(config(folder, layout, first, f"{KEY}SGD", sgd), None, StopsAfter(0)).train()
        cfg = config(folder, layout, then, f"{KEY}SGD", sgd)
        trainer = Trainer(cfg, find_start(cfg, resume=True, allow=[layout]))
        before = weights(trainer)
        trainer.train()
        return weights(trainer) - before

    plain, fused = run(not first, ""), run(not first, "fused")
    assert (fused - plain).norm() <= 1e-3 * plain.norm()


def test_acceleration_is_part_of_the_identity(tmp_path):
    assert recipe.identity(config(tmp_path)) != recipe.identity(config(tmp_path, f"{KEY}SGD", "fused"))
