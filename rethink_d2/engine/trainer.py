"""The training loop: Detectron2's, with micro-steps and exact resume."""

import contextlib
import json
import logging
import math
import os
import time
from collections import Counter
from functools import partial

import torch
from detectron2.engine import SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch.nn.parallel import DistributedDataParallel

from .. import recipe
from ..data.loader import build_train_loader, training_records
from ..data.order import mix
from ..evaluation import evaluate
from ..files import read_json
from ..modeling.cascade_start import start_cascade
from ..modeling.initialization import initialize
from ..modeling.safe_weights import SafeCheckpointer
from ..preemption import Preempted, Preemption, agreeing
from ..solver import build_lr_scheduler
from . import checkpoint
from .acceleration import accelerate, set_sgd_implementation
from .divergence import Diverged, gradient_norm, report
from .history import MetricsWriter, cut_back, restore_scalars, save_scalars
from .hooks import Checkpoints, PreciseBN, ProgressPrinter
from .optimizer_state import load_optimizer_state, optimizer_state
from .record import append_result
from .start import Start
from .writers import build_writers, close_early

logger = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def build_initialized_model(cfg):
    """The model of `cfg` with its MODEL.INIT.POLICY applied; the same on every process."""
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    initialize(model, cfg.MODEL.INIT.POLICY)
    return model


def evaluate_all(cfg, model, iteration, *, known=(), preemption=None):
    """Evaluate on every data set of DATASETS.TEST and add the metrics to results.json.

    Args:
        cfg (CfgNode): a resolved config; its OUTPUT_DIR holds results.json.
        model (nn.Module): the model. Every process must call this.
        iteration (int): number of iterations it has trained; 0 for weights of unknown training.
        known (iterable[dict]): rows of results.json; what one of them says of this iteration is not
            evaluated again.
        preemption (Preemption or None): ends the evaluation early.

    Returns:
        dict[str, float]: flat metrics, with the data set before the name if there are several.

    Raises:
        Preempted: on every process, when one of them was asked to stop.
    """
    everything = {}
    done = {row["dataset"]: row for row in known if row["iteration"] == iteration}
    for name in cfg.DATASETS.TEST:
        if name in done:
            metrics = {k: v for k, v in done[name].items() if k not in ("iteration", "dataset")}
            metrics = {k: math.nan if v is None else v for k, v in metrics.items()}
        else:
            around = partial(agreeing, preemption=preemption) if preemption else None
            metrics = evaluate(cfg, model, name, around)
            if comm.is_main_process():
                append_result(cfg.OUTPUT_DIR, iteration, name, metrics)
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        everything.update({prefix + k: v for k, v in metrics.items()})
    return everything


