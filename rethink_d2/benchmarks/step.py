"""A training step (forward, backward, optimizer) against Detectron2's, and torchvision's Mask R-CNN.

Ours is this project's backbone builder and trainer, as configured and with SOLVER.ACCELERATE's keys for a
CPU. Detectron2's model has the same weights, its trainer the same batch, and the losses and updated weights
must be the same before a time is taken. Then the rate is 0, so that every repeat is the same step.
"""

import itertools
import re
import statistics
import tempfile
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.poolers import ROIPooler
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, profile, record_function

from ..data.order import mix
from ..engine import Trainer
from ..engine.acceleration import PADDED_TO
from ..engine.trainer import build_initialized_model
from . import _models
from .common import Result, compare, peak_memory, use_threads

FAST = {"SOLVER__ACCELERATE__ROI_ALIGN": True, "SOLVER__ACCELERATE__SGD": "fused"}
VARIANTS = {"as configured": {}, "ROI_ALIGN, SGD fused": FAST}
COMPILED = {"COMPILE": {"SOLVER__ACCELERATE__COMPILE": True}}
# Of two sides, relative to their size; sums are added in another order.
LOSSES_DIFFER, WEIGHTS_DIFFER = 1e-4, 1e-3

# The first pattern that a part of an operation's path fits; the path is searched from the inside.
KINDS = {
    "optimizer": r"^Optimizer\.",
    "RoIAlign": r"RoIAlign$|roi_align|embedding_?bag",
    "convolutions, matrix products": r"conv|::(add)?mm$|::b(add)?mm$|(Add)?mmBackward",
    "normalization": r"(group|batch)_?norm",
    "NMS, top-k, indexing": r"nms$|topk|sort|index|nonzero|gather|scatter|masked_select|unique|randperm",
    "pooling, resampling": r"max_?pool|upsample",
    "elementwise, copies": r"^(aten|autograd|torch::autograd)::",
}
OUTER = ("optimizer", "RoIAlign")  # whatever is inside belongs to them
OTHER = "other, Python"


def add_arguments(parser):
    """The benchmark's own arguments."""
    parser.add_argument("--dataset", default="coco_2017_train", help="whose images are trained on")
    parser.add_argument("--models", nargs="+", default=list(_models.MODELS), choices=_models.MODELS)
    parser.add_argument("--shape", type=int, nargs=2, default=(320, 480), help="height and width of images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also shares of a step by kind of operation")
    compiled = f"also SOLVER.ACCELERATE.COMPILE; pads no --shape of multiples of {PADDED_TO}, such as 384 512"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")


def run(args):
    """Compare losses and weights, then time steps in turn.

    Returns:
        list[Result]: seconds per step, MB of peak memory, and percent of a step.

    Raises:
        RuntimeError: losses or weights that differ.
    """
    with use_threads(args.threads):
        return [result for model in args.models for result in _run(model, args)]


def _run(model, args):
    variants = VARIANTS | (COMPILED if args.compile else {})
    with tempfile.TemporaryDirectory() as folder:
        stock = Step("stock", model, args.dataset, args.shape, folder)
        ours = {what: Step(what, model, args.dataset, args.shape, folder) for what in variants}
        before = {name: value.clone() for name, value in stock.model.state_dict().items()}
        for step in (stock, *ours.values()):
            step()
        for what, step in ours.items():
            assert_same_update(before, stock, step, f"{model}, {what}")
        sides = {"Detectron2": stock, **ours}
        if model != "mini":  # torchvision has no narrow ResNet-18
            sides["torchvision"] = TorchvisionStep(model, args.dataset, args.shape, folder)
        for step in sides.values():
            step.freeze()
        regions = {what: step.regions() for what, step in sides.items()}
        times = dict(zip(sides, compare(*sides.values(), repeats=args.repeats), strict=True))
        shares = {what: [] for what in sides}
        for _ in range(args.repeats if args.profile else 0):
            for what, step in sides.items():
                shares[what].append(step.profile())
    name = f"{model} step"
    note = "losses and weights equal; {} regions, {} with masks".format(*regions["Detectron2"])
    results = [
        Result(f"{name}, {what}", "Detectron2", times[what], times["Detectron2"], note=note) for what in ours
    ]
    if "torchvision" in times:
        note = "other weights, so other losses; {} regions, {} with masks".format(*regions["torchvision"])
        results += [
            Result(f"{name}, {what}", "torchvision", times[what], times["torchvision"], note=note)
            for what in ours
        ]
    if not args.no_memory:
        peaks = {what: [_peak(what, model, args)] for what in ("stock", *ours)}
        results += [
            Result(f"{name}, {what}: peak memory", "Detectron2", peaks[what], peaks["stock"], "MB")
            for what in ours
        ]
    for what in ours if args.profile else ():
        for kind in (*KINDS, OTHER):
            both = shares[what], shares["Detectron2"]
            percent = ([100 * taken[kind] / taken.total() for taken in side] for side in both)
            ms = [statistics.median(1000 * taken[kind] for taken in side) for side in both]
            note = "{:.1f} against {:.1f} ms".format(*ms)
            results.append(Result(f"{name}, {what}: {kind}", "Detectron2", *percent, "%", note))
    return results


def _peak(what, model, args):
    return peak_memory(_steps, what, model, args.dataset, tuple(args.shape), args.threads)


def _steps(what, model, dataset, shape, threads):
    with use_threads(threads), tempfile.TemporaryDirectory() as folder:
        step = Step(what, model, dataset, shape, folder)
        for _ in range(3):
            step()


