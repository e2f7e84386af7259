"""Where a run's scalars go beside metrics.json: LOG.WRITERS."""

import importlib
import json
import logging
import os
from collections import defaultdict

from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from .. import preemption, recipe
from ..checks.training import WRITERS
from .history import WINDOW

logger = logging.getLogger(__name__)

# How a run's state looks as the exit code of its process, from which W&B tells its own state.
EXIT_CODES = {"done": 0, "failed": 1, "preempted": preemption.EXIT_CODE}


def build_writers(cfg, start_iter=0, parent=None):
    """The writers that LOG.WRITERS names; call it on the main process only.

    Args:
        cfg (CfgNode): a resolved config; OUTPUT_DIR is where they keep their files.
        start_iter (int): the first iteration that will be written.
        parent (dict or None): of a branch, as in run.json.

    Returns:
        list[EventWriter]: in the order of the key.

    Raises:
        ValueError: an unknown name, or a writer that cannot start.
    """
    built = []
    for name in cfg.LOG.WRITERS:
        if name == "tensorboard":
            built.append(TensorboardXWriter(cfg.OUTPUT_DIR, WINDOW, purge_step=start_iter))
        elif name == "wandb":
            built.append(WandbWriter(cfg, parent))
        else:
            raise ValueError(f"LOG.WRITERS: {name!r} is not one of {', '.join(WRITERS)}")
    return built


def close_early(writers, state):
    """Close the writers of a run that ends before its last iteration.

    Args:
        writers (list[EventWriter]): all of the run's.
        state (str): "preempted" or "failed".
    """
    for writer in writers:
        if isinstance(writer, WandbWriter):
            writer.close(state)
        else:
            writer.close()


class WandbWriter(EventWriter):
    """Sends scalars, the config and the run's state to Weights & Biases.

    A run that is resumed continues its W&B run, whose id comes from the run's identity and seed. What W&B has
    already is not sent again: an exact resume would repeat it. Account, project ("rethink_d2" unless
    WANDB_PROJECT says otherwise) and mode (WANDB_MODE=offline for no network) are W&B's own settings.

    Args:
        cfg (CfgNode): a resolved config.
        parent (dict or None): of a branch, as in run.json.

    Raises:
        ValueError: wandb is not installed, or cannot start (no account, for example).
    """

    def __init__(self, cfg, parent=None):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as e:
            raise ValueError(
                'LOG.WRITERS: "wandb" needs the package wandb (pip install wandb), or leave it out'
            ) from e
        identity = recipe.identity(cfg)
        # run id and seed, as the folders of a sweep are named
        name = os.path.join(*os.path.abspath(cfg.OUTPUT_DIR).split(os.sep)[-2:])
        config = {**json.loads(json.dumps(cfg)), "identity": identity, "parent": parent}
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        self._failure = (OSError, wandb.errors.Error)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "rethink_d2"),
                id=f"{identity[:32]}-seed{cfg.SEED}",
                resume="allow",
                name=name,
                config=config,
                allow_val_change=True,  # the keys that may differ on resume, OUTPUT_DIR for example
                dir=cfg.OUTPUT_DIR,
            )
        except self._failure as e:
            raise ValueError(
                f"LOG.WRITERS: wandb does not start ({e}); run `wandb login`, set WANDB_MODE=offline, or "
                "leave it out"
            ) from e
        self._last_write = self._run.step - 1 if self._run.resumed else -1
        self._deliver(lambda run: run.summary.update({"state": "running"}))

    def write(self):
        rows = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_write:
                rows[iteration][name] = value
        for iteration in sorted(rows):
            self._deliver(lambda run, step=iteration: run.log(rows[step], step=step))
        self._last_write = max(rows, default=self._last_write)

    def close(self, state="done"):
        """End the W&B run.

        Args:
            state (str): the run's, as in run.json: "done", "preempted" or "failed".
        """
        self._deliver(lambda run: run.summary.update({"state": state}))
        if state == "preempted":
            self._deliver(lambda run: run.mark_preempting())
        self._deliver(lambda run: run.finish(exit_code=EXIT_CODES[state]))
        self._run = None

    def _deliver(self, send):
        """Send something; no training ends because W&B's process does, as by a signal to all processes."""
        if self._run is None:
            return
        try:
            send(self._run)
        except self._failure as e:
            logger.warning("Nothing more is sent to Weights & Biases (%s: %s)", type(e).__name__, e)
            self._run = None
