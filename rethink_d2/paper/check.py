"""Whether the configs are the paper's: every setting, and every relation between runs.

A line is a row of settings.csv or one of the rules below. The rules hold what is no value of one key:
relations between runs, what follows from other keys, what the built network consists of.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable

from torch import nn

from .. import recipe
from ..engine.start import CASCADE_CHANGE
from ..modeling.inspection import frozen_modules, norm_kind, norms, part_of
from ..modeling.weights import known_weights
from . import manifest, settings
from .lines import Line, Subjects, Violation, resolved
from .manifest import Run

__all__ = ["RULES", "SETTINGS", "Line", "Violation", "check", "examine", "resolved"]

GPUS = 8
ONE_X, LAST, VERY_LAST = 90_000, 60_000, 20_000
CASCADE_PHASE = 270_000
VIEWS = 18
IMAGENET = 1_281_167
ARM_KEYS = {"MODEL.WEIGHTS", "MODEL.BACKBONE.FREEZE_AT"}
# What weights are the weights of: these keys must be as in the run that made them.
NETWORK_KEYS = (
    "MODEL.BACKBONE.NAME",
    "MODEL.RESNETS.",
    "MODEL.VGG.",
    "MODEL.INIT.",
    "MODEL.PIXEL_",
    "INPUT.FORMAT",
)
# Pre-training inherits these from the detectors and has no use for them.
UNUSED_BY_CLASSIFIERS = ("MODEL.FPN.", "MODEL.ANCHOR_GENERATOR.", "MODEL.RPN.", "MODEL.ROI_", "TEST.AUG.")
FROZEN = {"backbone.bottom_up.stem", "backbone.bottom_up.res2"}
FROZEN_VGG = {"backbone.conv1_1", "backbone.conv1_2", "backbone.conv2_1", "backbone.conv2_2"}
# Norms by the one of the body. Where it is synchronized, that of heads takes part even without a RoI.
NORM_KINDS = {"GN": {"GN"}, "SyncBN": {"SyncBN", "naiveSyncBN_N"}}
NORMED = ("backbone", "backbone.bottom_up", "backbone.fpn", "roi_heads.box_head", "roi_heads.mask_head")


def _setting_line(setting):
    def find(s):
        value = s.leaves.get(setting.key)
        if not setting.allows(value):
            among = "one of " if isinstance(setting.value, list) and not isinstance(value, list) else ""
            yield f"{setting.key} is {value!r}, must be {among}{setting.value!r}"

    return Line(
        str(setting),
        setting.what,
        setting.source or "this project's choice",
        lambda run: settings.of(run).get(setting.key) is setting,
        find,
        frozenset({setting.key}),
    )


SETTINGS = [_setting_line(setting) for setting in settings.load()]
RULES = []


def rule(source, applies, covers=()):
    """Make a line of a function that yields what is wrong with a subject; its docstring is the line."""

    def register(find):
        what = " ".join(find.__doc__.split())
        RULES.append(Line(find.__name__, what, source, applies, find, frozenset(covers)))
        return find

    return register


def _detector(run):
    return run.kind in ("train", "cascade", "evaluate")


@rule("paper, section 4", _detector, covers=("SOLVER.MAX_ITER", "SOLVER.STEPS"))
def schedule(s):
    """Nx is N x 90k iterations; the rate drops for the last 60k and the last 20k of all lengths from 2x up,
    and of shorter ones for the last 3/9 and 1/9, as in 2x."""
    solver, text = s.cfg.SOLVER, s.cfg.SOLVER.SCHEDULE
    if text != s.run.schedule:
        yield f"SOLVER.SCHEDULE is {text!r}, must be {s.run.schedule!r}"
        return
    length = int(text[:-1]) * (ONE_X if text[-1] == "x" else 1000)
    steps = (length - LAST, length - VERY_LAST) if length >= 2 * ONE_X else (length * 6 // 9, length * 8 // 9)
    for key, value, wanted in (
        ("MAX_ITER", solver.MAX_ITER, length),
        ("STEPS", tuple(solver.STEPS), steps),
        ("LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, "WarmupMultiStepLR"),
    ):
        if value != wanted:
            yield f"SOLVER.{key} is {value!r}, must be {wanted!r}"


@rule(
    "paper, section 3.2; Wu and He, Group Normalization, section 4.1",
    lambda run: run.kind == "pretrain",
    covers=("SOLVER.MAX_ITER", "SOLVER.STEPS"),
)
def pretraining_length(s):
    """100 epochs of ImageNet's 1,281,167 images; the rate drops after epochs 30, 60 and 90."""
    solver = s.cfg.SOLVER
    length, *steps = (math.ceil(epochs * IMAGENET / solver.IMS_PER_BATCH) for epochs in (100, 30, 60, 90))
    if (solver.MAX_ITER, list(solver.STEPS)) != (length, steps):
        yield f"SOLVER.MAX_ITER and STEPS are {solver.MAX_ITER}, {solver.STEPS}, must be {length}, {steps}"