class Step:
    """A training step that can be repeated on one batch.

    Args:
        what (str): "stock" for Detectron2's, else one of :data:`VARIANTS` or :data:`COMPILED`.
        model (str): one of :data:`_models.MODELS`.
        dataset (str), shape (tuple[int, int]): where the batch comes from, and the size of its images.
        folder (str): for what a trainer writes.

    Attributes:
        model (nn.Module): the model.
        optimizer (Optimizer): its optimizer.
    """

    def __init__(self, what, model, dataset, shape, folder):
        cfg = _models.config(model, dataset, shape, folder, **(VARIANTS | COMPILED).get(what, {}))
        np.random.seed(0)
        batch = _models.samples(cfg, shape, cfg.SOLVER.IMS_PER_BATCH)
        if what == "stock":
            model = build_initialized_model(_models.stock_config(cfg)).train()
            batches = itertools.repeat(_models.stock_samples(batch))
            trainer = SimpleTrainer(model, batches, build_optimizer(cfg, model))
        else:
            trainer = Trainer(cfg)
            trainer._batches = itertools.repeat(batch)
        trainer.iter = 0
        self.model, self.optimizer, self._trainer = trainer.model, trainer.optimizer, trainer
        self._seed = int(mix(cfg.SEED, 0, 0)) >> 1  # of our trainer in its first iteration
        trainer.storage = EventStorage(0)
        self._rate(cfg.SOLVER.BASE_LR)  # not of the warm-up: an update above rounding

    def __call__(self):
        torch.manual_seed(self._seed)
        with self._trainer.storage:
            self._trainer.run_step()

    def _rate(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def freeze(self):
        """Let further steps change nothing."""
        self._rate(0.0)

    def losses(self):
        """Of the last step, by name (dict[str, float])."""
        return {k: value for k, (value, _) in self._trainer.storage.latest().items() if "loss" in k}

    def regions(self):
        """Run a step and count the regions that the box head and the mask head get (list[int])."""
        heads = self.model.roi_heads
        seen = []
        hooks = [
            head.register_forward_pre_hook(lambda head, inputs: seen.append(len(inputs[0])))
            for head in (heads.box_head, heads.mask_head)
        ]
        self()
        for hook in hooks:
            hook.remove()
        return seen

    def profile(self):
        """Seconds of a step by kind of operation (Counter)."""
        with _labelled(self.model), profile(activities=[ProfilerActivity.CPU]) as profiled:
            start = time.perf_counter()
            self()
            seconds = time.perf_counter() - start
        return by_kind(profiled.events(), seconds)


class TorchvisionStep(Step):
    """The same of torchvision's Mask R-CNN, with random weights of its own."""

    def __init__(self, model, dataset, shape, folder):
        cfg = _models.config(model, dataset, shape, folder)
        self._inputs = _models.torchvision_samples(_models.samples(cfg, shape, cfg.SOLVER.IMS_PER_BATCH))
        torch.manual_seed(0)
        self.model = _models.torchvision_model(cfg)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, 0, cfg.SOLVER.WEIGHT_DECAY
        )

    def __call__(self):
        self.optimizer.zero_grad()
        sum(self.model(*self._inputs).values()).backward()
        self.optimizer.step()


@torch.no_grad()
def assert_same_update(before, stock, ours, what):
    """Compare losses and weights after each has done a step.

    Args:
        before (dict[str, Tensor]): the weights that both started from.
        stock, ours (Step): the two.
        what (str): for the message.

    Raises:
        RuntimeError: they differ.
    """
    expected = stock.losses()
    for name, loss in ours.losses().items():
        if abs(loss - expected[name]) > LOSSES_DIFFER * (1 + abs(expected[name])):
            raise RuntimeError(f"{what}: {name} is {loss}, but {expected[name]} with Detectron2")
    # Of all together: a single bias may be a sum of large terms that nearly cancel.
    off = moved = 0.0
    for (name, q), p in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        off += float((p - q).double().square().sum())
        moved += float((q - before[name]).double().square().sum())
    if off > WEIGHTS_DIFFER**2 * moved:
        raise RuntimeError(f"{what}: weights are updated to other values than with Detectron2")


@contextmanager
def _labelled(model):
    """Have the profiler see which operations are a pooler's."""
    scopes = []

    def enter(module, inputs):
        scopes.append(record_function("RoIAlign"))
        scopes[-1].__enter__()

    hooks = []
    for module in model.modules():
        if isinstance(module, ROIPooler):
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(lambda *_: scopes.pop().__exit__(None, None, None)))
    yield
    for hook in hooks:
        hook.remove()


def by_kind(events, seconds):
    """Divide the time of a step among kinds of operations.

    Args:
        events (Iterable[FunctionEvent]): of torch's profiler.
        seconds (float): the whole step's; what no operation took is Python's.

    Returns:
        Counter: seconds by kind.
    """
    taken = Counter()
    for event in events:
        path = []
        parent = event
        while parent is not None:
            path.append(parent.name)
            parent = parent.cpu_parent
        taken[_kind(path)] += event.self_cpu_time_total / 1e6
    taken[OTHER] += seconds - taken.total()
    return taken


def _kind(path):
    """The kind of an operation, given its name and those of what called it."""
    for kind in OUTER:
        if any(re.search(KINDS[kind], name) for name in path):
            return kind
    found = (
        kind for name in path for kind, pattern in list(KINDS.items())[:-1] if re.search(pattern, name, re.I)
    )
    last = "elementwise, copies"
    return next(found, last if any(re.search(KINDS[last], name) for name in path) else OTHER)
