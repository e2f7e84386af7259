"""Training lengths, rate drops, and rates that depend on the iteration alone."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.lr_scheduler import LRMultiplier
from hypothesis import given, settings
from hypothesis import strategies as st

from rethink_d2.config import add_rethink_config
from rethink_d2.solver import IterationLR, Schedule, build_lr_scheduler, multiplier, parse

WARMUP = {"gamma": 0.1, "warmup_iters": 500, "warmup_factor": 1 / 3}


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r} for r in rates], lr=1.0)


def config(schedule="2x", **solver):
    cfg = get_cfg()
    add_rethink_config(cfg)
    cfg.SOLVER.SCHEDULE = schedule
    cfg.SOLVER.IMS_PER_BATCH = 16
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = 500, 0.3333
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.mark.parametrize(
    "text, batch, max_iter, steps",
    [
        ("2x", 16, 180_000, (120_000, 160_000)),
        ("3x", 16, 270_000, (210_000, 250_000)),
        ("6x", 16, 540_000, (480_000, 520_000)),
        ("2.5x", 16, 225_000, (165_000, 205_000)),
        ("6x", 8, 1_080_000, (960_000, 1_040_000)),
        ("6x", 64, 135_000, (120_000, 130_000)),
        ("1x", 16, 90_000, (60_000, 80_000)),
        ("220k", 16, 220_000, (160_000, 200_000)),
        # 110k iterations of 16 images: shorter than 2x.
        ("220k", 8, 220_000, (146_666, 195_555)),
        ("60k", 16, 60_000, (40_000, 53_333)),
        ("18k", 16, 18_000, (12_000, 16_000)),
        ("300", 16, 300, (200, 266)),
        ("1.5k", 2, 1500, (1000, 1333)),
        ("3", 16, 3, (1, 2)),
    ],
)
def test_lengths_and_drops(text, batch, max_iter, steps):
    assert parse(text, batch) == Schedule(max_iter, steps)


@pytest.mark.parametrize(
    "text", ["", "6y", "x", "-2x", "6 x", "6X", "1e3", "2.x", ".5x", "٣x", "6x\n", "0x", "0"]
)
def test_malformed_or_not_positive(text):
    with pytest.raises(ValueError, match="(?s)SOLVER.SCHEDULE: .* is not .*; write '6x', '220k' or '300'"):
        parse(text, 16)


def test_literal_lengths_are_whole():
    with pytest.raises(ValueError, match="not a whole number of iterations"):
        parse("1.0005k", 16)
    assert parse("1.005k", 16).max_iter == 1005


@pytest.mark.parametrize("text, batch", [("1", 16), ("2", 16), ("0.00001x", 16), ("2x", 10**7)])
def test_too_short(text, batch):
    with pytest.raises(ValueError, match=f"SOLVER.SCHEDULE: '{text}' .* too short"):
        parse(text, batch)


def test_batch_must_be_positive():
    with pytest.raises(ValueError, match="IMS_PER_BATCH"):
        parse("2x", 0)


batches = st.integers(1, 256)
tenths = st.integers(20, 120)


@given(tenths, st.sampled_from([1, 2, 4, 8, 16]))
def test_tails_do_not_depend_on_the_length(n, batch):
    max_iter, steps = parse(f"{n / 10}x", batch)
    assert [(max_iter - step) * batch for step in steps] == [60_000 * 16, 20_000 * 16]


@given(tenths, batches)
def test_half_the_batch_doubles_everything(n, batch):
    text = f"{n / 10}x"
    full, half = parse(text, 2 * batch), parse(text, batch)
    for a, b in zip((full.max_iter, *full.steps), (half.max_iter, *half.steps), strict=True):
        assert b - 2 * a in (0, 1)


@given(st.integers(3, 10**7), batches)
def test_drops_are_ascending_and_inside_the_run(length, batch):
    max_iter, steps = parse(str(length), batch)
    assert max_iter == length
    assert 0 < steps[0] < steps[1] < max_iter


@given(tenths, tenths, batches, st.data())
def test_runs_of_one_curve_are_equal_up_to_the_first_drop(n, m, batch, data):
    short, long = (parse(f"{x / 10}x", batch) for x in sorted((n, m)))
    iterations = st.integers(0, short.steps[0] - 1) | st.integers(0, 600)
    for iteration in data.draw(st.lists(iterations, min_size=5)):
        rates = [multiplier(iteration, steps=s.steps, **WARMUP) for s in (short, long)]
        assert rates[0] == rates[1]


@given(st.integers(0, 1000), st.lists(st.integers(1, 2000), max_size=3, unique=True))
def test_later_drops_have_no_effect(iteration, steps):
    past = [s for s in sorted(steps) if s <= iteration]
    assert multiplier(iteration, steps=sorted(steps), **WARMUP) == multiplier(iteration, steps=past, **WARMUP)


def test_warmup_and_drops():
    steps = (1000, 2000)
    assert multiplier(0, steps=steps, **WARMUP) == 1 / 3
    assert multiplier(250, steps=steps, **WARMUP) == pytest.approx(2 / 3)
    assert multiplier(500, steps=steps, **WARMUP) == 1.0
    assert multiplier(999, steps=steps, **WARMUP) == 1.0
    assert multiplier(1000, steps=steps, **WARMUP) == 0.1
    assert multiplier(2000, steps=steps, **WARMUP) == 0.1**2
    assert multiplier(499, steps=steps, warmup_method="constant", **WARMUP) == 1 / 3
    assert multiplier(0, steps=(), gamma=0.1, warmup_iters=0, warmup_factor=0.5) == 1.0
    with pytest.raises(ValueError, match="WARMUP_METHOD"):
        multiplier(0, steps=steps, warmup_method="cubic", **WARMUP)


def detectron2_multiplier(cfg):
    """Detectron2's own scheduler as a function of the iteration."""
    scheduler = build_detectron2_lr_scheduler(cfg, optimizer(1.0))
    return lambda iteration: scheduler._multiplier(iteration / cfg.SOLVER.MAX_ITER)