@rule("paper, section 4", lambda run: _detector(run) or run.kind == "pretrain")
def batch(s):
    """A batch is 8 groups, the paper's 8 GPUs, whatever it runs on."""
    solver = s.cfg.SOLVER
    if solver.IMS_PER_BATCH != GPUS * solver.IMS_PER_GROUP:
        groups = f"SOLVER.IMS_PER_GROUP {solver.IMS_PER_GROUP}"
        yield f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not {GPUS} groups of {groups}"


@rule("paper, sections 4 and 5", lambda run: run.partner is not None)
def pair(s):
    """The arms of a pair differ in weights, what is frozen and length only; in runs with a cascade also in
    when it begins."""
    other = s.of(s.run.partner)
    allowed = ARM_KEYS | recipe.SCHEDULE
    if {s.run.kind, other.run.kind} & {"cascade", "evaluate"}:
        allowed |= {"SOLVER.CASCADE_FROM"}
    for key, (mine, there) in s.differences(other).items():
        if key not in allowed:
            yield f"{key} is {mine!r}, but {there!r} in {other.run.id}"


@rule(
    "paper, section 3.1; Detectron GN model zoo page",
    lambda run: run.arm == "scratch" or run.kind == "pretrain",
)
def scratch(s):
    """What starts from random weights has no weights, nothing frozen, no frozen BN and no BN of one GPU."""
    if s.cfg.MODEL.WEIGHTS and s.run.kind != "evaluate":
        yield f"MODEL.WEIGHTS is {s.cfg.MODEL.WEIGHTS!r}, must be ''"
    for name in frozen_modules(s.model):
        yield f"{name} is frozen"
    for part, kinds in norms(s.model).items():
        for kind in ("FrozenBN", "BN"):
            if kinds[kind]:
                yield f"{part} has {kinds[kind]} layers of {kind}"


@rule(
    "Detectron modeling/ResNet.py, VGG16.py StopGradient; paper, section 4",
    lambda run: run.arm == "pretrained" and _detector(run),
)
def frozen(s):
    """With pre-training, stem and res2 (VGG-16: conv1 and conv2) get no gradient, and everything else does,
    norms included."""
    wanted = FROZEN_VGG if "vgg" in s.cfg.MODEL.BACKBONE.NAME else FROZEN
    found = set(frozen_modules(s.model))
    for name in sorted(found ^ wanted):
        yield f"{name} is {'' if name in found else 'not '}frozen"
    inside = tuple(f"{name}." for name in wanted)
    for name, module in s.model.named_modules():
        if norm_kind(module) == "FrozenBN" and not name.startswith(inside):
            yield f"{name} is FrozenBN"


@rule(
    "paper, section 4; Detectron core/config.py GROUP_NORM",
    lambda run: _detector(run) or run.kind == "pretrain",
)
def norm_layers(s):
    """Every convolution of backbone, FPN, box head and mask head is normalized, by GN of 32 groups and eps
    1e-5 or synchronized BN; the mask predictor, RPN, keypoint head and VGG-16 are not."""
    vgg = "vgg" in s.cfg.MODEL.BACKBONE.NAME
    kinds = NORM_KINDS.get(s.cfg.MODEL.RESNETS.NORM, {s.cfg.MODEL.RESNETS.NORM})
    wrong = Counter()
    for name, conv in s.model.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        norm = getattr(conv, "norm", None)
        kind = norm and norm_kind(norm)
        if vgg or part_of(name) not in NORMED or name.endswith("mask_head.predictor"):
            right = norm is None
        elif kind == "GN":
            right = "GN" in kinds and (norm.num_groups, norm.eps) == (32, 1e-5)
        else:
            # Detectron2 freezes a stage's BN as FrozenBN.
            right = (
                kind in kinds or kind == "FrozenBN" and "GN" not in kinds and not conv.weight.requires_grad
            )
        wrong[part_of(name), kind] += not right
    for (part, kind), count in wrong.items():
        if count:
            yield f"{part}: {count} convolutions with norm {kind}"


