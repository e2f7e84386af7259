"""The training loop: Detectron2's, with micro-steps."""

import contextlib
import logging
import os
import time
import weakref
from collections import Counter

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer, TrainerBase, create_ddp_model, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from fvcore.nn.precise_bn import get_bn_modules

from ..data.loader import build_train_loader, training_records
from ..evaluation import evaluate
from ..modeling.initialization import initialize
from ..solver import build_lr_scheduler
from .hooks import ProgressPrinter
from .record import append_result

logger = logging.getLogger(__name__)


def build_initialized_model(cfg):
    """The model of `cfg` with its MODEL.INIT.POLICY applied; the same on every process."""
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    initialize(model, cfg.MODEL.INIT.POLICY)
    return model


def evaluate_all(cfg, model, iteration):
    """Evaluate on every data set of DATASETS.TEST and add the metrics to results.json.

    Args:
        cfg (CfgNode): a resolved config; its OUTPUT_DIR holds results.json.
        model (nn.Module): the model. Every process must call this.
        iteration (int): number of iterations it has trained; 0 for weights of unknown training.

    Returns:
        dict[str, float]: flat metrics, with the data set before the name if there are several.
    """
    everything = {}
    for name in cfg.DATASETS.TEST:
        metrics = evaluate(cfg, model, name)
        if comm.is_main_process():
            append_result(cfg.OUTPUT_DIR, iteration, name, metrics)
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        everything.update({prefix + k: v for k, v in metrics.items()})
    return everything


class Trainer(TrainerBase):
    """Trains what a resolved config describes.

    One iteration is ``SOLVER.IMS_PER_BATCH`` images in groups of ``SOLVER.IMS_PER_GROUP``; each
    process runs its share of the groups and the gradients are averaged, so that the update does
    not depend on how many processes share the groups (but for the images' order).

    Args:
        cfg (CfgNode): resolved by :func:`rethink_d2.recipe.resolve` for this number of processes.

    Raises:
        ValueError: nothing to train on.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        self.max_iter = cfg.SOLVER.MAX_ITER
        processes = comm.get_world_size()
        self.groups = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.IMS_PER_GROUP * processes)
        self.images_seen = Counter()
        self.records = training_records(cfg)

        model = build_initialized_model(cfg)
        self.optimizer = build_optimizer(cfg, model)
        cpu = cfg.MODEL.DEVICE == "cpu"
        self.model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=None if cpu else [comm.get_local_rank()]
        )
        self.model.train()
        self.scheduler = build_lr_scheduler(cfg, self.optimizer)
        # A GPU trains in fp16 with a scaled loss; a CPU has bf16, which needs no scaling.
        self._device = torch.device(cfg.MODEL.DEVICE).type
        self._dtype = torch.float16 if self._device == "cuda" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(
            self._device, enabled=cfg.SOLVER.AMP.ENABLED and self._dtype == torch.float16
        )
        self.checkpointer = DetectionCheckpointer(
            self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), save_to_disk=comm.is_main_process()
        )
        seed_all_rng(cfg.SEED + comm.get_rank())  # augmentation and sampling differ between processes
        self._groups = iter(build_train_loader(cfg, self.records))
        self.register_hooks(self._build_hooks())

    def resume_or_load(self, resume):
        """Load ``MODEL.WEIGHTS``, or with `resume` the newest checkpoint of the run folder."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1  # a checkpoint names the last finished iteration

    def train(self):
        """Run the iterations that are left."""
        super().train(self.start_iter, self.max_iter)
        if self.images_seen["greyscale"]:
            logger.info("Of %(images)d images read, %(greyscale)d were greyscale", self.images_seen)

    def run_step(self):
        self.optimizer.zero_grad()
        losses, waited = Counter(), 0.0
        for group in range(self.groups):
            start = time.perf_counter()
            samples = next(self._groups)
            waited += time.perf_counter() - start
            self.images_seen.update(images=len(samples), greyscale=sum(s["greyscale"] for s in samples))
            with self._synchronize_on(group == self.groups - 1):
                with torch.autocast(self._device, self._dtype, enabled=self.cfg.SOLVER.AMP.ENABLED):
                    loss_dict = self.model(samples)
                self.scaler.scale(sum(loss_dict.values()) / self.groups).backward()
            for name, loss in loss_dict.items():
                losses[name] += loss.detach() / self.groups
        self.after_backward()
        SimpleTrainer.write_metrics(losses, waited, self.iter)  # refuses a loss that is not finite
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _synchronize_on(self, last):
        """Average gradients over the processes once an iteration, in its last group."""
        if last or comm.get_world_size() == 1:
            return contextlib.nullcontext()
        return self.model.no_sync()

    def evaluate(self):
        """Evaluate as :func:`evaluate_all` does, under the number of iterations done."""
        # After the last iteration, iter is max_iter already.
        return evaluate_all(self.cfg, self.model, min(self.iter + 1, self.max_iter))

    def _build_hooks(self):
        cfg = self.cfg
        built = [hooks.IterationTimer(), hooks.LRScheduler(self.optimizer, self.scheduler)]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            single = cfg.clone()
            single.defrost()
            single.DATALOADER.NUM_WORKERS = 0
            loader = build_train_loader(single, self.records)
            period, length = cfg.TEST.EVAL_PERIOD, cfg.TEST.PRECISE_BN.NUM_ITER
            built.append(hooks.PreciseBN(period, self.model, loader, length))
        if comm.is_main_process():
            built.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        # After the checkpoint, so that a failing evaluation loses no training.
        built.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self.evaluate))
        if comm.is_main_process():
            writers = [
                ProgressPrinter(cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, len(self.records)),
                JSONWriter(os.path.join(cfg.OUTPUT_DIR, "metrics.json")),
                TensorboardXWriter(cfg.OUTPUT_DIR),
            ]
            built.append(hooks.PeriodicWriter(writers, period=20))
        return built

    def state_dict(self):
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scaler.load_state_dict(state_dict["scaler"])
