"""What the trainer adds to an iteration, against Detectron2's DefaultTrainer.

Three things, each with the same model, images, mapper and optimizer on both sides:

- iterations of training, data included, as the loops of both trainers run them;
- the same without the network: a model with all its parameters, whose loss only gives each of them a
  gradient. What is left is data, seeds, hooks, logs, gradient norm and optimizer, without the noise;
- a checkpoint, for as long as training waits.

The last row sets what is added, with a checkpoint's part by SOLVER.CHECKPOINT_PERIOD, against the first.
"""

import statistics
import tempfile
import time
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import EventStorage
from torch import nn

from .. import model_zoo, recipe
from ..data.loader import build_train_loader
from ..data.mapper import build_mapper
from ..engine import Trainer
from . import _models
from .common import Result, compare, use_threads

NAME = "rethink_benchmark_overhead"
# Images of a batch, as their configs have it (the paper's: on one GPU), and their shape.
BATCHES = {"mini": (8, (128, 192)), "R50": (2, (320, 480))}
NEVER = 10**9
BARE_ITERATIONS = 20  # the period of the logs


def add_arguments(parser):
    """The benchmark's own arguments."""
    parser.add_argument("--dataset", default="coco_2017_train", help="whose images are trained on")
    parser.add_argument("--models", nargs="+", default=list(_models.MODELS), choices=_models.MODELS)
    parser.add_argument("--iterations", type=int, default=4, help="with the network, per repeat")
    parser.add_argument("--threads", type=int, default=2)


def run(args):
    """Time iterations and checkpoints in turn.

    Returns:
        list[Result]: seconds or milliseconds, and percent of Detectron2's iteration.
    """
    with use_threads(args.threads):
        return [result for model in args.models for result in _run(model, args)]


def _run(model, args):
    batch, shape = BATCHES[model]
    found = _models.records_of_shape(args.dataset, shape, batch)
    # As many images as a batch has, so that every iteration is of the same ones.
    DatasetCatalog.register(NAME, lambda: found)
    MetadataCatalog.get(NAME).set(thing_classes=MetadataCatalog.get(args.dataset).thing_classes)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _compare(model, args, batch, shape, Path(folder))
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def _compare(model, args, batch, shape, folder):
    def pair(kind, **options):
        sizes = {"SOLVER__IMS_PER_BATCH": batch, "SOLVER__IMS_PER_GROUP": batch}
        never = {"SOLVER__CHECKPOINT_PERIOD": NEVER, "MODEL__WEIGHTS": ""}
        cfg = [
            _models.config(model, NAME, shape, folder / f"{kind}{i}", **sizes, **never, **options)
            for i in range(2)
        ]
        return Loop(Trainer(cfg[0])), Loop(StockTrainer(_models.stock_config(cfg[1])))

    sides = pair("full")
    full = compare(*_blocks(sides, args.iterations), repeats=args.repeats)
    full = [[seconds / args.iterations for seconds in times] for times in full]
    saving = [[1000 * side.save() for _ in range(args.repeats)] for side in sides]
    bare = pair("bare", MODEL__META_ARCHITECTURE="ParametersAlone", MODEL__INIT__POLICY="")
    bare = compare(*_blocks(bare, BARE_ITERATIONS), repeats=args.repeats)
    bare = [[1000 * seconds / BARE_ITERATIONS for seconds in times] for times in bare]

    period = recipe.load(model_zoo.get_config_file(_models.MODELS[model]), []).SOLVER.CHECKPOINT_PERIOD
    added = statistics.median(bare[0]) - statistics.median(bare[1])
    added += (statistics.median(saving[0]) - statistics.median(saving[1])) / period
    part = 0.1 * added / statistics.median(full[1])
    size = f"{batch} images of {shape[0]}x{shape[1]}"
    return [
        Result(f"{model}: iteration", "Detectron2", *full, note=size),
        Result(f"{model}: iteration without the network", "Detectron2", *bare, "ms", size),
        Result(f"{model}: checkpoint", "Detectron2", *saving, "ms", f"every {period} iterations"),
        Result(f"{model}: added in all", "Detectron2", [100 + part], [100], "%", f"{added:+.1f} ms"),
    ]


def _blocks(sides, iterations):
    def block(side):
        for _ in range(iterations):
            side()

    return [lambda side=side: block(side) for side in sides]


class StockTrainer(DefaultTrainer):
    """Detectron2's trainer with the mapper of INPUT.MAPPER."""

    @classmethod
    def build_train_loader(cls, cfg):
        """As there."""
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg, True))


class Loop:
    """Iterations of a trainer's loop, one at a time.

    Args:
        trainer (TrainerBase): this project's or Detectron2's, before it has begun.
    """

    def __init__(self, trainer):
        self._trainer, self._done = trainer, 0
        trainer.storage = EventStorage(0)
        with trainer.storage:
            trainer.before_train()
        if isinstance(trainer, Trainer):
            trainer._batches = iter(build_train_loader(trainer.cfg, trainer.records))

    def __call__(self):
        """Run an iteration as ``TrainerBase.train`` does."""
        trainer = self._trainer
        with trainer.storage:
            trainer.iter = self._done
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        self._done += 1

    def save(self):
        """Write a checkpoint; return the seconds that training waits for."""
        start = time.perf_counter()
        if not isinstance(self._trainer, Trainer):
            self._trainer.checkpointer.save("model", iteration=self._done)
            return time.perf_counter() - start
        self._trainer.save_checkpoint()
        seconds = time.perf_counter() - start
        self._trainer._store.wait()  # in a run it has long been written when the next one is due
        return seconds


@META_ARCH_REGISTRY.register()
class ParametersAlone(nn.Module):
    """The parameters of a GeneralizedRCNN, each with a gradient, and no network.

    Args:
        cfg (CfgNode): of that model.
    """

    def __init__(self, cfg):
        super().__init__()
        self.model = GeneralizedRCNN(cfg)

    def forward(self, samples):
        """A loss that trains towards nothing."""
        return {"loss": sum(0 * p.sum() for p in self.model.parameters() if p.requires_grad)}