@rule("paper, sections 4 and 5.1", lambda run: run.arm == "pretrained" and run.kind in ("train", "cascade"))
def weights(s):
    """Pre-trained weights fit the network: in norm and stride if they are well known; if a run of the
    manifest makes them, in everything that its network and pixels consist of."""
    name = s.cfg.MODEL.WEIGHTS
    makers = [s.of(run.id) for run in manifest.load() if run.kind == "pretrain"]
    maker = next((m for m in makers if name == f"{m.cfg.OUTPUT_DIR}/model_final.pth"), None)
    if maker is not None:
        for key, (mine, there) in s.differences(maker).items():
            if key.startswith(NETWORK_KEYS):
                yield f"{key} is {mine!r}, but {there!r} in {maker.run.id}, which makes the weights"
        return
    known = known_weights(name) if "://" in name else None
    if known is None:
        yield f"MODEL.WEIGHTS {name!r} is neither well known nor made by a run of the manifest"
        return
    resnets = s.cfg.MODEL.RESNETS
    if resnets.NORM not in known.fits:
        yield f"MODEL.RESNETS.NORM is {resnets.NORM!r}, but {name} {known.holds}"
    if resnets.STRIDE_IN_1X1 != known.stride_in_1x1:
        yield f"MODEL.RESNETS.STRIDE_IN_1X1 is {resnets.STRIDE_IN_1X1}, but {known.stride_in_1x1} in {name}"


@rule(
    "paper, section 5.1",
    lambda run: run.kind in ("train", "cascade") and (run.arm == "pretrained" or run.partner is not None),
)
def pixels(s):
    """Both arms see the pixels that the pre-trained weights were trained on."""
    name = (s if s.run.arm == "pretrained" else s.of(s.run.partner)).cfg.MODEL.WEIGHTS
    known = known_weights(name) if "://" in name else None
    if known is None:  # see the rule for weights
        return
    model = s.cfg.MODEL
    if s.cfg.INPUT.FORMAT != known.format:
        yield f"INPUT.FORMAT is {s.cfg.INPUT.FORMAT!r}, must be {known.format!r} for {name}"
    # Detectron and Detectron2 round the same means differently.
    for key, slack in (("MEAN", 2.0), ("STD", 0.0)):
        value, wanted = model[f"PIXEL_{key}"], getattr(known, key.lower())
        if any(abs(a - b) > slack for a, b in zip(value, wanted, strict=True)):
            yield f"MODEL.PIXEL_{key} is {value}, must be {list(wanted)} for {name}"


@rule("paper, section 4", lambda run: run.kind == "train" and run.trunk is not None)
def trunk(s):
    """A shorter schedule of a curve shares everything with the longest up to its own first drop."""
    longest = s.of(s.run.trunk)
    for key, (mine, there) in s.differences(longest).items():
        if key not in recipe.SCHEDULE:
            yield f"{key} is {mine!r}, but {there!r} in {longest.run.id}"
    shared = recipe.shared_iterations(longest.settings, s.settings)
    if not s.run.branch_iteration <= s.cfg.SOLVER.STEPS[0] == shared:
        first = f"branches at {s.run.branch_iteration} and first drops at {s.cfg.SOLVER.STEPS[0]}"
        yield f"{first}, but shares {shared} iterations with {longest.run.id}"


@rule("paper, section 5.1", lambda run: run.kind == "cascade")
def cascade(s):
    """From random weights, the cascade is in the final 270k iterations only: it starts from an undecayed
    state of the run without cascade, and differs from that in the cascade only."""
    without = s.of(s.run.trunk)
    for key, (mine, there) in s.differences(without).items():
        if not any(key == d or d.endswith(".") and key.startswith(d) for d in CASCADE_CHANGE):
            yield f"{key} is {mine!r}, but {there!r} in {without.run.id}"
    start = s.run.branch_iteration
    if s.cfg.SOLVER.CASCADE_FROM != f"{start // ONE_X}x" or start % ONE_X:
        yield f"SOLVER.CASCADE_FROM is {s.cfg.SOLVER.CASCADE_FROM!r}, must be {start} iterations"
    if s.cfg.SOLVER.MAX_ITER - start != CASCADE_PHASE:
        yield f"{s.cfg.SOLVER.MAX_ITER - start} iterations with cascade, must be {CASCADE_PHASE}"
    if start > without.cfg.SOLVER.STEPS[0]:
        yield f"begins at {start}, after the first drop of {without.run.id}"