@settings(max_examples=30)
@given(
    st.sampled_from(["2x", "3x", "6x", "9x", "18k", "2000"]),
    st.sampled_from(["linear", "constant"]),
    st.data(),
)
def test_agrees_with_detectron2(text, method, data):
    max_iter, steps = parse(text, 16)
    cfg = config("", MAX_ITER=max_iter, STEPS=steps, WARMUP_METHOD=method)
    theirs = detectron2_multiplier(cfg)
    edges = (*steps, 500)
    for iteration in data.draw(st.lists(st.integers(0, max_iter - 1) | st.integers(0, 510), min_size=20)):
        if any(abs(iteration - edge) <= 1 for edge in edges):
            continue
        ours = multiplier(
            iteration, steps=steps, gamma=0.1, warmup_iters=500, warmup_factor=0.3333, warmup_method=method
        )
        assert ours == pytest.approx(theirs(iteration), rel=1e-6)


@pytest.mark.parametrize("text", ["2000", "18k"])
def test_drops_fall_on_detectron2s_iterations(text):
    """Runs so short that Detectron2's epsilon of 1e-6 of the run cannot reach the next iteration."""
    max_iter, steps = parse(text, 16)
    theirs = detectron2_multiplier(config("", MAX_ITER=max_iter, STEPS=steps))
    for step in steps:
        for iteration in (step - 1, step):
            assert multiplier(iteration, steps=steps, **WARMUP) == theirs(iteration)


def test_scheduler_follows_the_multiplier_exactly():
    cfg = config("9", WARMUP_ITERS=4)
    opt = optimizer(0.02, 0.04)
    scheduler = build_lr_scheduler(cfg, opt)
    steps = parse("9", 16).steps
    for iteration in range(9):
        factor = multiplier(iteration, steps=steps, gamma=0.1, warmup_iters=4, warmup_factor=0.3333)
        assert [g["lr"] for g in opt.param_groups] == [0.02 * factor, 0.04 * factor]
        opt.step()
        scheduler.step()


def test_resume_is_exact_and_state_is_plain():
    cfg = config("30", WARMUP_ITERS=10)
    opt = optimizer(0.02, 0.04)
    scheduler = build_lr_scheduler(cfg, opt)
    for _ in range(7):
        opt.step()
        scheduler.step()
    state = scheduler.state_dict()
    assert state == {"base_lrs": [0.02, 0.04], "last_epoch": 7}
    assert type(state["last_epoch"]) is int and {type(x) for x in state["base_lrs"]} == {float}

    opt2 = optimizer(0.02, 0.04)
    scheduler2 = build_lr_scheduler(cfg, opt2)
    scheduler2.load_state_dict(state)
    for _ in range(20):
        assert [g["lr"] for g in opt2.param_groups] == [g["lr"] for g in opt.param_groups]
        assert scheduler2.get_last_lr() == scheduler.get_last_lr()
        for o, s in ((opt, scheduler), (opt2, scheduler2)):
            o.step()
            s.step()

    with pytest.raises(ValueError, match="2 parameter groups, the optimizer 1"):
        build_lr_scheduler(cfg, optimizer(0.02)).load_state_dict(state)


def test_build_uses_steps_without_a_schedule_and_works_on_stock_configs():
    cfg = get_cfg()
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (2,), 0
    opt = optimizer(1.0)
    scheduler = build_lr_scheduler(cfg, opt)
    assert isinstance(scheduler, IterationLR)
    rates = []
    for _ in range(4):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    assert rates == [1.0, 1.0, 0.1, 0.1]


def test_build_refuses_steps_out_of_order():
    with pytest.raises(ValueError, match="SOLVER.STEPS"):
        build_lr_scheduler(config("", STEPS=(5, 5)), optimizer(1.0))


def test_other_schedulers_are_detectron2s():
    cfg = config("", LR_SCHEDULER_NAME="WarmupCosineLR")
    assert isinstance(build_lr_scheduler(cfg, optimizer(1.0)), LRMultiplier)
