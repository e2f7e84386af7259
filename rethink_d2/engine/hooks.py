"""Hooks and writers that Detectron2 lacks, or that carry over an interruption."""

import datetime
import logging
import time

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import EventWriter, get_event_storage

from ..data.order import mix
from ..preemption import Preempted

logger = logging.getLogger(__name__)


class ProgressPrinter(EventWriter):
    """One line of progress: iteration, epochs, losses, rate, images per second, time left.

    Args:
        max_iter (int): the run's length, in iterations.
        images_per_batch (int), images (int): of one iteration, and of the data set (one epoch).
    """

    def __init__(self, max_iter, images_per_batch, images):
        self._max_iter = max_iter
        self._batch = images_per_batch
        self._images = images
        self._last = None  # (iteration, time) of the last line

    def write(self):
        storage = get_event_storage()
        done = storage.iter + 1
        if done > self._max_iter:  # the writers are called once more after the last iteration
            return
        now = time.perf_counter()
        losses = {k: v.median(20) for k, v in storage.histories().items() if "loss" in k}
        total = losses.pop("total_loss", None)
        if total is None:  # nothing trained yet
            return
        parts = [f"iter {done}/{self._max_iter}", f"epoch {done * self._batch / self._images:.2f}"]
        parts.append(f"loss {total:.3f} ({' '.join(f'{k[5:]} {v:.3f}' for k, v in losses.items())})")
        parts.append(f"lr {storage.history('lr').latest():.5g}")
        if self._last and done > self._last[0]:
            seconds = (now - self._last[1]) / (done - self._last[0])
            left = datetime.timedelta(seconds=int(seconds * (self._max_iter - done)))
            parts += [f"{self._batch / seconds:.1f} images/s", f"left {left}"]
        self._last = (done, now)
        logger.info("  ".join(parts))


class Checkpoints(HookBase):
    """Writes a checkpoint where one is due, and ends the run after it when that was asked for.

    What comes after it in the list of hooks (evaluation, the row of metrics.json) is done again for the
    last iteration of a checkpoint by the run that resumes from it.

    Where one could not be written in the background, the next iteration's is written in its place.

    Args:
        period (int): in iterations; 0 for the last and the branch points alone.
        branch_points (iterable[int]): iterations done after which one is written in any case.
    """

    def __init__(self, period, branch_points):
        self._period, self._points = period, frozenset(branch_points)

    def after_step(self):
        done = self.trainer.iter + 1
        periodic = self._period > 0 and done % self._period == 0
        stop = self.trainer.preempted
        due = periodic or stop or done in self._points or done == self.trainer.max_iter
        if due or self.trainer.checkpoint_failed:
            self.trainer.save_checkpoint()
        if stop:
            raise Preempted


class PreciseBN(hooks.PreciseBN):
    """Detectron2's, on images that depend on the iteration alone.

    Args:
        period (int), model (nn.Module), num_iter (int): as Detectron2's.
        loader_from (callable): returns a loader that begins at an iteration.
    """

    def __init__(self, period, model, loader_from, num_iter):
        super().__init__(period, model, None, num_iter)
        self._loader_from = loader_from

    def update_stats(self):
        self._data_iter = iter(self._loader_from(self.trainer.iter))
        torch.manual_seed(int(mix(self.trainer.cfg.SEED, self.trainer.iter)) >> 1)  # RoIs are sampled
        super().update_stats()