@rule(
    "paper, section 5.1; Detectron configs/test_time_aug",
    lambda run: run.kind == "evaluate",
    covers=("MODEL.WEIGHTS",),
)
def evaluation(s):
    """An evaluation is of its trunk's final weights, with 18 views, and differs in nothing else."""
    trained = s.of(s.run.trunk)
    for key, (mine, there) in s.differences(trained).items():
        if key != "MODEL.WEIGHTS" and not key.startswith("TEST.AUG."):
            yield f"{key} is {mine!r}, but {there!r} in {trained.run.id}"
    wanted = f"{trained.cfg.OUTPUT_DIR}/model_final.pth"
    if s.cfg.MODEL.WEIGHTS != wanted:
        yield f"MODEL.WEIGHTS is {s.cfg.MODEL.WEIGHTS!r}, must be {wanted!r}"
    aug = s.cfg.TEST.AUG
    views = len({s.cfg.INPUT.MIN_SIZE_TEST, *aug.MIN_SIZES}) * (1 + aug.FLIP)
    if views != VIEWS or s.cfg.INPUT.MIN_SIZE_TEST in aug.MIN_SIZES:
        yield f"TEST.AUG.MIN_SIZES {aug.MIN_SIZES} and the normal view make {views} views, must be {VIEWS}"


@rule("paper, section 5.2", lambda run: run.kind == "search")
def search(s):
    """A search starts from the config of a run of its data and arm, which is checked as that run's."""
    origin = manifest.for_config(s.run.config)
    wanted = (s.run.family.removeprefix("search-"), s.run.arm)
    if (origin.family, origin.arm) != wanted:
        yield f"starts from {origin.id}, which is not of {'-'.join(wanted)}"


@rule("this project", lambda run: run.kind != "search")
def traced(s):
    """A key that is not at Detectron2's default has a line here, or cannot change the result."""
    covered = set().union(*(line.covers for line in (*SETTINGS, *RULES) if line.applies(s.run)))
    unused = UNUSED_BY_CLASSIFIERS if s.run.kind == "pretrain" else ()
    for key, default in _defaults().items():
        value = s.leaves[key]
        if value != default and not (key in covered or key in recipe.FREE or key.startswith(unused)):
            yield f"{key} is {value!r}, Detectron2's default is {default!r}, and no line says why"


@functools.cache
def _defaults():
    return json.loads(json.dumps(recipe.flatten(recipe.default_config())))


def examine(
    runs: Iterable[Run] | None = None, load: Callable = resolved, lines: Iterable[Line] | None = None
) -> list[tuple[Line, list[Run], list[Violation]]]:
    """Hold every line against every run that it is about.

    Args:
        runs: None for all of the manifest that have a config.
        load: gives the resolved config of a run, also of those that `runs` are compared with.
        lines: None for all.

    Returns:
        for each line the runs that it is about, and what breaks it.

    Raises:
        ValueError: a config cannot be read; names the file.
    """
    runs = [run for run in manifest.load() if run.config] if runs is None else list(runs)
    subjects = Subjects(load)
    results = []
    for line in (*SETTINGS, *RULES) if lines is None else lines:
        about = [run for run in runs if line.applies(run)]
        found = [
            Violation(line.name, run.id, message, line.source)
            for run in about
            for message in _find(line, subjects.of(run))
        ]
        results.append((line, about, found))
    return results


def _find(line, subject):
    try:
        return list(line.find(subject))
    except Exception as e:  # e.g. a network that cannot be built
        return [f"could not be checked: {type(e).__name__}: {e}"]


def check(
    runs: Iterable[Run] | None = None, load: Callable = resolved, lines: Iterable[Line] | None = None
) -> list[Violation]:
    """What in the configs is not the paper's; arguments and errors as :func:`examine`."""
    return [violation for _, _, found in examine(runs, load, lines) for violation in found]
