"""Hooks and writers that Detectron2 lacks."""

import datetime
import logging
import time

from detectron2.utils.events import EventWriter, get_event_storage

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