class Trainer(TrainerBase):
    """Trains what a resolved config describes.

    One iteration is ``SOLVER.IMS_PER_BATCH`` images in groups of ``SOLVER.IMS_PER_GROUP``; each
    process runs its share of the groups and the gradients are averaged. Which images, how they are augmented
    and which regions are sampled depends on (seed, iteration, group) alone, so a run that was stopped
    anywhere and resumed ends with the same weights, bit for bit on one machine and thread count.

    Args:
        cfg (CfgNode): resolved by :func:`rethink_d2.recipe.resolve` for this number of processes.
        start (Start): where to start, from :func:`rethink_d2.engine.start.find_start`.
        preemption (Preemption or None): what asks it to stop.

    Raises:
        ValueError: nothing to train on.
    """

    def __init__(self, cfg, start=None, preemption=None):
        super().__init__()
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.preempted = False
        self._preemption = preemption or Preemption()
        self._start = start or Start()
        processes = comm.get_world_size()
        self.groups = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.IMS_PER_GROUP * processes)
        self.images_seen = Counter()
        self.skipped = 0  # updates left out because they were not finite
        self.records = training_records(cfg)
        self._pixels = {
            "format": cfg.INPUT.FORMAT,
            "mean": [float(v) for v in cfg.MODEL.PIXEL_MEAN],
            "std": [float(v) for v in cfg.MODEL.PIXEL_STD],
        }
        self._settings = json.dumps(recipe.settings(cfg), sort_keys=True)

        model = accelerate(build_initialized_model(cfg), cfg.SOLVER.ACCELERATE)
        self.optimizer, self._clip = self._build_optimizer(model)
        set_sgd_implementation(self.optimizer, cfg.SOLVER.ACCELERATE.SGD)
        cpu = cfg.MODEL.DEVICE == "cpu"
        self.model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=None if cpu else [comm.get_local_rank()]
        )
        self._bare = model
        self.model.train()
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        self._device = torch.device(cfg.MODEL.DEVICE).type
        self._dtype = DTYPES[cfg.SOLVER.AMP.DTYPE or ("bfloat16" if cpu else "float16")]
        # bfloat16 has float32's range and needs no scaling of the loss.
        self.scaler = torch.amp.GradScaler(
            self._device, enabled=cfg.SOLVER.AMP.ENABLED and self._dtype == torch.float16
        )
        self._scalars = {}
        self._batches = None
        self._load()
        self._results_before = ()
        self._store, self._writers = None, []
        if comm.is_main_process():
            source = os.path.dirname(self._start.path) if self._start.parent else None
            cut_back(cfg.OUTPUT_DIR, self._start.iteration, source)
            self._results_before = read_json(os.path.join(cfg.OUTPUT_DIR, "results.json"))
            self._store = checkpoint.CheckpointStore(
                cfg.OUTPUT_DIR,
                keep=cfg.SOLVER.CHECKPOINT_KEEP,
                keep_always=[done - 1 for done in cfg.SOLVER.BRANCH_POINTS],
                required=cfg.SOLVER.CHECKPOINT_REQUIRED,
                background=cfg.SOLVER.CHECKPOINT_BACKGROUND,
            )
        self._results_before = comm.all_gather(self._results_before)[0]
        self.register_hooks(self._build_hooks())

    def _build_optimizer(self, model):
        """Detectron2's optimizer, and what clips all gradients together where it cannot.

        SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" is for the norm over the whole model; Detectron2's "norm"
        is for every parameter alone.
        """
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return build_optimizer(self.cfg, model), None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
        return build_optimizer(cfg, model), partial(
            torch.nn.utils.clip_grad_norm_, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE
        )

    def _load(self):
        start = self._start
        self.iter, self.start_iter = start.iteration, start.iteration + 1
        if start.path is None:
            SafeCheckpointer(self.model).load(self.cfg.MODEL.WEIGHTS)
            return
        logger.info("%s: going on from %s, iteration %d", start.kind, start.path, self.start_iter)
        saved = checkpoint.read(start.path)
        model, optimizer = saved["model"], saved["optimizer"]
        if start.kind == "cascade":
            begun = start_cascade(model, optimizer, self._bare)
            logger.info(
                "New in the cascade: %s. Dropped: %s", ", ".join(begun.fresh), ", ".join(begun.dropped)
            )
            model, optimizer = begun.model_state, begun.momentum
        self._bare.load_state_dict(model)
        load_optimizer_state(self.optimizer, self._bare, optimizer)
        # Base rates are the config's: they differ only where that was allowed.
        self.scheduler.load_state_dict({**saved["scheduler"], "base_lrs": self.scheduler.base_lrs})
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate
        if saved["scaler"]:  # empty if that run did not scale its loss
            self.scaler.load_state_dict(saved["scaler"])
        self.skipped, self._scalars = saved["skipped"], saved["scalars"]
        self.images_seen.update(saved["images_seen"])

    @property
    def checkpoint_failed(self):
        """Whether the last checkpoint could not be written; known to the main process alone."""
        return self._store is not None and self._store.failed

    def save_checkpoint(self):
        """Write the state after the last finished iteration."""
        if self._store is None:
            return
        last = min(self.iter, self.max_iter - 1)
        state = {
            "model": dict(self._bare.state_dict()),
            "optimizer": optimizer_state(self.optimizer, self._bare),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scalars": save_scalars(self.storage),
            "skipped": self.skipped,
            "images_seen": dict(self.images_seen),
            "iteration": last,
            "settings": self._settings,
            "pixels": self._pixels,  # modeling/weights.py tells from this what the weights fit
        }
        self._store.save(last, state, ["model_final"] if last == self.max_iter - 1 else [])

    def train(self):
        """Run the iterations that are left.

        Raises:
            Preempted: the run was asked to stop; a checkpoint of its last iteration is written.
            Diverged: an update was not finite, see :mod:`rethink_d2.engine.divergence`.
        """
        logger.info("Starting training from iteration %d", self.start_iter)
        with EventStorage(self.start_iter) as self.storage:
            restore_scalars(self.storage, self._scalars)
            try:
                self.before_train()
                self._finish_iteration()
                self._batches = iter(build_train_loader(self.cfg, self.records, self.start_iter))
                for self.iter in range(self.start_iter, self.max_iter):  # noqa: B020  as Detectron2
                    self.before_step()
                    self.run_step()
                    self.after_step()
                self.iter = self.max_iter
                self.after_train()
            except Preempted:
                if self._store and not self._store.holds(min(self.iter, self.max_iter - 1)):
                    self.save_checkpoint()
                close_early(self._writers, "preempted")
                raise
            except BaseException:
                close_early(self._writers, "failed")
                raise
            finally:
                self._batches = None  # ends the loader's workers
                if self._store:
                    self._store.wait()
        if self.images_seen["greyscale"]:
            logger.info("Of %(images)d images read, %(greyscale)d were greyscale", self.images_seen)

    def _finish_iteration(self):
        """Do what comes after the checkpoint in the iteration that it was written in."""
        if self._start.path is None:
            return
        self.storage.iter = self.iter
        if self._store and self.iter == self.max_iter - 1:
            # A kill may have come before the last name, and a branch have nothing left to train.
            if self._store.holds(self.iter):
                self._store.also(self.iter, "model_final")
            else:
                self.save_checkpoint()
        kinds = [type(h) for h in self._hooks]
        for hook in self._hooks[kinds.index(Checkpoints) + 1 :]:
            hook.after_step()

    def run_step(self):
        self.optimizer.zero_grad()
        losses, waited, batch = Counter(), 0.0, []
        rank, processes = comm.get_rank(), comm.get_world_size()
        for step in range(self.groups):
            start = time.perf_counter()
            samples = next(self._batches)
            waited += time.perf_counter() - start
            batch += samples
            # RoIs and anchors are sampled with torch's generator.
            torch.manual_seed(int(mix(self.cfg.SEED, self.iter, step * processes + rank)) >> 1)
            with self._synchronize_on(step == self.groups - 1):
                with torch.autocast(self._device, self._dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
                    loss_dict = self.model(samples)
                self.scaler.scale(sum(loss_dict.values()) / self.groups).backward()
            for name, loss in loss_dict.items():
                losses[name] += loss.detach() / self.groups
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        norm = float(gradient_norm(self._bare))
        if self._usable(losses, norm, batch):
            SimpleTrainer.write_metrics(losses, waited, self.iter)
            if math.isfinite(norm):
                self.storage.put_scalar("gradient_norm", norm)
            if self._clip:
                self._clip(self._bare.parameters())
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def _usable(self, losses, norm, batch):
        """Whether the update is finite; also asks all processes whether to stop after it."""
        # An overflow in float16 is the scaler's to handle: it leaves the update out and scales less. What is
        # not finite at a scale of 1 is no overflow.
        finite = math.isfinite(sum(losses.values())) and (math.isfinite(norm) or self.scaler.get_scale() > 1)
        said = comm.all_gather((finite, self._preemption.requested, self._counts(batch)))
        self.preempted = any(stop for _, stop, _ in said)
        for _, _, counts in said:
            self.images_seen.update(counts)
        if self.images_seen["bad"]:
            self.storage.put_scalar("bad_images", self.images_seen["bad"], smoothing_hint=False)
        if all(ok for ok, _, _ in said):
            return True
        rate = self.optimizer.param_groups[0]["lr"]
        values = {name: float(loss) for name, loss in losses.items()}
        if self._store:
            self._store.wait()
        message = report(
            self.cfg, self.iter, losses=values, norm=norm, rate=rate, samples=batch, skipped=self.skipped
        )
        if self.skipped >= self.cfg.SOLVER.SKIP_NONFINITE:
            raise Diverged(message)
        self.skipped += 1
        logger.warning("Update left out (%d so far): %s", self.skipped, message)
        return False

    @staticmethod
    def _counts(batch):
        """What this process has read; names the files that it could not read."""
        bad = [name for sample in batch for name in sample["bad_images"]]
        for name in bad:
            logger.warning("%s cannot be read; another image is in its place", name)
        return {
            "images": len(batch),
            "greyscale": sum(bool(sample.get("greyscale")) for sample in batch),
            "bad": len(bad),
        }

    def _synchronize_on(self, last):
        """Average gradients over the processes once an iteration, in its last group."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def evaluate(self):
        """Evaluate as :func:`evaluate_all` does, under the number of iterations done."""
        # After the last iteration, iter is max_iter already.
        done = min(self.iter + 1, self.max_iter)
        metrics = evaluate_all(
            self.cfg, self.model, done, known=self._results_before, preemption=self._preemption
        )
        self._results_before = ()
        best = self.cfg.SOLVER.CHECKPOINT_BEST
        if best and self._store and self._is_best(best, done):
            if not self._store.holds(done - 1):
                self.save_checkpoint()
            self._store.also(done - 1, "model_best")
        return metrics

    def _is_best(self, metric, done):
        rows = read_json(os.path.join(self.cfg.OUTPUT_DIR, "results.json"), [])
        name = self.cfg.DATASETS.TEST[0]
        if metric.startswith(tuple(f"{n}/" for n in self.cfg.DATASETS.TEST)):
            name, _, metric = metric.partition("/")
        values = {r["iteration"]: r.get(metric) for r in rows if r["dataset"] == name}
        now = values.get(done)
        return now is not None and all(v is None or v < now for i, v in values.items() if i < done)

    def _build_hooks(self):
        cfg = self.cfg
        built = [hooks.IterationTimer(), hooks.LRScheduler(self.optimizer, self.scheduler)]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            single = cfg.clone()
            single.defrost()
            single.DATALOADER.NUM_WORKERS = 0

            def loader_from(iteration):
                return build_train_loader(single, self.records, iteration)

            period, length = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
            built.append(PreciseBN(period, self.model, loader_from, length))
        # Before the evaluation, so that a failing one loses no training.
        built.append(Checkpoints(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.BRANCH_POINTS))
        built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            self._writers = [
                ProgressPrinter(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, len(self.records)),
                MetricsWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json")),
                *build_writers(cfg, self.start_iter, self._start.parent),
            ]
            built.append(hooks.PeriodicWriter(self._writers, period=20))
        return built
